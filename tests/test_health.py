"""Guards of a run: each at its condition, said once, and the same after a resume."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest

from grpo_jax.config import TROUBLE
from grpo_jax.stages.health import MEMORY, SETTLED, Health, Trend, remarks

GOOD = {
    "reward_std": 0.3,
    "frac_reward_zero_std": 0.1,
    "rewards/language/mean": 0.9,
    "rewards/repetition/mean": 0.02,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.05,
    "kl": 0.01,
    "sampling/sampling_logp_difference/mean": 1e-5,
}
TROUBLES = [
    ("reward_std", 0.01, "reward_collapse", "down from 0.3"),
    ("frac_reward_zero_std", 0.99, "reward_collapse", "stands still"),
    ("completions/mean_length", 60.0, "length_explosion", "grown from 20 to"),
    ("completions/clipped_ratio", 0.45, "length_explosion", "up from 5%"),
    ("completions/mean_length", 5.0, "length_collapse", "min_length_ratio"),
    ("rewards/repetition/mean", 0.3, "repetition", "risen from 0.02"),
    ("rewards/language/mean", 0.5, "language_drift", "down from 90%"),
    ("kl", 3.0, "kl_blowup", "raise beta"),
]


def test_every_kind_of_trouble_is_tried() -> None:
    assert {kind for _, _, kind, _ in TROUBLES} == set(TROUBLE)


def feed(health: Health, rows: list[dict[str, float]], first: int = 1) -> list[tuple[int, str]]:
    return [(i, words) for i, row in enumerate(rows, first) for words in health.observe(i, row)]


def test_a_healthy_run_says_nothing() -> None:
    draw = random.Random(0)
    rows = [{name: v * draw.uniform(0.85, 1.1) for name, v in GOOD.items()} for _ in range(300)]
    health = Health()
    assert feed(health, rows) == [] and health.stopping(TROUBLE) == []
    without_kl = {name: value for name, value in GOOD.items() if name != "kl"}
    assert feed(Health(), [without_kl] * 50) == []


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("frac_reward_zero_std", 0.75, "flat", "75% of the groups"),
        ("rewards/language/mean", 0.0, "language", "reward.language"),
        ("completions/clipped_ratio", 1.0, "cut", "max_completion_length"),
        ("sampling/sampling_logp_difference/mean", 0.5, "drift", "float32"),
    ],
)
def test_one_step_is_remarked_upon(name: str, value: float, kind: str, words: str) -> None:
    assert remarks(GOOD) == {}
    found = remarks(GOOD | {name: value})
    assert list(found) == [kind] and words in found[kind]
    said = feed(Health(), [GOOD | {name: value}] * 3)
    assert said == [(1, found[kind])]
    assert kind not in TROUBLE  # one step ends no stage


@pytest.mark.parametrize(("name", "value", "kind", "words"), TROUBLES)
def test_a_trend_is_spoken_of_once_and_may_stop(
    name: str, value: float, kind: str, words: str
) -> None:
    health = Health()
    assert feed(health, [GOOD] * 20) == []
    bad = GOOD | {name: value}
    said = [(step, text) for step, text in feed(health, [bad] * 60, 21) if words in text]
    assert len(said) == 1 and said[0][0] > 21  # not at the first step of it
    assert health.said[kind] == said[0][0]
    assert health.stopping(TROUBLE) == [kind] and health.stopping(("kl_blowup",)) == (
        ["kl_blowup"] if kind == "kl_blowup" else []
    )


@pytest.mark.parametrize(("name", "value", "kind", "words"), TROUBLES)
def test_one_bad_step_is_no_trend(name: str, value: float, kind: str, words: str) -> None:
    health = Health()
    feed(health, [GOOD] * 20 + [GOOD | {name: value}] + [GOOD] * 20)
    assert kind not in health.said


def test_what_was_so_from_the_start_is_no_trend_but_kl_has_no_excuse() -> None:
    poor = {"rewards/repetition/mean": 0.4, "rewards/language/mean": 0.3, "reward_std": 0.001}
    assert feed(Health(), [GOOD | poor] * 50) == []
    health = Health()
    feed(health, [GOOD | {"kl": 5.0}])
    assert health.said == {"kl_blowup": 1}
    early = Health()
    feed(early, [GOOD, *[GOOD | {"completions/mean_length": 500.0}] * (SETTLED - 2)])
    assert early.said == {}


def test_the_running_mean_is_adams() -> None:
    values = [random.Random(1).uniform(0, 5) for _ in range(30)]
    trend = Trend()
    for n, value in enumerate(values, 1):
        trend = trend.after(value)
        fade = MEMORY ** np.arange(n)[::-1]
        assert trend.now == pytest.approx(np.average(values[:n], weights=fade))
    fade = MEMORY ** np.arange(SETTLED)[::-1]
    assert trend.start == pytest.approx(np.average(values[:SETTLED], weights=fade))
    assert trend.best >= max(trend.start, trend.now)


def test_a_resumed_stage_says_what_the_unbroken_one_would() -> None:
    draw = random.Random(2)
    rows = [
        {name: v * draw.uniform(0.5, 1.5) * (1 + i / 8) for name, v in GOOD.items()}
        for i in range(80)
    ]
    unbroken = Health()
    said = feed(unbroken, rows)
    assert len(said) > 3
    for at in (0, 1, SETTLED - 1, SETTLED, 33):
        first = Health()
        before = feed(first, rows[:at])
        saved = json.dumps(first.state(), allow_nan=False)
        second = Health(json.loads(saved))
        assert before + feed(second, rows[at:], at + 1) == said
        assert second.state() == unbroken.state() and second.said == unbroken.said


def test_missing_and_broken_metrics_leave_trends_alone() -> None:
    health = Health()
    feed(health, [GOOD] * 15)
    before = {k: v for k, v in health.state().items() if not k.startswith("kl/")}
    broken = GOOD | {name: math.nan for name in GOOD if name != "kl"} | {"kl": 0.5}
    assert feed(health, [broken]) == []
    after = {k: v for k, v in health.state().items() if not k.startswith("kl/")}
    assert before == after
    assert all(map(math.isfinite, health.state().values()))
