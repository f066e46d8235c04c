"""The whole loop on the tiny assets: what a run leaves, that it resumes, that it learns."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import make_adapter
from safetensors.numpy import load_file

from grpo_jax import hub, main
from grpo_jax.config import Config
from grpo_jax.infra.workdir import Workdir
from grpo_jax.infra.writers import MetricWriter
from grpo_jax.stages import evaluate, export, grpo, sft, weights
from grpo_jax.stages import run as run_lib
from tests import whole

TIMES = ("step_time", "tokens_per_second", "time/sample", "time/score", "time/update")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def read_rows(path: Path) -> list[dict]:
    """Rows of a jsonl file that must be valid JSON, without the fields that are times."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def checkpoint(folder: Path) -> dict:
    """What a checkpoint says of itself: aux, and each leaf's dtype, shape and checksum."""
    return json.loads((folder / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]


# What a run leaves


def test_every_file_of_a_run_is_there_and_valid(base: Path) -> None:
    folder = whole.finished(base, "short")
    record = json.loads((folder / "config.json").read_text(), parse_constant=pytest.fail)
    assert record["config"]["model"]["path"] == "asset:tiny-decoder" and record["seed"] == 0
    assert record["versions"]["jax"] == jax.__version__ and "git_revision" in record
    for stage in ("sft", "grpo"):
        assert {p.name for p in (folder / "checkpoints" / stage).iterdir()} == {"2", "3"}
        assert list((folder / "tensorboard" / stage).glob("events*"))
        exported = {p.name for p in (folder / "export" / stage).iterdir()}
        assert exported >= {
            "config.json", "model.safetensors", "tokenizer.json", "generation_config.json",
            "README.md",
        }  # fmt: skip
    for arm in ("base", "sft", "grpo", "copy", "tm"):
        found = json.loads((folder / "evaluation" / f"{arm}.json").read_text())
        assert {"chrf++", "bleu", "rouge_l", "similarity"} <= found["target"].keys()
        assert len(found["samples"]) == 16
        assert ("retention" in found) == (arm not in ("copy", "tm"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "https://" not in page and "samples" in page


def test_metrics_have_the_names_that_users_know(base: Path) -> None:
    rows = read_rows(whole.finished(base, "short") / "metrics.jsonl")
    assert [(row["stage"], row["step"]) for row in rows] == [
        (stage, step) for stage in ("sft", "grpo") for step in (1, 2, 3)
    ]
    wanted = """
        reward reward_std frac_reward_zero_std rewards/semantic/mean rewards/semantic/std
        rewards/language/mean rewards/language/std kl entropy loss policy_loss grad_norm
        learning_rate num_tokens completions/mean_length completions/min_length
        completions/max_length completions/mean_terminated_length
        completions/min_terminated_length completions/max_terminated_length
        completions/clipped_ratio completions/odd_ratio completions/unread_ratio
        clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean
        clip_ratio/high_max clip_ratio/region_mean sampling/sampling_logp_difference/mean
        sampling/sampling_logp_difference/max
    """.split()
    assert set(wanted) <= rows[-1].keys()
    assert {"loss", "entropy", "grad_norm", "num_tokens", "learning_rate"} <= rows[0].keys()
    assert all(value is not None for row in rows for value in row.values())
    assert rows[3]["kl"] == pytest.approx(0.0, abs=1e-6)  # the first rollout is the reference's
    assert rows[3]["sampling/sampling_logp_difference/max"] < 1e-4


def test_samples_hold_prompt_completion_reference_and_every_term(base: Path) -> None:
    rows = read_rows(whole.finished(base, "short") / "samples.jsonl")
    cfg = whole.short_config()
    assert len(rows) == 3 * cfg.log.samples * cfg.grpo.num_generations
    for row in rows:
        total = 1.5 * row["rewards/semantic"] + 1.0 * row["rewards/language"]
        assert row["reward"] == pytest.approx(total, abs=1e-5)
        assert row["prompt"] and row["reference"] and isinstance(row["completion"], str)


def test_the_export_is_the_trained_model(base: Path) -> None:
    folder, cfg = whole.finished(base, "short"), whole.short_config()
    with whole.machine(base):
        workdir = Workdir.open(folder, cfg)
        run = run_lib.open_run(cfg, workdir)
        trained = weights.load_params(run, "grpo")
        base_params = jax.device_get(weights.load_params(run, "base"))
        workdir.close()
    policy = hub.load_decoder(folder / "export" / "grpo")
    jax.tree.map(np.testing.assert_array_equal, policy.params, jax.device_get(trained))
    moved = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), policy.params, base_params)
    assert min(jax.tree.leaves(moved)) > 1e-4  # every leaf learns


def test_the_adapter_alone_is_what_the_stages_added(base: Path) -> None:
    folder = whole.finished(base, "lora")
    start = hub.load_decoder(base / "cache" / "assets" / "tiny-decoder-v1")
    adapter = hub.load_adapter(start, folder / "export" / "grpo-adapter")
    assert (adapter.rank, adapter.alpha, adapter.dropout) == (8, 16.0, 0.1)  # of two stages
    ours = make_adapter.merged(start, adapter).params
    theirs = hub.load_decoder(folder / "export" / "grpo").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ours, theirs)
    card = (folder / "export" / "grpo-adapter" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "this adapter, rank 8, is sft + grpo" in card


def test_a_run_can_start_from_an_adapter(base: Path) -> None:
    given = whole.finished(base, "lora") / "export" / "sft-adapter"
    cfg = whole.lora_config()
    cfg.stages, cfg.export.arms = ("sft", "export"), ("sft",)
    cfg.model.lora.path = str(given)
    cfg.sft.max_steps, cfg.sft.optimizer.learning_rate = 1, 1e-9
    with whole.machine(base):
        main.train(cfg, str(base / "started"))
    before, after = (
        load_file(f / "adapter_model.safetensors")
        for f in (given, base / "started" / "export" / "sft-adapter")
    )
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], tensor, atol=1e-8)
    assert any(not np.array_equal(after[name], before[name]) for name in before)


