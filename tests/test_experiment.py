"""The alignment-tax experiment at toy scale: every arm runs, on its own rows and settings."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from grpo_jax import main, report
from grpo_jax.infra.files import read_jsonl
from grpo_jax.infra.workdir import Workdir
from grpo_jax.stages import run as run_lib
from grpo_jax.stages import weights
from tests import tax_short, whole
from tests.tax_short import LEARNING


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """Of a run in a process of its own: one device, and fast code, for it runs long."""
    command = [sys.executable, "-m", "grpo_jax.main", f"--config={tax_short.__file__}"]
    command += [f"--workdir={base / 'tax'}"]
    environ = os.environ | {
        "XLA_FLAGS": "--xla_backend_optimization_level=1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "GRPO_JAX_CACHE": str(base / "cache"),
    }
    environ.pop("PJRT_NPROC", None)
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return base / "tax"


def evaluation(folder: Path, name: str) -> dict:
    return json.loads((folder / "evaluation" / f"{name}.json").read_text())


def test_every_arm_is_trained_measured_and_paid_for(folder: Path) -> None:
    rows = read_jsonl(folder / "metrics.jsonl")
    for arm in tax_short.get_config().arms:
        found = evaluation(folder, arm.name)
        assert (found["method"], found["group"]) == (arm.method, arm.group)
        assert {"value", "low", "high"} <= found["target"]["chrf++"].keys()
        steps = [row for row in rows if row["stage"] == arm.name]
        if arm.method == "interpolate":
            assert not steps and found["cost"]["tokens"] == 0
        else:
            assert "forgetting/kl" in steps[-1] and found["cost"]["seconds"] > 0
            trained = sum(row["num_tokens"] for row in steps)
            sampled = 64 * 8 if arm.method == "self_sft" else 0  # a token each at the least
            assert found["cost"]["tokens"] >= trained + sampled > 0
    assert evaluation(folder, "base")["retention"]["kl_general"]["value"] == pytest.approx(0)
    assert len(evaluation(folder, "tm@transfer")["samples"]) == 32


def test_arms_differ_only_in_what_makes_them_arms(folder: Path) -> None:
    rows = read_jsonl(folder / "metrics.jsonl")
    first = {row["stage"]: row for row in rows if row["step"] == 1}
    kinds = ("grpo-no-gate", "grpo-bleu", "grpo-chrf", "grpo-beta-0")
    lengths = {first[name]["completions/mean_length"] for name in (*kinds, *LEARNING)}
    assert len(lengths) == 1  # the same prompts and the same draws from the same cold start
    assert len({first[name]["reward"] for name in (*kinds, *LEARNING)}) > 3
    assert "kl" in first["grpo"] and "kl" not in first["grpo-beta-0"]
    assert first["sft-5e-4"]["learning_rate"] == pytest.approx(5e-4)


def test_the_negative_control_does_not_help_and_the_real_reward_does(folder: Path) -> None:
    score = {
        name: evaluation(folder, name)["target"]["similarity"]["value"]
        for name in ("cold", *LEARNING)
    }
    assert score["grpo"] > score["cold"] + 0.03
    assert score["grpo"] > score["grpo-shuffled"] + 0.05


def test_the_gate_fires(folder: Path) -> None:
    """The base does not write the language; the cold start does, and the reward says so."""
    share = {
        name: evaluation(folder, name)["target"]["language_consistency"]["value"]
        for name in ("base", "cold")
    }
    assert share["base"] < 0.5 < share["cold"]
    for row in read_jsonl(folder / "samples.jsonl"):
        if row["stage"] == "sg-srl" and row["rewards/language"] == 0:
            assert row["reward"] == 0  # its gate is hard


def test_a_budget_that_cannot_be_held_ends_the_arm_early(folder: Path) -> None:
    """The cold start alone is further from base than the budget allows."""
    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if row["stage"] == "held"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # three measurements, then the end
    assert [row["beta"] for row in rows] == [0.04, 0.04, 0.08, 0.08, 0.16, 0.16]
    assert all(row["forgetting/kl"] > 1e-3 for row in rows[1::2])
    assert "eval/reward" in rows[1]  # so that the best checkpoint is known


def test_self_sft_learns_from_its_best_samples_only(folder: Path) -> None:
    kept = json.loads((folder / "self_sft" / "self-sft.json").read_text())
    prompts = [row for row, _ in kept["completions"]]
    assert len(set(prompts)) == len(prompts) <= kept["prompts"]  # the one best of each
    assert all(ids[-1] == kept["completions"][0][1][-1] for _, ids in kept["completions"])  # EOS


def test_interpolated_weights_lie_between(base: Path, folder: Path) -> None:
    cfg = tax_short.get_config()
    with whole.machine(base):
        workdir = Workdir.open(folder, cfg)
        run = run_lib.open_run(cfg, workdir)
        names = (run.arms["mix"].start, "grpo", "mix")
        strong, grpo, mix = (jax.device_get(weights.load_params(run, name)) for name in names)
        workdir.close()
    jax.tree.map(
        lambda a, b, m: np.testing.assert_allclose(m, (a + b) / 2, atol=1e-6), strong, grpo, mix
    )


def test_the_page_shows_both_groups_and_what_arms_cost(folder: Path) -> None:
    found = report.read(folder)
    assert {entry["group"] for entry in found["tax"]} == {"", "transfer"}
    names = [arm["name"] for arm in found["arms"]]
    assert {arm.name for arm in tax_short.get_config().arms} < {*names} and "base@transfer" in names
    assert found["costs"]["grpo"]["total_seconds"] > found["costs"]["grpo"]["seconds"]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "grpo-shuffled" in page and "cold-transfer" in page


def test_what_is_done_is_not_done_again_and_arms_can_be_added(base: Path, folder: Path) -> None:
    copy = base / "tax-more"
    shutil.copytree(folder, copy)
    cfg = tax_short.get_config()
    more = dataclasses.replace(cfg.arms[0], name="colder", overrides={"sft.max_steps": 1})
    cfg.arms = (*cfg.arms, more)
    before = read_jsonl(copy / "metrics.jsonl")
    with whole.machine(base):
        main.train(cfg, str(copy))
    rows = read_jsonl(copy / "metrics.jsonl")
    assert rows[: len(before)] == before
    assert [row["stage"] for row in rows[len(before) :]] == ["colder"]
    for arm in tax_short.get_config().arms:
        assert evaluation(copy, arm.name) == evaluation(folder, arm.name)
