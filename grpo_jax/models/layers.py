"""Block maths shared by the models: norms, rotary positions, attention over a shared prefix.

Everything here is a pure function or a module that only declares parameters. Norms, softmax and
rotations run in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Array = jax.Array

MASKED = -1e30  # finite, so that a fully masked row stays finite too


class KV(NamedTuple):
    """Keys (already rotated) and values of one layer, head-major: decoding reads them in order."""

    k: Array  # [..., K, S, H]
    v: Array  # [..., K, S, H]


class Linear(nn.Module):
    """y = x W + b, plus the low-rank path x A B where the "lora" collection has one.

    The frozen kernel and the adapter stay separate trees, so gradients reach only the tree that
    the caller differentiates. The adapter comes scaled (models.lora.scaled).
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        y = x @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        if self.has_variable("lora", "lora_a"):
            lora_a: Array = self.get_variable("lora", "lora_a").astype(self.dtype)
            lora_b: Array = self.get_variable("lora", "lora_b").astype(self.dtype)
            dropped = nn.Dropout(self.lora_dropout)(x, deterministic=not self.has_rng("dropout"))
            y = y + (dropped @ lora_a) @ lora_b
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Embed(nn.Module):
    """Token embedding table."""

    num_embeddings: int
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        init = nn.initializers.normal(0.02)
        shape = (self.num_embeddings, self.features)
        embedding = self.param("embedding", init, shape, jnp.float32)
        return embedding[ids].astype(self.dtype)


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotary position embedding (arXiv 2104.09864), halves rotated as Hugging Face stores them.

    Args:
      x: [..., N, H] queries or keys.
      positions: int32 [...], one a token.
      theta: base of the wavelengths.

    Returns:
      [..., N, H], same dtype.
    """
    half = x.shape[-1] // 2
    inverse = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * inverse  # [..., 1, H/2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def attention(q: Array, own: KV, own_mask: Array, prefix: tuple[KV, Array] | None = None) -> Array:
    """Grouped-query attention of G sequences over their own keys and, maybe, one shared prefix.

    The prefix is read once for all G, never repeated: this is what makes a group of completions
    cost one prompt. Both parts go through one softmax.

    Args:
      q: [P, G, T, N, H].
      own: keys and values [P, G, K, U, H]; N is a multiple of K.
      own_mask: bool, broadcastable to [P, G, K, R, T, U] with R = N / K.
      prefix: keys and values [P, K, S, H] and their mask, bool [P, S].

    Returns:
      [P, G, T, N * H] in q's dtype.
    """
    P, G, T, N, H = q.shape
    K = own.k.shape[2]
    q = (q * H**-0.5).reshape(P, G, T, K, N // K, H)
    scores = jnp.einsum("PGTKRH,PGKUH->PGKRTU", q, own.k, preferred_element_type=jnp.float32)
    scores = jnp.where(own_mask, scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if prefix is not None:
        shared, prefix_mask = prefix
        past = jnp.einsum("PGTKRH,PKSH->PGKRTS", q, shared.k, preferred_element_type=jnp.float32)
        past = jnp.where(prefix_mask[:, None, None, None, None], past, MASKED)
        top = jnp.maximum(top, jnp.max(past, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("PGKRTU,PGKUH->PGKRTH", weights.astype(q.dtype), own.v)
    if prefix is not None:
        weights = jnp.exp(past - top)
        total = total + jnp.sum(weights, axis=-1)
        out = out + jnp.einsum("PGKRTS,PKSH->PGKRTH", weights.astype(q.dtype), shared.v)
    out = (out.astype(jnp.float32) / total[..., None]).astype(q.dtype)
    return jnp.moveaxis(out, 4, 2).reshape(P, G, T, N * H)
