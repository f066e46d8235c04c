"""Metrics, progress and mesh."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_jax import config
from grpo_jax.config import Config
from grpo_jax.infra.files import append_jsonl, read_jsonl
from grpo_jax.infra.mesh import batch_sharding, check_rows, make_mesh, param_shardings, put_batch
from grpo_jax.infra.progress import Progress, track
from grpo_jax.infra.workdir import Workdir
from grpo_jax.infra.writers import MetricWriter
from grpo_jax.structs import TrainState

# Metrics and progress


def test_metrics_are_valid_json_and_reach_tensorboard(tmp_path, caplog):
    run = Workdir.open(tmp_path, Config())
    writer = MetricWriter(run)
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            writer.write("grpo", step, {"reward": jnp.float32(0.5), "kl": float("nan"), "n": 3})
    writer.samples("grpo", 2, [{"prompt": "ሰላም", "terms": {"semantic": np.float32("inf")}}])
    writer.close()
    run.close()
    lines = run.metrics.read_text().splitlines()
    assert json.loads(lines[2], parse_constant=pytest.fail) == {
        "stage": "grpo", "step": 2, "reward": 0.5, "kl": None, "n": 3,
    }  # fmt: skip
    assert [r.message for r in caplog.records] == [
        "kl is nan; written as null (1 so far)",
        "kl is nan; written as null (2 so far)",
        "terms/semantic is inf; written as null (1 so far)",
    ]
    assert read_jsonl(run.samples)[0]["terms"] == {"semantic": None}
    (file,) = (run.tensorboard / "grpo").glob("events.*")
    events = [event for event in tensorboard_events(file) if event.summary.value]
    assert [event.step for event in events] == [0, 1, 2]
    for event in events:
        shown = {value.tag: value.simple_value for value in event.summary.value}
        assert shown == {"reward": 0.5, "n": 3}


def tensorboard_events(file: Path) -> list:
    """The events of a file of TFRecords: a length, its checksum, as many bytes, their checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = file.read_bytes(), []
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12:end]))
        data = data[end + 4 :]
    return events


def test_full_disk_leaves_the_earlier_rows(tmp_path, monkeypatch):
    path, write = tmp_path / "rows.jsonl", os.write
    append_jsonl(path, [{"row": 1}])
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="No space left on device"):
        append_jsonl(path, [{"row": 2}])
    monkeypatch.undo()
    assert read_jsonl(path) == [{"row": 1}]


def test_progress_in_a_log_file_and_on_a_terminal():
    log = io.StringIO()
    with Progress("grpo", 2, 5, 1000.0, log) as bar:
        for _ in range(3):
            bar.update(reward=0.51234, tokens_per_second=3400.7)
    lines = log.getvalue().splitlines()
    assert len(lines) == 2  # the first step and the last; between them less than 1000 s
    assert lines[0].startswith("grpo 3/5 [") and lines[1].startswith("grpo 5/5 [")
    assert lines[0].endswith("reward 0.5123 tok/s 3,401")

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    with Progress("sft", 0, 2, 1.0, terminal) as bar:
        bar.update(loss=1.5)
        bar.update(loss=1.25)
    assert "loss 1.25" in terminal.getvalue() and "2/2" in terminal.getvalue()
    track("sft", 0, 0).close()


# Mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 1), (4, 2, 1)),
        ((0, -1, 0), (1, 8, 1)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(config.Mesh(*sizes))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1), (-1, -1, 1), (0, 1, 8)])
def test_mesh_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"mesh\.data="):
        make_mesh(config.Mesh(*sizes))


def test_param_rules():
    mesh = make_mesh(config.Mesh(data=1, fsdp=4, tensor=2))

    def spec(shape, *path):
        tree = jax.ShapeDtypeStruct(shape, jnp.float32)
        for name in reversed(path):
            tree = {name: tree}
        return jax.tree.leaves(param_shardings(mesh, tree))[0].spec

    attn = ("layers", "self_attn")
    assert spec((64, 32), "embed_tokens", "embedding") == P("tensor", "fsdp")
    assert spec((32, 64), "lm_head", "kernel") == P("fsdp", "tensor")
    assert spec((2, 32, 32), *attn, "q_proj", "kernel") == P(None, "fsdp", "tensor")
    assert spec((2, 32), *attn, "q_proj", "bias") == P(None, "tensor")
    assert spec((2, 32, 32), *attn, "o_proj", "kernel") == P(None, "tensor", "fsdp")
    assert spec((2, 32, 4), *attn, "o_proj", "lora_a") == P(None, "tensor", None)
    assert spec((2, 4, 32), *attn, "v_proj", "lora_b") == P(None, None, "tensor")
    assert spec((2, 32), "layers", "input_layernorm", "scale") == P()
    assert spec((259, 32), "embed_tokens", "embedding") == P(None, "fsdp")  # 259 is odd
    assert spec((2, 30, 32), *attn, "k_proj", "kernel") == P(None, None, "tensor")


def test_optimizer_state_is_sharded_like_its_parameters():
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    params = {
        "layers": {"self_attn": {"q_proj": {"kernel": np.ones((2, 32, 32), np.float32)}}},
        "norm": {"scale": np.ones(32, np.float32)},
    }
    state = TrainState(np.int32(0), params, optax.adamw(1e-3).init(params))
    shardings = param_shardings(mesh, state)
    assert shardings.opt_state[0].mu == shardings.params == shardings.opt_state[0].nu
    assert shardings.step.spec == P()
    kernel = jax.device_put(state, shardings).params["layers"]["self_attn"]["q_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 16, 16)


class Batch(NamedTuple):
    ids: np.ndarray
    advantages: np.ndarray
    ref_logps: np.ndarray | None = None


def test_put_batch():
    mesh = make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    host = Batch(np.arange(24, dtype=np.int32).reshape(8, 3), np.ones((8, 2, 5), np.float32))
    batch = put_batch(mesh, host)
    assert isinstance(batch, Batch) and batch.ref_logps is None
    assert batch.ids.sharding == batch_sharding(mesh)
    assert batch.ids.addressable_shards[0].data.shape == (2, 3)
    np.testing.assert_array_equal(batch.ids, host.ids)
    with pytest.raises(ValueError, match="the batch: got 6 rows, wanted a multiple of 4"):
        put_batch(mesh, Batch(host.ids[:6], host.advantages[:6]))
    with pytest.raises(ValueError, match="grpo.prompts_per_step: got 2 rows"):
        check_rows(4, "grpo.prompts_per_step", 2)
