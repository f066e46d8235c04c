"""Token vectors -> one vector a text, in the ways of sentence-transformers' Pooling module."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from grpo_jax.structs import Array

POOLING = ("mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")


def pool(hidden: jax.Array, lengths: Array, modes: tuple[str, ...], skip: int = 0) -> jax.Array:
    """Pool each row's tokens from `skip` on, and concatenate the results of all modes.

    mean: sum / count. mean_sqrt_len_tokens: sum / sqrt(count). weightedmean: token t weighs t + 1,
    counted from the start of the row. cls: the first token. lasttoken: the last one. A row without
    a token to pool gives zeros.

    Args:
      hidden: [B, S, D], padded on the right.
      lengths: int32 [B].
      modes: of POOLING.
      skip: tokens at the start that are not pooled: a prompt.

    Returns:
      float32 [B, D * number of modes].
    """
    chex.assert_rank([hidden, lengths], [3, 1])
    places = jnp.arange(hidden.shape[1])
    mask = (places >= skip) & (places < lengths[:, None])  # bool [B, S]
    hidden = jnp.where(mask[..., None], hidden.astype(jnp.float32), 0.0)
    return jnp.concatenate([_pool(hidden, mask, mode) for mode in modes], axis=-1)


def _pool(hidden: jax.Array, mask: jax.Array, mode: str) -> jax.Array:
    if mode == "max":
        lowest = jnp.where(mask.any(axis=1, keepdims=True), -jnp.inf, 0.0)
        return jnp.max(jnp.where(mask[..., None], hidden, lowest[..., None]), axis=1)
    places = jnp.arange(hidden.shape[1])
    if mode in ("cls", "lasttoken"):
        end = jnp.where(mask, places, len(places) if mode == "cls" else -1)
        place = end.min(axis=1) if mode == "cls" else end.max(axis=1)
        weights = (places == place[:, None]).astype(jnp.float32)
    else:
        weights = mask * (places + 1.0 if mode == "weightedmean" else 1.0)
        total = jnp.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
        weights = weights / (jnp.sqrt(total) if mode == "mean_sqrt_len_tokens" else total)
    return jnp.einsum("BS,BSD->BD", weights, hidden, precision=jax.lax.Precision.HIGHEST)
