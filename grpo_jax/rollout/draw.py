"""Drawing one token a row from logits, and its log-probability.

Every truncation (top-k, top-p, min-p) keeps the tokens whose probability reaches some threshold, so
warping is finding a threshold and nothing is ever sorted. The draw itself is an inverse CDF in two
levels, blocks and then tokens, which touches the vocabulary twice and needs two uniforms a row
(one float32 uniform cannot resolve probabilities below 1e-7; a second inside the block can).
"""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import Sampling
from grpo_jax.models.layers import Array, even

BLOCK = 256  # tokens a block of the two-level search
BISECTIONS = 24  # halvings of the range of log-probabilities: 30 / 2^24 is float32's own resolution
LOWEST = -30.0  # log of the smallest probability, relative to the largest, that top-p can keep


def draw(logits: Array, uniforms: Array, sampling: Sampling) -> tuple[Array, Array]:
    """One token a row.

    Args:
      logits: float32 [R, V].
      uniforms: float32 [R, 2] in [0, 1); not read when temperature = 0.
      sampling: temperature (0 means greedy), top_k, top_p and min_p, applied in that order as
        transformers applies its warpers.

    Returns:
      tokens int32 [R] and their log-probs float32 [R] under softmax(logits / temperature), before
      truncation: the probability that the update's ratio is about. Greedy: under softmax(logits).
    """
    chex.assert_rank([logits, uniforms], 2)
    scores = logits if sampling.temperature == 0 else logits / sampling.temperature
    scores = scores - jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores)
    log_normaliser = jnp.log(jnp.sum(weights, axis=-1))
    if sampling.temperature == 0:
        tokens = _argmax(scores)
    else:
        keep = threshold(weights, sampling)
        if keep is not None:
            weights = jnp.where(weights >= keep[:, None], weights, 0.0)
        tokens = _inverse_cdf(weights, uniforms)
    logps = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0] - log_normaliser
    return tokens, logps


def draw_apart(
    logits: Array, uniforms: Array, sampling: Sampling, rows: NamedSharding | None
) -> tuple[Array, Array]:
    """`draw` on a mesh: each device has all logits of a part of the rows.

    Logits come to be split by rows and, along the mesh's other axes, by vocabulary. Searching them
    there would take an exchange for each step of the search; this takes one for all, in which no
    device is sent more than it sends.

    Args:
      logits, uniforms, sampling: as for `draw`.
      rows: how the first axis is split; None: not at all. Where rows or vocabulary do not divide
        by the devices, the compiler finds its own way.
    """
    if rows is None:
        return draw(logits, uniforms, sampling)
    mesh, split = rows.mesh, rows.spec[0]
    others = tuple(n for n in mesh.axis_names if n not in split and mesh.shape[n] > 1)
    parts = PartitionSpec(split, others)
    wanted = (parts, PartitionSpec((*split, *others)))
    if not others or not all(even(logits.shape, NamedSharding(mesh, spec)) for spec in wanted):
        return draw(logits, uniforms, sampling)

    def share(logits: Array, uniforms: Array) -> Any:
        logits = jax.lax.all_to_all(logits, others, 0, 1, tiled=True)
        first = jax.lax.axis_index(others) * logits.shape[0]
        uniforms = jax.lax.dynamic_slice_in_dim(uniforms, first, logits.shape[0])
        return jax.lax.all_gather(draw(logits, uniforms, sampling), others, tiled=True)

    return jax.shard_map(
        share, mesh=mesh, in_specs=(parts, rows.spec), out_specs=rows.spec, check_vma=False
    )(logits, uniforms)


def threshold(weights: Array, sampling: Sampling) -> Array | None:
    """The smallest weight that survives truncation.

    Args:
      weights: float32 [R, V], probabilities relative to the largest, which is 1 in every row.
      sampling: which truncations.

    Returns:
      float32 [R], or None when nothing is truncated.
    """
    keep = None
    vocab_size = weights.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        keep = jax.lax.top_k(weights, sampling.top_k)[0][:, -1]
        weights = jnp.where(weights >= keep[:, None], weights, 0.0)
    if sampling.top_p < 1.0:
        nucleus = _nucleus(weights, sampling.top_p)
        keep = nucleus if keep is None else jnp.maximum(keep, nucleus)
    if sampling.min_p > 0.0:
        floor = jnp.full(weights.shape[:1], sampling.min_p, weights.dtype)
        keep = floor if keep is None else jnp.maximum(keep, floor)
    return keep


def _nucleus(weights: Array, top_p: float) -> Array:
    """The largest threshold whose survivors hold at least top_p of the mass (arXiv 1904.09751)."""
    wanted = top_p * jnp.sum(weights, axis=-1)

    def enough(floor: Array) -> Array:
        return jnp.sum(jnp.where(weights >= floor[:, None], weights, 0.0), axis=-1) >= wanted

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # logarithms; enough(exp(low)) always
        middle = 0.5 * (low + high)
        holds = enough(jnp.exp(middle))
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = jnp.full(wanted.shape, LOWEST, weights.dtype)
    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (low, jnp.zeros_like(low)))
    # If the top token alone suffices, `high` never moved from 0 and is itself the answer.
    return jnp.where(enough(jnp.ones_like(low)), 1.0, jnp.exp(low))


def _blocks(x: Array, fill: float) -> Array:
    """[R, V] -> [R, V / BLOCK, BLOCK], the tail filled."""
    rows, vocab_size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -vocab_size % BLOCK)), constant_values=fill)
    return x.reshape(rows, -1, BLOCK)


def _argmax(scores: Array) -> Array:
    blocks = _blocks(scores, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + jnp.argmax(inside, axis=-1)).astype(jnp.int32)


def _inverse_cdf(weights: Array, uniforms: Array) -> Array:
    """int32 [R]: index i with probability weights[:, i] / sum, never one of weight 0."""
    blocks = _blocks(weights, 0.0)
    block = _pick(jnp.sum(blocks, axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return (block * BLOCK + _pick(inside, uniforms[:, 1])).astype(jnp.int32)


def _pick(weights: Array, uniform: Array) -> Array:
    """The first index of positive weight at which the running sum exceeds uniform * total."""
    running = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    hit = positive & (running > uniform[:, None] * running[:, -1:])
    # Rounding can leave no hit when uniform is next to 1: then it is the last positive index.
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)
