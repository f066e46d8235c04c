"""What people should be told about a GRPO run while it goes on: metrics in, sentences out."""

from __future__ import annotations

import logging

FLAT_GROUPS = 0.5  # share of groups without spread, from which most sampling is for nothing
CUT_OFF = 0.5  # share of completions that never ended
FAR = 1.0  # nats a token from the reference
DRIFT = 0.1  # nats between the sampler's log-probs and the update's


_log = logging.getLogger(__name__)


def warn(step: int, metrics: dict[str, float], said: set[str]) -> None:
    """Logs the complaints about a step whose kinds are not in `said`, and adds them there."""
    found = complaints(metrics)
    for kind in found.keys() - said:
        _log.warning("step %d: %s", step, found[kind])
    said.update(found)


def complaints(metrics: dict[str, float]) -> dict[str, str]:
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
    if metrics.get("kl", 0.0) > FAR:
        found["kl"] = (
            f"kl is {metrics['kl']:.2f} nats a token: the policy has left its reference; lower the "
            "learning rate or raise beta"
        )
    if metrics["sampling/sampling_logp_difference/mean"] > DRIFT:
        found["drift"] = (
            "the sampler's and the update's log-probs differ by "
            f"{metrics['sampling/sampling_logp_difference/mean']:.2f} nats a token on average: "
            "try model.dtype = float32"
        )
    return found
