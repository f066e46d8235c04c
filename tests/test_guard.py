"""The forgetting budget and the end of a stage that is in trouble."""

from __future__ import annotations

import json

import numpy as np
import pytest

from grpo_jax.config import GRPO
from grpo_jax.stages.guard import PATIENCE, Budget, Guard


def row(**changes: float) -> dict[str, float]:
    """A step's metrics in good health."""
    return {
        "frac_reward_zero_std": 0.0, "rewards/language/mean": 1.0, "rewards/repetition/mean": 0.0,
        "completions/clipped_ratio": 0.0, "completions/mean_length": 20.0, "reward_std": 0.3,
        "sampling/sampling_logp_difference/mean": 0.0, "kl": 0.01,
    } | changes  # fmt: skip


def test_beta_follows_the_budget() -> None:
    """Doubled near the limit, halved far from it, never below the configured one (PPO, sec. 4)."""
    budget = Budget(limit=0.1, lowest=0.02, beta=0.02)
    betas = []
    for kl in (0.05, 0.09, 0.12, 0.06, 0.01, 0.01, 0.01):
        assert budget.observe(kl)
        betas.append(budget.beta)
    assert betas == [0.02, 0.04, 0.08, 0.08, 0.04, 0.02, 0.02]


def test_a_budget_that_cannot_be_held_ends_the_stage() -> None:
    budget = Budget(limit=0.1, lowest=0.02, beta=0.02)
    answers = [budget.observe(kl) for kl in (0.2, 0.2, 0.05, *[0.2] * PATIENCE)]
    assert answers == [True] * 3 + [True] * (PATIENCE - 1) + [False]


@pytest.mark.parametrize(("kl", "reward"), [(0.05, 0.0), (0.1, 2.5), (0.11, 2.5), (3.0, 2.5)])
def test_every_step_inside_the_budget_scores_more_than_any_outside(kl: float, reward: float):
    budget = Budget(limit=0.1, lowest=0.02, beta=0.02)
    score = budget.score(kl, reward)
    assert score == reward if kl <= 0.1 else score < 0
    assert budget.score(kl + 1, reward) < score


def test_a_guard_is_all_in_its_aux() -> None:
    """Interrupted anywhere, it goes on as the unbroken one."""
    cfg = GRPO(forgetting_budget=0.1, beta=0.02, stop_on=("length_explosion",))
    rows = [row(**{"completions/mean_length": 20.0 + 3 * max(0, i - 12)}) for i in range(40)]
    drift = np.linspace(0.0, 0.15, 40)

    def run(until: int, aux: dict) -> Guard:
        guard = Guard(cfg, aux)
        for step in range(aux.get("step", 0), until):
            if guard.stopped:
                break
            guard.observe(step + 1, metrics := dict(rows[step]))
            assert metrics["beta"] == guard.budget.beta  # type: ignore[union-attr]
            guard.score(step + 1, {"eval/reward": 1.0, "forgetting/kl": float(drift[step])})
        return guard

    whole = run(40, {})
    assert "length_explosion" in whole.stopped or "forgetting" in whole.stopped
    for cut in (3, 15, 25):
        aux = json.loads(json.dumps(run(cut, {}).aux())) | {"step": cut}
        assert run(40, aux).aux() == whole.aux()


def test_without_budget_or_kinds_nothing_stops_and_beta_stays_configured() -> None:
    guard = Guard(GRPO(), {})
    for step in range(30):
        guard.observe(step + 1, row(kl=5.0))
    assert not guard.stopped and guard.beta((2, 4)) is None
    assert guard.score(30, {"eval/reward": 1.25}) == 1.25
    assert Guard(GRPO(forgetting_budget=1.0), {}).beta((2, 4)).shape == (2, 4)  # type: ignore[union-attr]
