"""Checkpoints: bit for bit, through kills, damage, full disks and onto other meshes."""

from __future__ import annotations

import json
import logging
import os
import resource
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax
from grpo_jax import config
from grpo_jax.infra import distributed, files
from grpo_jax.infra.checkpoint import Checkpoints, sum_bits
from grpo_jax.infra.mesh import make_mesh, param_shardings
from grpo_jax.structs import TrainState


@contextmanager
def file_size_limit(size: int):
    """Writes behind `size` fail as they do on a full disk (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_state(seed: int = 0) -> TrainState:
    """Two layers, D 32, F 48, with Adam's moments; values that no compression makes trivial."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    params = {
        "embed_tokens": {"embedding": draw(64, 32)},
        "layers": {
            "input_layernorm": {"scale": draw(2, 32)},
            "self_attn": {"q_proj": {"kernel": draw(2, 32, 32), "bias": draw(2, 32)}},
            "mlp": {"down_proj": {"kernel": draw(2, 48, 32).astype(jnp.bfloat16)}},
        },
    }
    return TrainState(jnp.int32(seed), params, optax.adamw(1e-3).init(params))


def abstract(state: TrainState, shardings: TrainState | None = None) -> TrainState:
    shardings = shardings or jax.tree.map(lambda x: x.sharding, state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )


def assert_same_bits(a: TrainState, b: TrainState) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_bit_for_bit_although_the_state_is_donated(tmp_path):
    state = tiny_state(3)
    kept = jax.device_get(state)
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(3, state, {"tau": 0.1, "counts": [1, 2]})
        donate(donate(state))
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored, aux = checkpoints.restore(abstract(tiny_state()))
    assert_same_bits(restored, kept)
    assert type(restored) is TrainState and aux == {"tau": 0.1, "counts": [1, 2]}


def test_newest_and_best_are_kept(tmp_path):
    state = tiny_state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None
        with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
            checkpoints.restore(abstract(state))
        for step, score in enumerate([0.1, 0.9, None, float("nan"), 0.4, None, None]):
            checkpoints.save(step, state, {}, score)
        checkpoints.save(6, state, {"again": 1})  # is there already
    assert {p.name for p in tmp_path.iterdir()} == {"1", "5", "6"}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 6 and checkpoints.best() == 1
        assert checkpoints.restore(abstract(state), 6)[1] == {}
        with pytest.raises(FileNotFoundError, match="no checkpoint 4"):
            checkpoints.restore(abstract(state), 4)


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
    path = largest_file(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(folder):
    path = largest_file(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def remove_metadata(folder):
    (folder / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # Orbax drops one when it fails
@pytest.mark.parametrize("damage", [truncate, flip, remove_metadata])
def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog, damage):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, tiny_state(step), {"step": step})
    damage(tmp_path / "2")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING):
            state, aux = checkpoints.restore(abstract(tiny_state()))
        assert aux == {"step": 1}
        assert_same_bits(state, jax.device_get(tiny_state(1)))
        assert "checkpoint 2 is damaged" in caplog.text
        assert checkpoints.latest() == 1
        checkpoints.save(2, tiny_state(2), {"step": 2})  # the resumed run comes by again
        assert checkpoints.restore(abstract(tiny_state()))[1] == {"step": 2}


def test_leftovers_of_a_kill_are_removed(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, tiny_state(1), {})
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest() == 1
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_full_disk_is_explained_and_earlier_checkpoints_stay(tmp_path, monkeypatch, caplog):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(1, tiny_state(1), {})
        checkpoints.wait()
        with file_size_limit(8000), pytest.raises(OSError) as error:
            checkpoints.save(2, tiny_state(2), {})
            checkpoints.wait()
        assert "could not be written" in str(error.value)
        assert "whole checkpoints: 1." in str(error.value)
        assert "Traceback" not in caplog.text
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="checkpoint 3: needs"):
            checkpoints.save(3, tiny_state(3), {})
        monkeypatch.undo()
        state, _ = checkpoints.restore(abstract(tiny_state()))
        assert_same_bits(state, jax.device_get(tiny_state(1)))
        checkpoints.save(4, tiny_state(4), {})
    assert {p.name for p in tmp_path.iterdir()} == {"1", "4"}


