"""What keeps a GRPO stage on its way: the forgetting budget, and the trouble that may end it."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import GRPO
from grpo_jax.infra import distributed
from grpo_jax.stages.health import Health

_log = logging.getLogger(__name__)

PATIENCE = 3  # measurements outside the budget, one after another, that end a stage


@dataclasses.dataclass
class Budget:
    """Holds forgetting inside a budget by moving beta, or says that it cannot be held.

    After PPO's adaptive penalty (arXiv 1707.06347, section 4): beta doubles above 0.8 of the budget
    and halves below 0.4 of it, but never falls below the configured beta.
    """

    limit: float  # nats a token
    lowest: float  # the configured beta
    beta: float
    over: int = 0  # measurements outside the budget, up to now, one after another

    def observe(self, kl: float) -> bool:
        """Takes one measurement in; False when the stage has to end."""
        if kl > 0.8 * self.limit:
            self.beta *= 2
        elif kl < 0.4 * self.limit:
            self.beta = max(self.lowest, self.beta / 2)
        self.over = self.over + 1 if kl > self.limit else 0
        return self.over < PATIENCE

    def score(self, kl: float, reward: float) -> float:
        """The dev reward of a model inside the budget; below 0, the further outside the lower."""
        return reward if kl <= self.limit else self.limit - kl


class Guard:
    """Watches a stage and says when to stop; all it knows is in `aux`, so that resuming is exact.

    Args:
      cfg: its forgetting_budget, beta and stop_on.
      aux: of the checkpoint that the stage goes on from, or {}.
    """

    def __init__(self, cfg: GRPO, aux: dict[str, Any]):
        known = aux.get("guard", {})
        self._health = Health(known.get("health"))
        self._stop_on = cfg.stop_on
        self.stopped: str = known.get("stopped", "")  # why, in words; '' while it goes on
        self.budget: Budget | None = None
        if cfg.forgetting_budget is not None:
            beta, over = known.get("beta", cfg.beta), known.get("over", 0)
            self.budget = Budget(cfg.forgetting_budget, cfg.beta, beta, over)

    def aux(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""
        found: dict[str, Any] = {"health": self._health.state()}
        if self.stopped:
            found["stopped"] = self.stopped
        if self.budget:
            found |= {"beta": self.budget.beta, "over": self.budget.over}
        return {"guard": found}

    def beta(self, shape: tuple[int, ...]) -> jax.Array | None:
        """The KL's weight now, float32 [P, G]; None where it stays as configured."""
        return jnp.full(shape, self.budget.beta, jnp.float32) if self.budget else None

    def observe(self, step: int, metrics: dict[str, float]) -> None:
        """Takes a step's metrics in, says what is worth saying, and notes the beta it ran with."""
        for complaint in self._health.observe(step, metrics):
            _log.warning("step %d: %s", step, complaint)
        if self.budget:
            metrics["beta"] = self.budget.beta
        kinds = self._health.stopping(self._stop_on)
        if self._stop_on and distributed.agreed(bool(kinds)):
            self._stop(step, f"stop_on: {', '.join(kinds) or 'the first process says so'}")

    def score(self, step: int, metrics: dict[str, float]) -> float:
        """The score of a measured step: its dev reward, unless it is outside the budget."""
        reward = metrics["eval/reward"]
        if not self.budget:
            return reward
        kl = metrics["forgetting/kl"]
        if not self.budget.observe(kl):
            self._stop(step, f"forgetting {kl:.4f} stays above the budget {self.budget.limit:g}")
        return self.budget.score(kl, reward)

    def _stop(self, step: int, why: str) -> None:
        if not self.stopped:
            _log.warning("step %d: the stage ends here (%s); its best checkpoint counts", step, why)
        self.stopped = self.stopped or why
