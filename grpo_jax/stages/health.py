"""What people should be told about a GRPO run while it goes on: metrics in, sentences out.

Two sorts of trouble. Some show in one step and call for advice (`remarks`). Others, the ways in
which reinforcement learning goes wrong while its reward looks fine, are trends: running means that
move away from where the stage began or from its best. Those may end the stage (`grpo.stop_on`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

# Of one step.
FLAT_GROUPS = 0.5  # share of groups without spread, from which most sampling is for nothing
CUT_OFF = 0.5  # share of completions that never ended
DRIFT = 0.1  # nats between the sampler's log-probs and the update's

# Of running means. A step's metrics are means over some hundred completions of other prompts each
# time, so that one step proves nothing; ten tell a tenth of a rate's range from chance.
MEMORY = 0.9  # weight of the past at each step: a mean over about ten
SETTLED = 10  # steps before which no trend is judged by its start, the running mean they have then
NO_SPREAD = 0.1  # of the highest spread in groups: dividing by the rest amplifies noise
ALL_FLAT = 0.9  # share of groups without spread; what is left does not make a batch
TOO_LONG = 2.0  # times the starting length: the sources stay as long as they were
TOO_SHORT = 0.5  # of the starting length: half of the content cannot be left out
MORE_CUT = 0.25  # rise of the share cut off: lengths grow where their mean is held by the limit
MORE_REPETITION = 0.1  # rise of the repetition term: one completion in ten has become a loop
LESS_LANGUAGE = 0.25  # fall of the language rate below its best; ten times the sampling noise
FAR = 1.0  # nats a token from the reference; an absolute limit, so that no step is too early for it

_TRACKED = {
    "spread": "reward_std",
    "flat": "frac_reward_zero_std",
    "length": "completions/mean_length",
    "cut": "completions/clipped_ratio",
    "repetition": "rewards/repetition/mean",
    "language": "rewards/language/mean",
    "kl": "kl",
}


class Trend(NamedTuple):
    """A metric's course, in numbers that a checkpoint can hold."""

    steps: float = 0.0  # that had the metric
    weighted: float = 0.0  # sum of values, each faded by MEMORY a step
    start: float = 0.0  # the running mean after SETTLED steps
    best: float = 0.0  # the highest running mean since then

    @property
    def now(self) -> float:
        """The running mean: faded values over faded ones, unbiased from the first step (Adam's)."""
        return self.weighted * (1.0 - MEMORY) / (1.0 - MEMORY**self.steps) if self.steps else 0.0

    def after(self, value: float) -> Trend:
        """The course one step on."""
        moved = self._replace(steps=self.steps + 1, weighted=MEMORY * self.weighted + value)
        if moved.steps < SETTLED:
            return moved
        if moved.steps == SETTLED:
            return moved._replace(start=moved.now, best=moved.now)
        return moved._replace(best=max(self.best, moved.now))