# Resuming


class Interrupted(Exception):
    pass


@contextmanager
def stages_called(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the stages' functions that `train` calls."""
    called: list[str] = []
    for module in (sft, grpo, evaluate, export):
        name = f"run_{module.__name__.rsplit('.', 1)[-1]}"
        original = getattr(module, name)

        def stage(*args: object, name: str = name, original=original) -> None:
            called.append(name.removeprefix("run_"))
            original(*args)

        patch.setattr(module, name, stage)
    yield called


def attempt(base: Path, workdir: Path, cfg: Config, stop_at: tuple[str, int] | None) -> list[str]:
    """Trains until that step's metrics are written but its checkpoint is not; the stages called."""
    write = MetricWriter.write

    def stopping(self: MetricWriter, stage: str, step: int, metrics: dict) -> None:
        write(self, stage, step, metrics)
        if (stage, step) == stop_at:
            raise Interrupted

    with whole.machine(base) as patch, stages_called(patch) as called:
        patch.setattr(MetricWriter, "write", stopping)
        if stop_at is None:
            main.train(cfg, str(workdir))
        else:
            with pytest.raises(Interrupted):
                main.train(cfg, str(workdir))
    return called


@pytest.mark.parametrize("name", ["short", "lora"])
def test_an_interrupted_run_ends_as_the_unbroken_one(base: Path, name: str) -> None:
    unbroken = whole.finished(base, name)
    cfg = {"short": whole.short_config, "lora": whole.lora_config}[name]()
    folder = base / f"{name}-interrupted"
    after = list(cfg.stages[2:])
    assert attempt(base, folder, cfg, ("sft", 2)) == ["sft"]
    assert attempt(base, folder, cfg, ("grpo", 2)) == ["sft", "grpo"]
    assert attempt(base, folder, cfg, None) == ["grpo", *after]
    if name == "short":
        assert attempt(base, folder, cfg, None) == []  # all is done
    for stage in ("sft", "grpo"):
        for step in ("2", "3"):
            ours, theirs = (
                checkpoint(f / "checkpoints" / stage / step) for f in (folder, unbroken)
            )
            assert ours == theirs and len(ours["leaves"]) > 10
        files = [f / "export" / stage / "model.safetensors" for f in (folder, unbroken)]
        assert files[0].read_bytes() == files[1].read_bytes()
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read_rows(folder / file) == read_rows(unbroken / file)
    for file in (unbroken / "evaluation").glob("*.json"):
        found = [json.loads((f / "evaluation" / file.name).read_text()) for f in (folder, unbroken)]
        times = {"seconds": 0, "cost": 0}
        assert found[0] | times == found[1] | times


def test_a_run_with_another_config_is_refused(base: Path) -> None:
    folder, cfg = whole.finished(base, "short"), whole.short_config()
    before = (folder / "config.json").read_bytes()
    cfg.grpo.beta = 0.5
    with whole.machine(base), pytest.raises(ValueError, match=r"grpo\.beta: was 0\.\d+, now 0\.5"):
        main.train(cfg, str(folder))
    assert (folder / "config.json").read_bytes() == before


def test_a_recovery_can_follow_a_finished_run(base: Path) -> None:
    """A stage added at the end starts from GRPO's result and leaves the earlier stages alone."""
    folder = base / "lora-recovered"
    shutil.copytree(whole.finished(base, "lora"), folder)
    cfg = whole.lora_config()
    cfg.stages = ("sft", "grpo", "recover", "export")
    cfg.recover.sft = dataclasses.replace(cfg.sft, max_steps=2)
    cfg.export.arms = ("recover",)
    before = read_rows(folder / "metrics.jsonl")
    assert attempt(base, folder, cfg, None) == ["sft", "export"]  # recover is run_sft's too
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[: len(before)] == before
    assert [(row["stage"], row["step"]) for row in rows[len(before) :]] == [
        ("recover", 1),
        ("recover", 2),
    ]
    grpo_, recovered = (
        load_file(folder / "export" / arm / "model.safetensors") for arm in ("grpo", "recover")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    assert 0 < np.abs(grpo_[name] - recovered[name]).max() < 0.1


# Learning


def test_off_policy_updates_are_counted_and_clipped(base: Path) -> None:
    """Two passes over two minibatches a rollout: four optimizer steps a step of the loop."""
    folder = whole.finished(base, "lora")
    saved = checkpoint(folder / "checkpoints" / "grpo" / "3")
    assert saved["aux"]["loop_step"] == 3 and saved["aux"]["tau"] == 0.1
    assert saved["leaves"]["step"][-1] == 3 * 4  # the checksum of a lone integer is itself
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["stage"] == "grpo"]
    rates = [row["learning_rate"] for row in rows]  # linear, over 12 optimizer steps
    peak = whole.lora_config().grpo.optimizer.learning_rate
    assert rates == pytest.approx([peak, peak * 2 / 3, peak / 3])
    assert all(0 < row["clip_ratio/region_mean"] <= 1 for row in rows)
    terms = {"semantic", "language", "length", "repetition"}
    assert {f"rewards/{term}/std" for term in terms} <= rows[0].keys()


def test_lora_leaves_everything_else_alone(base: Path) -> None:
    folder = whole.finished(base, "lora")
    start = load_file(base / "cache" / "assets" / "tiny-decoder-v1" / "model.safetensors")
    trained = load_file(folder / "export" / "grpo" / "model.safetensors")
    for name, before in start.items():
        changed = not np.array_equal(before, trained[name])
        assert changed == ("_proj" in name), name


@contextmanager
def compilations(patch: pytest.MonkeyPatch) -> Iterator[dict[tuple[str, int], int]]:
    """(stage, step) -> programs compiled, or taken from the cache, until its row was written."""
    events: list[float] = []
    counts: dict[tuple[str, int], int] = {}
    write = MetricWriter.write

    def listen(name: str, seconds: float, **details: object) -> None:
        if name.endswith("backend_compile_duration"):
            events.append(seconds)

    def counting(self: MetricWriter, stage: str, step: int, metrics: dict) -> None:
        counts[stage, step] = len(events)
        write(self, stage, step, metrics)

    patch.setattr(MetricWriter, "write", counting)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counts
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_sft_and_then_grpo_learn_and_no_later_step_compiles(base: Path) -> None:
    cfg = whole.short_config()
    cfg.sft.max_steps, cfg.grpo.max_steps = 25, 15
    cfg.checkpoint.every = cfg.log.samples_every = 100
    with whole.machine(base) as patch, compilations(patch) as compiled:
        main.train(cfg, str(base / "learnt"))
    for stage, last in (("sft", 24), ("grpo", 14)):  # the very last step also measures on dev
        assert 0 < compiled[stage, 1] <= compiled[stage, 2] == compiled[stage, last]
    rows = read_rows(base / "learnt" / "metrics.jsonl")
    reward = [row["reward"] for row in rows if row["stage"] == "grpo"]
    assert np.mean(reward[-3:]) > np.mean(reward[:3]) + 0.1
    similarity = {}
    for arm in ("base", "sft"):
        found = json.loads((base / "learnt" / "evaluation" / f"{arm}.json").read_text())
        similarity[arm] = found["target"]["similarity"]["value"]
    assert similarity["sft"] > similarity["base"] + 0.1


# Sharding, divergence


def test_eight_devices_compute_what_one_does(base: Path) -> None:
    one = whole.finished(base, "short")
    cfg = whole.short_config()
    cfg.stages = ("sft", "grpo", "export")
    cfg.mesh.data = cfg.mesh.fsdp = cfg.mesh.tensor = 2
    with whole.machine(base, devices=8):
        main.train(cfg, str(base / "eight"))
    eight = base / "eight"
    recorded = json.loads((eight / "config.json").read_text())["mesh"]
    assert recorded == {"data": 2, "fsdp": 2, "tensor": 2, "reason": "as configured"}
    texts = [[row["completion"] for row in read_rows(f / "samples.jsonl")] for f in (one, eight)]
    assert texts[0] == texts[1]
    for ours, theirs in zip(*(read_rows(f / "metrics.jsonl") for f in (eight, one)), strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_divergence_stops_the_run_and_earlier_checkpoints_stay(base: Path) -> None:
    cfg = whole.short_config()
    cfg.stages = ("sft",)
    cfg.sft.optimizer.learning_rate = 1e30
    folder = base / "diverged"
    messages = []
    for _ in range(2):  # the second time from the checkpoint of step 1, which must be whole
        with whole.machine(base), pytest.raises(FloatingPointError) as error:
            main.train(cfg, str(folder))
        messages.append(str(error.value))
        assert [p.name for p in (folder / "checkpoints" / "sft").iterdir()] == ["1"]
        assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1]
    assert messages[0] == messages[1]
    assert messages[0].startswith("sft, step 2: loss and grad_norm not finite, training rows [")
    rows = json.loads(messages[0][messages[0].index("[") : messages[0].index("]") + 1])
    assert len(rows) == cfg.sft.batch_size
