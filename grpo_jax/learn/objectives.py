"""Losses over per-token log-probs, by the names the field uses (TRL's, checked against it).

A loss is a sum of per-token losses times per-token weights; the weights carry the normalisation
and are known before any gradient is taken, so accumulating micro-batches gives exactly the
unaccumulated loss (bnpo excepted, which is defined on the micro-batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.config import GRPO
from grpo_jax.structs import Array, TrainBatch


class Stats(NamedTuple):
    """Metrics of some tokens: parts of a token mean, to be added up, and maxima, at least 0."""

    means: dict[str, jax.Array]  # float32 [] each
    maxima: dict[str, jax.Array]  # float32 [] each


class Tokens(NamedTuple):
    """What a loss needs to know of each token beside its log-prob; one shape for all."""

    mask: Array  # bool
    weights: Array  # float32, of `token_weights`
    shares: Array  # float32, mask / number of tokens in all micro-batches
    advantages: Array  # float32
    old_logps: Array | None = None  # float32
    ref_logps: Array | None = None  # float32
    beta: Array | None = None  # float32


# (logps, entropy, tokens) -> the loss of these tokens, float32 [], and their Stats.
LossFn = Callable[[Array, Array, Tokens], tuple[jax.Array, Stats]]


class Loss(NamedTuple):
    """A loss function, and whether it is a sum of functions of one token each.

    Such a loss may be taken on any part of the tokens, in any shape, and added up.
    """

    fn: LossFn
    by_token: bool


def tokens_of(batch: TrainBatch, weights: Array, shares: Array) -> Tokens:
    """A batch's completion tokens, arrays [P, G, T]; weights and shares of `token_weights`."""

    def spread(rows: Array) -> Array:
        return jnp.broadcast_to(rows[..., None], batch.mask.shape)

    beta = None if batch.beta is None else spread(batch.beta)
    old, ref = batch.old_logps, batch.ref_logps
    return Tokens(batch.mask, weights, shares, spread(batch.advantages), old, ref, beta)


def token_weights(mask: Array, loss_type: str, max_completion_length: int) -> Array:
    """The weight of each token's loss.

    Args:
      mask: bool [A, P, G, T], A micro-batches.
      loss_type: "grpo": mean over rows of the row's token mean (arXiv 2402.03300). "dapo": mean
        over all tokens of all micro-batches (arXiv 2503.14476). "dr_grpo": sum / (rows *
        max_completion_length) (arXiv 2503.20783). "bnpo": mean over the micro-batch's tokens,
        then over micro-batches.
      max_completion_length: the configured limit, whatever the padding.

    Returns:
      float32 [A, P, G, T], 0 where masked.
    """
    weights = mask.astype(jnp.float32)
    A, P, G, _ = mask.shape
    if loss_type == "grpo":
        return weights / jnp.maximum(weights.sum(-1, keepdims=True), 1.0) / (A * P * G)
    if loss_type == "dr_grpo":
        return weights / (A * P * G * max_completion_length)
    if loss_type == "bnpo":
        return weights / jnp.maximum(weights.sum((1, 2, 3), keepdims=True), 1.0) / A
    return weights / jnp.maximum(weights.sum(), 1.0)  # dapo


def build_sft_loss() -> Loss:
    """Cross-entropy of the completion tokens."""

    def sft_loss(logps: Array, entropy: Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        means = {"entropy": jnp.sum(entropy * tokens.shares)}
        return -jnp.sum(logps * tokens.weights), Stats(means, {})

    return Loss(sft_loss, by_token=True)


def build_grpo_loss(cfg: GRPO, on_policy: bool) -> Loss:
    """The loss of one configuration; `on_policy` says that each rollout is used once."""

    def grpo_loss(logps: Array, entropy: Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        """Clipped surrogate plus beta KL.

        Args:
          logps: float32 [P, G, T], differentiable; where the loss is `by_token`, of any shape.
          entropy: float32, same shape.
          tokens: arrays of that shape.

        Returns:
          the loss, float32 [], and its Stats.
        """
        old = jax.lax.stop_gradient(logps) if on_policy else tokens.old_logps
        assert old is not None, "off-policy updates need the rollout's log-probs"
        advantage = tokens.advantages
        ratio = importance_ratio(logps, old, tokens.mask, cfg.importance_sampling_level)
        low = 1.0 - cfg.epsilon
        high = 1.0 + (cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high)
        bounded = ratio if cfg.delta is None else jnp.minimum(ratio, cfg.delta)
        surrogate = jnp.minimum(bounded * advantage, jnp.clip(ratio, low, high) * advantage)
        if on_policy and cfg.importance_sampling_cap is not None:
            assert tokens.old_logps is not None, "correction needs the sampler's log-probs"
            drawn = importance_ratio(old, tokens.old_logps, tokens.mask, "token")
            surrogate = surrogate * jnp.minimum(drawn, cfg.importance_sampling_cap)
        policy_loss = -jnp.sum(surrogate * tokens.weights)
        loss = policy_loss

        too_low = (ratio < low) & (advantage < 0)
        too_high = (ratio > high) & (advantage > 0)
        means = {
            "entropy": jnp.sum(entropy * tokens.shares),
            "clip_ratio/low": jnp.sum(too_low * tokens.shares),
            "clip_ratio/high": jnp.sum(too_high * tokens.shares),
            "clip_ratio/region": jnp.sum((too_low | too_high) * tokens.shares),
            "policy_loss": policy_loss,
        }
        maxima: dict[str, jax.Array] = {}
        if tokens.old_logps is not None:
            drift = jnp.where(tokens.mask, jnp.abs(logps - tokens.old_logps), 0.0)
            means["sampling/sampling_logp_difference/mean"] = jnp.sum(drift * tokens.shares)
            maxima["sampling/sampling_logp_difference/max"] = jnp.max(drift)
        if tokens.ref_logps is not None:
            # Masked tokens must give 0, not exp of whatever stands there times 0.
            ref_logps = jnp.where(tokens.mask, tokens.ref_logps, logps)
            kl = kl_estimate(logps, ref_logps, cfg.kl_estimator)
            corrected = kl * ratio if cfg.kl_bias_correction else kl
            if tokens.beta is None:
                loss = loss + cfg.beta * jnp.sum(corrected * tokens.weights)
            else:
                loss = loss + jnp.sum(tokens.beta * corrected * tokens.weights)
            means["kl"] = jnp.sum(kl * tokens.shares)
        return loss, Stats(means, maxima)

    return Loss(grpo_loss, by_token=cfg.importance_sampling_level == "token")


def importance_ratio(logps: Array, old: Array, mask: Array, level: str) -> Array:
    """exp(logps - old) a token, or its geometric mean over the row (GSPO, arXiv 2507.18071).

    Returns:
      float32 [P, G, T] or [P, G, 1].
    """
    difference = jnp.where(mask, logps - old, 0.0)
    if level == "sequence":
        length = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
        difference = jnp.sum(difference, axis=-1, keepdims=True) / length
    return jnp.exp(difference)


def kl_estimate(logps: Array, ref_logps: Array, kind: str) -> Array:
    """Per-token estimates of KL(policy || reference) (http://joschu.net/blog/kl-approx.html).

    k1 = log(p / ref) is unbiased, k2 = k1^2 / 2 has low variance, k3 = ref / p - 1 + k1 both and
    is never negative.
    """
    difference = logps - ref_logps
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    return jnp.expm1(-difference) + difference