class Health:
    """Watches a GRPO stage; every kind of trouble is spoken of once.

    What it says depends on the metrics observed so far and nothing else, and `state` holds all of
    that, so that a resumed stage says, and stops at, what the unbroken one would have.

    Args:
      state: what `state` returned when the stage was interrupted; None at its start.
    """

    def __init__(self, state: Mapping[str, float] | None = None) -> None:
        state = state or {}
        self.said = {
            name.removeprefix("said/"): int(step)
            for name, step in state.items()
            if name.startswith("said/")
        }
        self._trends = {
            name: Trend(*(state.get(f"{name}/{field}", 0.0) for field in Trend._fields))
            for name in _TRACKED
        }

    def state(self) -> dict[str, float]:
        """A few finite numbers by name, JSON-ready: the trends, and at which step what was said."""
        found = {f"said/{kind}": float(step) for kind, step in self.said.items()}
        for name, trend in self._trends.items():
            found |= {f"{name}/{field}": value for field, value in trend._asdict().items()}
        return found

    def observe(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """Takes a step's metrics into account and returns the sentences that are new.

        Args:
          step: of the stage, from 1.
          metrics: a row of metrics.jsonl of stage "grpo". A metric that is missing (kl without a
            reference) or not finite leaves its trend as it was.
        """
        for name, metric in _TRACKED.items():
            value = metrics.get(metric, math.nan)
            if math.isfinite(value):
                self._trends[name] = self._trends[name].after(value)
        found = remarks(metrics) | self._complaints()
        fresh = [kind for kind in found if kind not in self.said]
        self.said |= dict.fromkeys(fresh, step)
        return [found[kind] for kind in fresh]

    def stopping(self, kinds: Iterable[str]) -> list[str]:
        """Those of `kinds` (grpo.stop_on) that have been spoken of, so that the stage should end.

        A process sees its own rows' metrics: where there are several, stop all when one wants to.
        """
        return [kind for kind in kinds if kind in self.said]

    def _complaints(self) -> dict[str, str]:
        """Sentences about the trends, by kind."""
        found = {}
        for kind, (settled, needs, judge) in _JUDGES.items():
            trends = [self._trends[name] for name in needs]
            if all(trend.steps >= settled for trend in trends) and (words := judge(*trends)):
                found[kind] = words
        return found


def remarks(metrics: Mapping[str, float]) -> dict[str, str]:
    """Sentences worth saying about one step, by kind, so that each kind is said once.

    Args:
      metrics: a row of metrics.jsonl of stage "grpo".
    """
    found = {}
    if metrics["frac_reward_zero_std"] > FLAT_GROUPS:
        found["flat"] = (
            f"{metrics['frac_reward_zero_std']:.0%} of the groups have equal rewards and teach "
            "nothing: raise the temperature or num_generations, or lower reward.tau"
        )
    if metrics["rewards/language/mean"] == 0:
        found["language"] = (
            "no completion is in the wanted language: check reward.language, the prompt and the "
            "samples, or lengthen the cold start"
        )
    if metrics["completions/clipped_ratio"] > CUT_OFF:
        found["cut"] = (
            f"{metrics['completions/clipped_ratio']:.0%} of the completions were cut off at "
            "data.max_completion_length: raise it, or train the cold start to stop"
        )
    if metrics["sampling/sampling_logp_difference/mean"] > DRIFT:
        found["drift"] = (
            "the sampler's and the update's log-probs differ by "
            f"{metrics['sampling/sampling_logp_difference/mean']:.2f} nats a token on average: "
            "try model.dtype = float32"
        )
    return found


def _reward_collapse(spread: Trend, flat: Trend) -> str:
    if spread.now < NO_SPREAD * spread.best:
        return (
            f"rewards within a group differ by {spread.now:.3g} only, down from {spread.best:.3g}: "
            "nothing is left to learn from them; stop here, or lower the learning rate and go back "
            "to the best checkpoint"
        )
    if flat.now > ALL_FLAT:
        return (
            f"{flat.now:.0%} of the groups have had equal rewards for about {SETTLED} steps: the "
            "policy stands still; raise the temperature, or lower reward.tau"
        )
    return ""


def _length_explosion(length: Trend, cut: Trend) -> str:
    if length.now > TOO_LONG * length.start:
        grown = f"completions have grown from {length.start:.0f} to {length.now:.0f} tokens"
    elif cut.now > cut.start + MORE_CUT:
        grown = f"{cut.now:.0%} of the completions are cut off, up from {cut.start:.0%}"
    else:
        return ""
    return (
        f"{grown}: the reward pays for saying more; set reward.length_weight and "
        "reward.repetition_weight, and read the samples"
    )


def _length_collapse(length: Trend) -> str:
    if length.now >= TOO_SHORT * length.start:
        return ""
    return (
        f"completions have shrunk from {length.start:.0f} to {length.now:.0f} tokens: the policy "
        "leaves out what it cannot say; set reward.length_weight and reward.min_length_ratio"
    )


def _repetition(repetition: Trend) -> str:
    if repetition.now <= repetition.start + MORE_REPETITION:
        return ""
    return (
        f"completions repeat themselves: the repetition term has risen from {repetition.start:.2f} "
        f"to {repetition.now:.2f}; raise reward.repetition_weight, or lower the learning rate"
    )


def _language_drift(language: Trend) -> str:
    if language.now >= language.best - LESS_LANGUAGE:
        return ""
    return (
        f"{language.now:.0%} of the completions are in the wanted language, down from "
        f"{language.best:.0%}: raise reward.language_weight, or set reward.hard_gate"
    )


def _kl_blowup(kl: Trend) -> str:
    if kl.now <= FAR:
        return ""
    return (
        f"kl is {kl.now:.2f} nats a token: the policy has left its reference; lower the learning "
        "rate or raise beta"
    )


# Kind (config.TROUBLE) -> the steps it waits for, the trends that its judge takes, and the judge.
_JUDGES: dict[str, tuple[int, tuple[str, ...], Callable[..., str]]] = {
    "reward_collapse": (SETTLED, ("spread", "flat"), _reward_collapse),
    "length_explosion": (SETTLED, ("length", "cut"), _length_explosion),
    "length_collapse": (SETTLED, ("length",), _length_collapse),
    "repetition": (SETTLED, ("repetition",), _repetition),
    "language_drift": (SETTLED, ("language",), _language_drift),
    "kl_blowup": (1, ("kl",), _kl_blowup),
}
