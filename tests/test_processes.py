"""A whole run of two processes beside a run of one: the same losses, samples and weights.

The two are real processes that communicate by gloo; the one has eight devices, in this process.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_distributed import announce, free_port

from grpo_jax import main
from grpo_jax.models.packing import slots_for
from grpo_jax.stages import learner
from tests import whole

ROOT = Path(__file__).parents[1]
RUN = """
from configs import tiny

def get_config():
    cfg = tiny.get_config()
    cfg.stages = ("sft", "grpo", "evaluate", "export")
    cfg.model.remat = False
    cfg.encoder.batch_size, cfg.encoder.max_length = 8, 8
    cfg.sft.batch_size, cfg.sft.max_steps = 8, 2
    cfg.sft.optimizer.schedule, cfg.sft.optimizer.warmup_ratio = "constant", 0.0
    cfg.grpo.prompts_per_step, cfg.grpo.num_generations, cfg.grpo.max_steps = 8, 8, 3
    cfg.grpo.mask_truncated_completions = True
    cfg.evaluation.max_rows, cfg.evaluation.max_retention_rows = 11, 9  # batches are not full
    cfg.evaluation.batch_size, cfg.evaluation.bootstrap = 8, 10
    cfg.evaluation.max_retention_length = 24
    cfg.checkpoint.every = cfg.log.samples_every = 1
    cfg.export.arms, cfg.export.dtype = ("sft", "grpo"), "float32"
    return cfg
"""


class Together:
    """Runs of several processes, of the config RUN, on caches below `base`."""

    def __init__(self, base: Path):
        self.base = base
        self.config = base / "run.py"
        self.config.write_text(RUN)

    def start(self, name: str, count: int, devices: int, *flags: str) -> list[subprocess.Popen]:
        port, started = free_port(), []
        for rank in range(count):
            xla = f"--xla_force_host_platform_device_count={devices}"
            environ = os.environ | {
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {xla}",
                "JAX_ENABLE_COMPILATION_CACHE": "true",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "GRPO_JAX_CACHE": str(self.base / "cache"),
                **announce(count, rank, port),
            }
            command = [sys.executable, "-m", "grpo_jax.main", f"--config={self.config}"]
            command += [f"--workdir={self.base / name}", *flags]
            log = (self.base / f"{name}-{rank}.log").open("w")
            started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stderr=log, stdout=log))
        return started

    def finish(self, name: str, count: int, devices: int, *flags: str) -> list[int]:
        """Exit statuses."""
        started = self.start(name, count, devices, *flags)
        try:
            return [child.wait(timeout=300) for child in started]
        finally:
            for child in started:
                child.kill()

    def alone(self, name: str) -> None:
        """Here, on eight devices."""
        cfg = runpy.run_path(str(self.config))["get_config"]()
        with whole.machine(self.base, devices=8):
            main.train(cfg, str(self.base / name))

    def log(self, name: str, rank: int) -> str:
        return (self.base / f"{name}-{rank}.log").read_text()

    def rows(self, name: str, file: str = "metrics.jsonl") -> list[dict]:
        path = self.base / name / file
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return Together(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def runs(together):
    packed = []

    def counted(*given):
        packed.append(slots_for(*given))
        return packed[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "slots_for", counted)
        together.alone("one")
    assert any(packed)  # so that processes have to agree on it
    return together


def assert_same(runs: Together, name: str) -> None:
    """The run ended as "one" did: losses, rewards, samples, scores and weights."""
    steps = [(row["stage"], row["step"]) for row in runs.rows(name)]
    assert steps == [("sft", 1), ("sft", 2), ("grpo", 1), ("grpo", 2), ("grpo", 3)]
    for ours, theirs in zip(runs.rows(name), runs.rows("one"), strict=True):
        assert ours.keys() == theirs.keys()
        for key in theirs.keys() - {"step_time", "tokens_per_second"}:
            if not key.startswith("time") and isinstance(theirs[key], float):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    texts = [[row["completion"] for row in runs.rows(n, "samples.jsonl")] for n in (name, "one")]
    assert texts[0] == texts[1] and len(texts[0]) > 10
    for arm in ("base", "sft", "grpo"):
        ours, theirs = (
            json.loads((runs.base / n / "evaluation" / f"{arm}.json").read_text())
            for n in (name, "one")
        )
        assert len(theirs["samples"]) == 11
        for a, b in zip(ours["samples"], theirs["samples"], strict=True):
            assert a["completion"] == b["completion"]
        values = [x["retention"]["nll_mean"]["value"] for x in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    for arm in ("sft", "grpo"):
        ours, theirs = (
            load_file(runs.base / n / "export" / arm / "model.safetensors") for n in (name, "one")
        )
        assert ours.keys() == theirs.keys()
        for key in theirs:
            np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-3, atol=2e-5)


def stopped(runs: Together, name: str) -> None:
    """SIGTERM to process 1 in training, then to both until they end: one step, one checkpoint."""
    started = runs.start(name, 2, 4)
    try:
        while not runs.rows(name):
            assert all(child.poll() is None for child in started), runs.log(name, 0)
            time.sleep(0.02)
        started[1].send_signal(signal.SIGTERM)
        until = time.monotonic() + 120
        while any(child.poll() is None for child in started) and time.monotonic() < until:
            time.sleep(0.2)
            for child in started:
                child.send_signal(signal.SIGTERM)
    finally:
        for child in started:
            child.kill()
    assert [child.wait() for child in started] == [143, 143], runs.log(name, 0)
    said = runs.log(name, 0).splitlines()[-1]
    step = re.match(r"SIGTERM: stopped sft after step ([12]) of 2, which is saved in ", said)
    assert step, said
    saved = (path.name for path in (runs.base / name / "checkpoints" / "sft").iterdir())
    assert max(saved) == step[1]


def test_two_processes_are_stopped_and_killed_resume_and_equal_one(runs):
    """2 x 4 devices: a kill takes both down; two go on, and so does one, from the same place."""
    stopped(runs, "two")
    started = runs.start("two", 2, 4)
    try:
        while not any(row["stage"] == "grpo" for row in runs.rows("two")):
            assert all(child.poll() is None for child in started), runs.log("two", 0)
            time.sleep(0.02)
        began = time.monotonic()
        started[1].kill()
        assert started[0].wait(timeout=60) == 1
    finally:
        for child in started:
            child.kill()
    assert time.monotonic() - began < 30
    last = runs.log("two", 0).splitlines()[-1]
    assert last.startswith("error: process 1 of 2 (") and f"id {started[1].pid}) has died" in last
    assert not any(row["stage"] == "grpo" and row["step"] == 3 for row in runs.rows("two"))
    shutil.copytree(runs.base / "two", runs.base / "then-one")
    assert runs.finish("two", 2, 4) == [0, 0], runs.log("two", 0)
    assert_same(runs, "two")
    runs.alone("then-one")
    assert_same(runs, "then-one")


def test_processes_with_different_configs_stop_at_once(together):
    port, began = free_port(), time.monotonic()
    started = []
    for rank, beta in enumerate((0.1, 0.2)):
        command = [sys.executable, "-m", "grpo_jax.main", f"--config={together.config}"]
        command += [f"--workdir={together.base / 'apart'}", f"--config.grpo.beta={beta}"]
        environ = os.environ | announce(2, rank, port)
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stderr=pipe, text=True))
    said = [child.communicate(timeout=60)[1] for child in started]
    assert [child.returncode for child in started] == [1, 1], said
    assert all("grpo.beta: 0.2 there, 0.1 here" in text.splitlines()[-1] for text in said), said
    assert time.monotonic() - began < 60
