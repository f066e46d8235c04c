"""Complaints about a step: each at its condition, each said once."""

from __future__ import annotations

import logging

import pytest

from grpo_jax.stages.health import complaints, warn

GOOD = {
    "frac_reward_zero_std": 0.1,
    "rewards/language/mean": 0.9,
    "completions/clipped_ratio": 0.0,
    "kl": 0.01,
    "sampling/sampling_logp_difference/mean": 1e-5,
}


def test_a_healthy_step_says_nothing() -> None:
    assert complaints(GOOD) == {}
    without_kl = {name: value for name, value in GOOD.items() if name != "kl"}
    assert complaints(without_kl) == {}


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("frac_reward_zero_std", 0.75, "flat", "75% of the groups"),
        ("rewards/language/mean", 0.0, "language", "reward.language"),
        ("completions/clipped_ratio", 1.0, "cut", "max_completion_length"),
        ("kl", 3.0, "kl", "3.00 nats"),
        ("sampling/sampling_logp_difference/mean", 0.5, "drift", "float32"),
    ],
)
def test_each_trouble_has_its_words(name: str, value: float, kind: str, words: str) -> None:
    found = complaints(GOOD | {name: value})
    assert list(found) == [kind] and words in found[kind]


def test_a_complaint_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    said: set[str] = set()
    with caplog.at_level(logging.WARNING, "grpo_jax"):
        for step in (1, 2, 3):
            warn(step, GOOD | {"kl": 3.0}, said)
        warn(4, GOOD | {"kl": 3.0, "frac_reward_zero_std": 1.0}, said)
    assert [record.args[0] for record in caplog.records] == [1, 4]  # type: ignore[index]
