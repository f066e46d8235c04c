"""Working directory, metrics, progress and mesh."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import grpo_jax
from grpo_jax import config
from grpo_jax.config import Config
from grpo_jax.infra import workdir
from grpo_jax.infra.mesh import batch_sharding, check_rows, make_mesh, param_shardings, put_batch
from grpo_jax.infra.progress import Progress, track
from grpo_jax.infra.workdir import Workdir, append_jsonl, read_jsonl
from grpo_jax.infra.writers import MetricWriter
from grpo_jax.structs import TrainState

# Working directory


def test_workdir_resumes_and_keeps_the_drawn_seed(tmp_path):
    cfg = Config()
    first = Workdir.open(tmp_path / "run", cfg)
    first.close()
    cfg.log.every = 7  # no part of the identity
    again = Workdir.open(tmp_path / "run", cfg)
    again.close()
    record = json.loads(again.config.read_text())
    assert first.seed == again.seed == record["seed"]
    assert record["config"]["log"]["every"] == 7
    assert record["versions"]["jax"] == jax.__version__
    assert record["devices"]["count"] == jax.device_count()
    other = Workdir.open(tmp_path / "other", cfg)
    other.close()
    assert other.seed != first.seed  # no hidden constant
    cfg.seed = first.seed  # the drawn seed, given
    Workdir.open(tmp_path / "run", cfg).close()


def test_workdir_of_another_config_is_refused(tmp_path):
    cfg = Config(seed=3)
    Workdir.open(tmp_path, cfg).close()
    cfg.seed = 1  # a run that stopped before it had any result is not in the way
    run = Workdir.open(tmp_path, cfg)
    append_jsonl(run.metrics, {"stage": "sft", "step": 1})
    run.close()
    cfg.grpo.beta, cfg.seed, cfg.stages = 0.5, 2, ("grpo",)
    with pytest.raises(ValueError, match="another configuration") as error:
        Workdir.open(tmp_path, cfg)
    for line in ("grpo.beta: was 0.01, now 0.5", "seed: was 1, now 2", "stages: was sft, grpo"):
        assert line in str(error.value)
    (tmp_path / "config.json").write_text('{"name": "some web project"}')
    with pytest.raises(ValueError, match="not one of this program's"):
        Workdir.open(tmp_path, Config())


def test_second_run_is_locked_out_until_the_first_dies(tmp_path):
    """A killed process leaves its lock file, but no lock."""
    code = (
        "import sys, time; from pathlib import Path; from grpo_jax.infra.workdir import _take_lock;"
        "_take_lock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    )
    root = Path(grpo_jax.__file__).parents[1]
    command = [sys.executable, "-c", code, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=f"in use by process {child.pid} on"):
            Workdir.open(tmp_path, Config())
    finally:
        child.kill()
        child.wait()
    Workdir.open(tmp_path, Config()).close()


def test_unwritable_and_full_disks_are_noticed_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        Workdir.open(tmp_path / "file" / "run", Config())
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(workdir.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 MiB free"):
        Workdir.open(tmp_path / "run", Config())


def test_stage_markers(tmp_path):
    cfg = Config(stages=("sft", "evaluate"))
    run = Workdir.open(tmp_path, cfg)
    assert run.stage_done("sft") is None
    run.mark_done("sft", {"steps": 12})
    run.mark_done("evaluate")
    assert run.stage_done("sft") == {"steps": 12} and run.stage_done("evaluate") == {}
    run.close()

    cfg.evaluation.max_rows = 7  # measured otherwise: only evaluation runs again
    run = Workdir.open(tmp_path, cfg)
    assert run.stage_done("sft") and run.stage_done("evaluate") is None
    run.mark_done("evaluate")
    run.close()

    cfg.stages = ("sft", "grpo", "evaluate")  # a longer run: what comes later is out of date
    run = Workdir.open(tmp_path, cfg)
    assert run.stage_done("evaluate") is not None
    run.mark_done("grpo")
    assert run.stage_done("evaluate") is None
    run.close()


def test_rewind_leaves_no_duplicates_and_mends_a_torn_row(tmp_path):
    run = Workdir.open(tmp_path, Config())
    for stage, step in [("sft", 0), ("sft", 1), ("grpo", 0), ("grpo", 1), ("grpo", 2)]:
        append_jsonl(run.metrics, {"stage": stage, "step": step})
    append_jsonl(run.metrics, {"stage": "evaluate", "step": 0})
    run.close()
    with run.metrics.open("a") as file:
        file.write('{"stage": "grpo", "st')  # killed in the middle of a write

    run = Workdir.open(tmp_path, Config())
    assert len(read_jsonl(run.metrics)) == 6
    run.rewind("grpo", 1)
    rows = [(row["stage"], row["step"]) for row in read_jsonl(run.metrics)]
    assert rows == [("sft", 0), ("sft", 1), ("grpo", 0)]
    run.rewind("sft", 0)
    assert read_jsonl(run.metrics) == []
    run.close()


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
    assert list((run.tensorboard / "grpo").glob("events.*"))


def test_full_disk_leaves_the_earlier_rows(tmp_path, monkeypatch):
    path, write = tmp_path / "rows.jsonl", os.write
    append_jsonl(path, {"row": 1})
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="No space left on device"):
        append_jsonl(path, {"row": 2})
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
    ("sizes", "shape"), [((1, -1, 1), (1, 8, 1)), ((2, 2, 2), (2, 2, 2)), ((-1, 2, 1), (4, 2, 1))]
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(config.Mesh(*sizes))
    assert mesh.devices.shape == shape and mesh.axis_names == ("data", "fsdp", "tensor")


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (16, 1, 1), (-1, -1, 1), (0, -1, 1)])
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
        check_rows(mesh, "grpo.prompts_per_step", 2)
