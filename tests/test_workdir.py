"""The working directory: what belongs to a run, what may change, who may work in it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

import grpo_jax
from grpo_jax.config import Arm, Config
from grpo_jax.infra import files
from grpo_jax.infra.files import Lock, read_jsonl
from grpo_jax.infra.workdir import Workdir


def begin(run: Workdir, name: str, done: bool = False) -> None:
    """An arm as training leaves it: a record and a checkpoint."""
    run.note_arm(name, {"tokens": 7, "seconds": 1.5}, done)
    (run.checkpoints / name / "1").mkdir(parents=True, exist_ok=True)


def experiment() -> Config:
    arms = (
        Arm("sft", "sft"),
        Arm("grpo", "grpo", "sft"),
        Arm("free", "grpo", "sft", overrides={"grpo.beta": 0.0}),
    )
    return Config(stages=("evaluate",), arms=arms, seed=1)


def test_it_is_taken_up_again_and_keeps_the_drawn_seed(tmp_path):
    cfg = Config()
    first = Workdir.open(tmp_path / "run", cfg)
    first.close()
    cfg.log.every = 7  # changes nothing that is computed
    again = Workdir.open(tmp_path / "run", cfg)
    again.close()
    record = json.loads(again.config.read_text())
    assert first.seed == again.seed == record["seed"]
    assert record["config"]["log"]["every"] == 7
    assert [(arm["name"], arm["start"]) for arm in record["arms"]] == [
        ("sft", "base"), ("grpo", "sft"),
    ]  # fmt: skip
    assert record["versions"]["jax"] == jax.__version__
    assert record["devices"]["count"] == jax.device_count()
    other = Workdir.open(tmp_path / "other", cfg)
    other.close()
    assert other.seed != first.seed  # no hidden constant
    cfg.seed = first.seed  # the drawn seed, given
    Workdir.open(tmp_path / "run", cfg).close()


def test_another_configuration_is_refused(tmp_path):
    cfg = Config(seed=3)
    run = Workdir.open(tmp_path, cfg)
    run.note_arm("sft", {})  # it began, but has no checkpoint: nothing is lost
    run.close()
    cfg.seed, cfg.sft.epochs = 1, 2.0
    run = Workdir.open(tmp_path, cfg)
    begin(run, "sft", done=True)
    begin(run, "grpo")
    run.close()
    cfg.seed, cfg.grpo.beta, cfg.model.path = 2, 0.5, "other"
    with pytest.raises(ValueError, match="another configuration") as error:
        Workdir.open(tmp_path, cfg)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "model.path: was '', now 'other'", "grpo.beta: was 0.01, now 0.5", "seed: was 1, now 2",
    ]  # fmt: skip
    (tmp_path / "config.json").write_text('{"name": "some web project"}')
    with pytest.raises(ValueError, match="not this program's"):
        Workdir.open(tmp_path, Config())


def test_an_arm_depends_on_what_its_method_reads(tmp_path):
    cfg = Config(stages=("sft",), seed=1)
    run = Workdir.open(tmp_path, cfg)
    begin(run, "sft", done=True)
    run.close()
    cfg.stages, cfg.grpo.beta, cfg.reward.tau = ("sft", "grpo"), 0.3, 0.2  # SFT knows neither
    run = Workdir.open(tmp_path, cfg)
    assert list(run.arms) == ["sft", "grpo"] and run.arm_done("grpo") is None
    begin(run, "grpo", done=True)
    run.close()
    cfg.stages = ("recover",)  # what is done is still the start of what comes
    run = Workdir.open(tmp_path, cfg)
    assert [arm.start for arm in run.arms.values()] == ["base", "sft", "grpo"]
    run.close()
    (tmp_path / "arms" / "sft.json").unlink()  # without it, GRPO would start from the base
    with pytest.raises(ValueError, match="grpo's start: was 'sft', now 'base'"):
        Workdir.open(tmp_path, cfg)


def test_arms_can_be_added_and_dropped_but_not_changed(tmp_path):
    cfg = experiment()
    run = Workdir.open(tmp_path, cfg)
    for name in run.arms:
        begin(run, name, done=True)
    assert run.arm_done("grpo") == {"tokens": 7, "seconds": 1.5} == run.arm_cost("grpo")
    run.close()
    cfg.arms = (*cfg.arms[:2], Arm("bleu", "grpo", "sft", overrides={"reward.metric": "bleu"}))
    run = Workdir.open(tmp_path, cfg)
    assert run.arm_done("grpo") and run.arm_done("bleu") is None and run.arm_cost("bleu") == {}
    run.close()
    cfg.arms = (cfg.arms[0], Arm("grpo", "grpo", "sft", overrides={"grpo": {"beta": 1}}))
    with pytest.raises(ValueError, match=r"grpo\.beta: was 0.01, now 1.0"):
        Workdir.open(tmp_path, cfg)


def test_stages_behind_the_training_run_again_when_something_changed(tmp_path):
    cfg = Config(stages=("sft", "evaluate"), seed=1)
    run = Workdir.open(tmp_path, cfg)
    begin(run, "sft", done=True)
    run.mark_done("evaluate")
    assert run.stage_done("evaluate") and not run.stage_done("export")
    run.close()
    cfg.evaluation.max_rows = 7
    run = Workdir.open(tmp_path, cfg)
    assert not run.stage_done("evaluate")
    run.mark_done("evaluate")
    run.close()
    cfg.stages = ("sft", "grpo", "evaluate")
    run = Workdir.open(tmp_path, cfg)
    assert run.stage_done("evaluate")
    begin(run, "grpo", done=True)
    assert not run.stage_done("evaluate")
    run.close()


def test_rewind_leaves_no_duplicates_and_mends_a_torn_row(tmp_path):
    run = Workdir.open(tmp_path, Config())
    for arm, step in [("sft", 1), ("grpo", 1), ("sft", 2), ("grpo", 2), ("grpo", 3)]:
        run.append(run.metrics, [{"stage": arm, "step": step}])
    run.close()
    with run.metrics.open("a") as file:
        file.write('{"stage": "grpo", "st')  # killed in the middle of a write

    run = Workdir.open(tmp_path, Config())
    assert len(read_jsonl(run.metrics)) == 5
    run.rewind("grpo", 2)
    rows = [(row["stage"], row["step"]) for row in read_jsonl(run.metrics)]
    assert rows == [("sft", 1), ("grpo", 1), ("sft", 2)]
    run.close()


def test_unwritable_and_full_disks_are_noticed_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another --workdir"):
        Workdir.open(tmp_path / "file" / "run", Config())
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="only 1 MiB free"):
        Workdir.open(tmp_path / "run", Config())


# Several programs in one folder


def holding(tmp_path: Path, only: str) -> subprocess.Popen:
    """Another process that has opened the experiment, for all arms or for some."""
    code = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, 'tests');"
        "from tests.test_workdir import experiment; from grpo_jax.infra.workdir import Workdir;"
        "cfg = experiment(); cfg.only = tuple(filter(None, sys.argv[2].split(',')));"
        "run = Workdir.open(sys.argv[1], cfg); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), only]
    root = Path(grpo_jax.__file__).parents[1]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root)
    assert child.stdout is not None and child.stdout.readline() == b"open\n"
    return child


def test_a_second_run_is_locked_out_until_the_first_dies(tmp_path):
    """A killed process leaves its lock file, but no lock."""
    child = holding(tmp_path, "")
    try:
        with pytest.raises(ValueError, match=f"it is in use by process {child.pid} on"):
            Workdir.open(tmp_path, experiment())
    finally:
        child.kill()
        child.wait()
    Workdir.open(tmp_path, experiment()).close()


def test_runs_share_a_folder_when_each_has_arms_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WAIT_SECONDS", 0.01)
    child = holding(tmp_path, "grpo,sft")
    try:
        cfg = experiment()
        with pytest.raises(ValueError, match="it is in use by another process"):
            Workdir.open(tmp_path, cfg)
        cfg.only = ("grpo",)
        with pytest.raises(ValueError, match=f"grpo is in use by process {child.pid} on"):
            Workdir.open(tmp_path, cfg)
        cfg.only = ("free",)
        run = Workdir.open(tmp_path, cfg)
        waiter = threading.Thread(target=run.wait_for, args=("sft",))
        waiter.start()
        waiter.join(0.3)
        assert waiter.is_alive()  # the other process works on sft
        run.note_arm("sft", {}, done=True)
    finally:
        child.kill()
        child.wait()
    waiter.join(10)
    assert not waiter.is_alive()
    with pytest.raises(ValueError, match="grpo is not finished, and nobody works on it"):
        run.wait_for("grpo")
    with run.alone("base"):
        assert not Lock(tmp_path / "arms" / ".base.lock").take()
    assert Lock(tmp_path / "arms" / ".base.lock").take()
    run.close()