def test_state_of_another_model_is_refused(tmp_path):
    state = tiny_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        wider = state._replace(params={"embed_tokens": {"embedding": jnp.zeros((64, 40))}})
        with pytest.raises(ValueError, match="holds another model") as error:
            checkpoints.restore(abstract(wider))
        wanted = "params/embed_tokens/embedding: saved float32 [64, 32], wanted float32 [64, 40]"
        assert wanted in str(error.value)
        assert checkpoints.latest() == 1  # not taken for damaged


MESHES = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_saved_on_one_mesh_and_restored_on_every_other(tmp_path, sizes):
    state = tiny_state(5)
    meshes = {s: make_mesh(config.Mesh(*s), jax.devices()[: np.prod(s)]) for s in MESHES}
    shardings = {s: param_shardings(mesh, state) for s, mesh in meshes.items()}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, jax.device_put(jax.device_get(state), shardings[sizes]), {})
        for wanted in shardings.values():
            restored, _ = checkpoints.restore(abstract(state, wanted))
            assert_same_bits(restored, jax.device_get(state))
            placed = jax.tree.map(lambda x: x.sharding, restored)
            assert jax.tree.leaves(placed) == jax.tree.leaves(wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool", "float16"])
def test_checksum_sees_any_one_changed_element(dtype):
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(jnp.dtype(dtype))
    base = int(sum_bits(jnp.asarray(x)))
    for position in np.ndindex(*x.shape):
        y = x.copy()
        y[position] = not y[position] if dtype == "bool" else y[position] + 1
        assert int(sum_bits(jnp.asarray(y))) != base
    if dtype != "bool":
        assert int(sum_bits(jnp.asarray(x[::-1]))) != base  # order counts


# Several processes


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            True,
        ),
    ],
)
def test_who_announces_several_processes(environ, several):
    assert distributed.announced(environ) == several


def test_a_coordinator_alone_is_not_enough():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID"):
        distributed.announced({"JAX_COORDINATOR_ADDRESS": "a:1"})


def test_two_processes_share_a_workdir_a_mesh_and_checkpoints(tmp_path):
    """Process 0 writes, both get its seed, and each puts its own rows of the batch."""
    code = """
import sys
from grpo_jax.infra import distributed
distributed.initialize()
import jax, jax.numpy as jnp, numpy as np
from grpo_jax import config
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.infra.mesh import make_mesh, param_shardings, put_batch
from grpo_jax.infra.workdir import Workdir
from tests.test_checkpoint import abstract

run = Workdir.open(sys.argv[1], config.Config())
mesh = make_mesh(config.Mesh(fsdp=-1))
rank = jax.process_index()
(ids,) = put_batch(mesh, (np.full((2, 3), rank + 1),))
tree = {"q_proj": {"kernel": np.arange(64.0, dtype=np.float32).reshape(2, 8, 4)}}
shardings = param_shardings(mesh, tree)
state = jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), tree, shardings
)
with Checkpoints(run.checkpoints, keep=1) as checkpoints:
    checkpoints.save(1, state, {"tau": 0.5})
    restored, aux = checkpoints.restore(abstract(state))
for shard in restored["q_proj"]["kernel"].addressable_shards:
    np.testing.assert_array_equal(shard.data, tree["q_proj"]["kernel"][shard.index])
print(rank, run.seed, int(jnp.sum(ids)), aux["tau"], distributed.is_main(), flush=True)
"""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    root = Path(grpo_jax.__file__).parents[1]
    children = []
    for rank in range(2):
        environ = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        command = [sys.executable, "-c", code, str(tmp_path / "run")]
        children.append(
            subprocess.Popen(
                command,
                env=environ,
                cwd=root,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        outputs = [child.communicate(timeout=90) for child in children]
    finally:
        for child in children:
            child.kill()
    assert all(child.returncode == 0 for child in children), outputs
    seed = json.loads((tmp_path / "run" / "config.json").read_text())["seed"]
    lines = [out.splitlines()[-1] for out, _ in outputs]
    assert lines == [f"0 {seed} 18 0.5 True", f"1 {seed} 18 0.5 False"]
