"""Steps that are not finite: never in the parameters, left out or the end, and kept for replay."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import config, main, replay
from grpo_jax.config import Config, Lora, Optimizer
from grpo_jax.learn.objectives import build_sft_loss
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import build_update, init_state
from grpo_jax.models.decoder import Decoder
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.stages import exhausted, nonfinite
from grpo_jax.structs import Rewards, TrainBatch
from tests import whole
from tests.test_loop import checkpoint, read_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


# The update


def batch_of(ids: int = 7) -> TrainBatch:
    """Two prompts with a completion each."""
    full = np.full((2, 1, 4), ids, np.int32)
    return TrainBatch(
        prompt_ids=np.full((2, 4), 5, np.int32),
        prompt_lengths=np.full(2, 4, np.int32),
        ids=full,
        mask=np.ones_like(full, bool),
        advantages=np.ones((2, 1), np.float32),
    )


def test_an_update_that_is_not_finite_changes_nothing(tiny: Decoder, tiny_params: dict) -> None:
    optimizer = build_optimizer(Optimizer(learning_rate=1e-2), 10)
    update = build_update(tiny, optimizer, build_sft_loss(), Lora())
    state = init_state(jax.tree.map(jnp.copy, tiny_params), optimizer)
    state, stats = update(state, None, batch_of(), jax.random.key(0))
    assert stats["skipped"] == 0 and state.step == 1

    def broken(value: float) -> TrainBatch:
        """The value reaches the loss through an array, as a bad reward would."""
        return batch_of()._replace(advantages=np.array([[1.0], [value]], np.float32))

    def weighted(logps: jax.Array, entropy: jax.Array, tokens: object) -> tuple:
        loss, stats = build_sft_loss().fn(logps, entropy, tokens)
        return loss + jnp.sum(jnp.exp(tokens.advantages * logps) * tokens.weights), stats

    bad = build_update(tiny, optimizer, build_sft_loss()._replace(fn=weighted), Lora())
    for value in (np.nan, -np.inf, 0.5):
        before = jax.device_get(state)
        state, stats = bad(state, None, broken(value), jax.random.key(0))
        same = jax.tree.map(np.array_equal, before, jax.device_get(state))
        skipped = not np.isfinite(value)
        assert bool(stats["skipped"]) == skipped == (not np.isfinite(stats["loss"]))
        assert all(jax.tree.leaves(same)) == skipped
        assert state.step == (1 if skipped else 2)


def test_a_step_that_overflows_parameters_leaves_them(tiny: Decoder, tiny_params: dict) -> None:
    optimizer = optax.sgd(3e38)
    update = build_update(tiny, optimizer, build_sft_loss(), Lora())
    params = jax.tree.map(jnp.copy, tiny_params)
    state, _ = update(init_state(params, optimizer), None, batch_of(), jax.random.key(0))
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(np.abs(leaf).max() for leaf in leaves) > 1e30  # the others moved


# The run


def run(base: Path, name: str, cfg: Config, bad: dict[int, float] | None = None) -> Path:
    """Trains; the n-th scored rollout of `bad` gets that reward for its completion (1, 2)."""
    score, calls = Scorer.score, [0]

    def scored(self: Scorer, *args: object) -> Rewards:
        rewards = score(self, *args)
        calls[0] += 1
        value = (bad or {}).get(calls[0])
        if value is None or rewards.total.shape[1] == 1:
            return rewards
        return rewards._replace(total=rewards.total.at[1, 2].set(value))

    with whole.machine(base) as patch:
        patch.setattr(Scorer, "score", scored)
        main.train(cfg, str(base / name))
    return base / name


def grpo_config(on_nonfinite: str = "stop") -> Config:
    cfg = whole.short_config()
    cfg.stages, cfg.reward.tau = ("grpo",), 0.1
    cfg.grpo.max_steps, cfg.checkpoint.every = 3, 100
    cfg.on_nonfinite = on_nonfinite
    return cfg


def test_a_bad_reward_stops_the_run_and_can_be_replayed(base: Path) -> None:
    with pytest.raises(FloatingPointError) as stop:
        run(base, "reward-stop", grpo_config(), {2: float("nan")})
    folder = base / "reward-stop"
    message = str(stop.value)
    assert message.startswith("grpo, step 2: loss and grad_norm not finite, training rows [")
    assert f"python -m grpo_jax.replay {folder} grpo-2.npz" in message
    # The state that step 2 began with was saved, though no checkpoint was due.
    assert [path.name for path in (folder / "checkpoints" / "grpo").iterdir()] == ["1"]
    record = json.loads((folder / "nonfinite" / "grpo-2.json").read_text(), parse_constant=int)
    assert record["left_out"] == [0] and record["updates"][0]["loss"] == "nan"
    assert len(record["completions"]) == 16 * 8 and len(record["prompts"]) == 16

    with whole.machine(base):
        words, found = replay.replay(str(folder), "grpo-2.npz")
    assert words == "the parameters that step 2 of grpo began with"
    # With scale_rewards = none, the group's mean carries the NaN to its completions.
    wrong = [f for f, said in zip(found, replay.verdicts(found), strict=True) if said]
    assert [(f.row, f.completion) for f in wrong] == [(record["rows"][1], g) for g in range(8)]
    assert all(np.isnan(f.loss) and np.isnan(f.gradient) and f.bad_logps == 0 for f in wrong)
    fine = [f for f in found if f not in wrong]
    assert len(fine) == 120 and max(f.drift for f in fine) < 1e-3  # exactly these parameters
    lines = replay.table(found, 6).splitlines()
    assert [line.split("<- ")[-1] for line in lines[1:17:2]] == [
        "loss nan, gradient nan, advantage nan"
    ] * 8
    assert lines[-1] == "and 120 more with nothing to say"

    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [1]
    run(base, "reward-stop", grpo_config())  # the reward is fine now: the same command goes on
    unbroken = run(base, "reward-fine", grpo_config())
    ours, theirs = (checkpoint(f / "checkpoints" / "grpo" / "3") for f in (folder, unbroken))
    assert ours == theirs
    assert read_rows(folder / "metrics.jsonl") == read_rows(unbroken / "metrics.jsonl")


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_bad_step_can_be_left_out(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grpo_jax"):
        folder = run(base, "reward-skip", grpo_config("skip"), {2: float("inf")})
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("grpo, step 2: loss and grad_norm not finite; the")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0.0, 1.0, 0.0]
    assert rows[1]["loss"] is None and rows[2]["loss"] is not None
    rates = [row["learning_rate"] for row in rows]
    assert rates[2] == rates[1]  # step 3 is the second that was made
    saved = checkpoint(folder / "checkpoints" / "grpo" / "3")
    assert saved["aux"]["skipped"] == {"updates": 1, "in_a_row": 0}
    assert saved["leaves"]["step"][-1] == 2


def test_too_many_bad_steps_stop_even_then(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "MOST_IN_A_ROW", 2)
    monkeypatch.setattr(nonfinite, "MOST_DUMPS", 1)
    cfg = grpo_config("skip")
    with pytest.raises(FloatingPointError, match="step 3: .*, as in the 1 steps before it"):
        run(base, "reward-many", cfg, {2: float("nan"), 3: float("nan")})
    names = sorted(path.name for path in (base / "reward-many" / "nonfinite").iterdir())
    assert names == ["grpo-2.json", "grpo-2.npz"]
    assert checkpoint(base / "reward-many" / "checkpoints" / "grpo" / "2")["aux"]["loop_step"] == 2


def test_replay_refuses_what_is_no_dump(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such dump"):
        replay.replay(str(tmp_path), "sft-1.npz")
    (tmp_path / "nonfinite").mkdir()
    (tmp_path / "nonfinite" / "sft-1.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "nonfinite" / "sft-1.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: .*not a dump of this program"):
        replay.main([str(tmp_path), "sft-1.npz"])


# Out of memory


def exhausted_error() -> jax.errors.JaxRuntimeError:
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros(1 << 45, jnp.float32).block_until_ready()
    return error.value


@pytest.mark.parametrize(
    ("name", "method", "fields"),
    [
        ("sampling", "grpo", ["grpo.lanes (now 0)", "grpo.prompts_per_step (now 16)"]),
        ("sampling", "self_sft", ["self_sft.prompts_per_step (now 32)"]),
        ("the update", "recover", ["recover.sft.gradient_accumulation_steps (now 1)"]),
        ("the update", "grpo", ["model.remat (now True)", "mesh.fsdp (now 0)"]),
        ("evaluation", "sft", ["evaluation.batch_size (now 32)"]),
        ("scoring", "grpo", ["encoder.batch_size (now 64)", "grpo.gradient_accumulation_steps"]),
        ("loading", "sft", ["model.param_dtype (now float32)"]),
    ],
)
def test_out_of_memory_says_what_to_lower(name: str, method: str, fields: list[str]) -> None:
    with pytest.raises(MemoryError) as error, exhausted.phase(name, config.Config(), method):
        raise exhausted_error()
    message = str(error.value)
    assert message.startswith(f"out of memory in {name}: RESOURCE_EXHAUSTED: Out of memory alloc")
    assert "140737488355328 bytes" in message and all(field in message for field in fields)


def test_other_errors_pass_and_the_inner_phase_counts() -> None:
    cfg = config.Config()
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        exhausted.phase("loading", cfg),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    with pytest.raises(MemoryError, match="in sampling"), exhausted.phase("evaluation", cfg):  # noqa: SIM117
        with exhausted.phase("sampling", cfg):
            raise exhausted_error()


def test_a_run_out_of_memory_ends_in_words(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(self: Scorer, *args: object) -> Rewards:
        raise exhausted_error()

    monkeypatch.setattr(Scorer, "score", score)
    with whole.machine(base), pytest.raises(MemoryError, match="out of memory in scoring: RES"):
        main.train(grpo_config(), str(base / "exhausted"))
