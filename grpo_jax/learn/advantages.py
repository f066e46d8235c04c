"""Advantages of a group of completions of one prompt."""

from __future__ import annotations

import chex
import jax.numpy as jnp

from grpo_jax.structs import Array

EPS = 1e-4  # added to the standard deviation, as TRL does


def advantages(
    total: Array,
    terms: dict[str, Array],
    kind: str = "group",
    scale: str = "group",
    weights: dict[str, float] | None = None,
) -> Array:
    """How much better each completion is than its group.

    Args:
      total: float32 [P, G], the weighted sum of the terms.
      terms: unweighted reward terms, float32 [P, G] each; read by "gdpo" only.
      kind: "group" subtracts the group's mean (GRPO, arXiv 2402.03300); "rloo" the mean of the
        other completions (arXiv 2402.14740); "gdpo" normalises each term within its group, adds
        them up by weight and normalises the sums over the batch (arXiv 2601.05242).
      scale: divide by the standard deviation (ddof = 1) of the "group", of the "batch", or not
        at all ("none", arXiv 2503.20783). "gdpo" has its own scaling and ignores it.
      weights: of the terms, negative for a penalty; read by "gdpo" only, and applied behind the
        normalisation, which would cancel them. None: 1 each.

    Returns:
      float32 [P, G], no gradient. A group without spread gets exactly 0.
    """
    chex.assert_rank(total, 2)
    if kind == "gdpo":
        weights = dict.fromkeys(terms, 1.0) if weights is None else weights
        summed = sum(weights[name] * _normalised(term, "group") for name, term in terms.items())
        centred = summed - jnp.mean(summed)
        flat = jnp.max(jnp.abs(summed), axis=1, keepdims=True) == 0
        return jnp.where(flat, 0.0, centred / (jnp.std(summed, ddof=1) + EPS))
    out = _normalised(total, scale)
    if kind == "rloo":
        # r - mean of the others = G / (G - 1) (r - mean of all)
        size = total.shape[1]
        out = out * size / max(size - 1, 1)
    return out


def _normalised(rewards: Array, scale: str) -> Array:
    mean = jnp.mean(rewards, axis=1, keepdims=True)
    centred = rewards - mean
    # Rounding in the mean must not turn a tie into a signal, least of all divided by EPS.
    tie = jnp.max(rewards, axis=1, keepdims=True) == jnp.min(rewards, axis=1, keepdims=True)
    if scale == "group":
        centred = centred / (jnp.std(rewards, axis=1, ddof=1, keepdims=True) + EPS)
    elif scale == "batch":
        centred = centred / (jnp.std(rewards, ddof=1) + EPS)
    return jnp.where(tie, 0.0, centred)
