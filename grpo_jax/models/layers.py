"""Block maths shared by the models: linear layers, norms, attention over a shared prefix.

Everything here is a pure function or a module that only declares parameters. Norms, softmax and
rotations run in float32 whatever the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

Array = jax.Array

MASKED = -1e30  # finite, so that a fully masked row stays finite too


class KV(NamedTuple):
    """Keys (already rotated) and values of one layer, each as decoding multiplies with it."""

    k: Array  # [..., K, H, S]
    v: Array  # [..., K, S, H]


def matmul(x: Array, kernel: Array) -> Array:
    """x [..., in] times kernel [in, out], as one matrix product.

    With the leading axes flat the kernel's gradient is one too. Otherwise XLA transposes what
    flows back element by element, which on CPU takes as long as the products themselves.
    """
    return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)


def matmul_few(
    x: Array, transposed: Array, preferred_element_type: DTypeLike | None = None
) -> jax.Array:
    """x [..., in] times a kernel that is given as [out, in], for few rows on a CPU.

    The kernel is the left factor, which a CPU's product reads as it lies; the right one it packs
    first, and for few rows packing a kernel costs as much as using it. Without the barrier XLA
    turns the product around again.
    """
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(
        transposed, rows, (((1,), (1,)), ((), ())), preferred_element_type=preferred_element_type
    )
    return jax.lax.optimization_barrier(product).T.reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
    """y = x W + b, plus the low-rank path x A B where the "lora" collection has one.

    The frozen kernel and the adapter stay separate trees, so gradients reach only the tree that
    the caller differentiates. The adapter comes scaled (models.lora.scaled). A sampler may give
    "transposed" [out, in] in the place of "kernel" [in, out] (see `matmul_few`).
    """

    features: int
    use_bias: bool = False
    dtype: DTypeLike = jnp.float32
    lora_dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.lecun_normal()
        if self.has_variable("params", "transposed"):
            y = matmul_few(x, self.get_variable("params", "transposed"))
        else:
            kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
            y = matmul(x, kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        if self.has_variable("lora", "lora_a"):
            lora_a: Array = self.get_variable("lora", "lora_a").astype(self.dtype)
            lora_b: Array = self.get_variable("lora", "lora_b").astype(self.dtype)
            dropped = nn.Dropout(self.lora_dropout)(x, deterministic=not self.has_rng("dropout"))
            y = y + matmul(matmul(dropped, lora_a), lora_b)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467); `offset` is added to its weight (Gemma: 1)."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * (scale + self.offset)).astype(x.dtype)


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


def softcap(scores: Array, cap: float) -> Array:
    """cap tanh(scores / cap), which keeps scores within +-cap (Gemma 2); 0 leaves them alone."""
    return cap * jnp.tanh(scores / cap) if cap else scores


def attention(
    q: Array,
    own: KV,
    own_mask: Array,
    prefix: tuple[KV, Array] | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Array:
    """Grouped-query attention of G sequences over their own keys and, maybe, one shared prefix.

    The prefix is read once for all G, never repeated: this is what makes a group of completions
    cost one prompt. Both parts go through one softmax. Products with the prefix come as
    [P, K, G, ...] and are turned afterwards, because einsum would otherwise exchange the factors,
    which a CPU multiplies half as fast.

    Args:
      q: [P, G, T, N, H].
      own: keys [P, G, K, H, U] and values [P, G, K, U, H]; N is a multiple of K.
      own_mask: bool, broadcastable to [P, G, K, R, T, U] with R = N / K.
      prefix: keys [P, K, H, S], values [P, K, S, H] and their mask, bool, broadcastable to
        [P, G, K, R, T, S].
      scale: of the scores; None: H ** -0.5.
      cap: the scores' softcap, 0 for none.

    Returns:
      [P, G, T, N * H] in q's dtype.
    """
    P, G, T, N, H = q.shape
    K = own.k.shape[2]
    q = (q * (H**-0.5 if scale is None else scale)).reshape(P, G, T, K, N // K, H)
    q = jnp.moveaxis(q, 2, 4)
    scores = jnp.einsum("PGKRTH,PGKHU->PGKRTU", q, own.k, preferred_element_type=jnp.float32)
    scores = jnp.where(own_mask, softcap(scores, cap), MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if prefix is not None:
        shared, prefix_mask = prefix
        past = jnp.einsum("PGKRTH,PKHS->PKGRTS", q, shared.k, preferred_element_type=jnp.float32)
        past = jnp.swapaxes(past, 1, 2)
        past = jnp.where(prefix_mask, softcap(past, cap), MASKED)
        top = jnp.maximum(top, jnp.max(past, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum("PGKRTU,PGKUH->PGKRTH", weights.astype(q.dtype), own.v)
    if prefix is not None:
        weights = jnp.exp(past - top)
        total = total + jnp.sum(weights, axis=-1)
        read = jnp.einsum("PGKRTS,PKSH->PKGRTH", weights.astype(q.dtype), shared.v)
        out = out + jnp.swapaxes(read, 1, 2)
    out = (out.astype(jnp.float32) / total[..., None]).astype(q.dtype)
    return jnp.moveaxis(out, 4, 2).reshape(P, G, T, N * H)


def spread(x: Array, rows: jax.sharding.NamedSharding | None) -> Array:
    """x with its first axis split as `rows` says; left alone without it, or where it is uneven.

    Without this the compiler may follow the parameters instead: with their width split over many
    devices, every device then works on all rows of a part of the width.
    """
    if rows is None or not even(x.shape, rows):
        return x
    return jax.lax.with_sharding_constraint(x, rows)


def crosswise(rows: jax.sharding.NamedSharding | None) -> jax.sharding.NamedSharding | None:
    """Of [P, X, D] whose rows are split as `rows` says but for its last axis, which splits D.

    So what is looked up in a table whose width that axis splits comes to be, without the table
    being brought together; from there it is one exchange along that axis to `rows`.
    """
    if rows is None:
        return None
    *axes, last = rows.spec[0]
    return jax.sharding.NamedSharding(rows.mesh, PartitionSpec(tuple(axes), None, last))


def even(shape: tuple[int, ...], sharding: jax.sharding.NamedSharding) -> bool:
    """Whether an array of this shape can be split so."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True
