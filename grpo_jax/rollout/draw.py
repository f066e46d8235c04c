"""Drawing one token a row from logits, and its log-probability.

The draw is an inverse CDF in two levels, blocks and then tokens, which touches the vocabulary twice
and needs two uniforms a row (one float32 uniform cannot resolve probabilities below 1e-7; a second
inside the block can). Nothing is ever sorted: top-k and min-p are thresholds, and for top-p a token
is drawn and then asked whether it belongs to the nucleus, which takes one more look at the
vocabulary, and a further one whenever it does not.
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
        weights, wanted = truncate(weights, sampling)
        blocks = _blocks(weights, 0.0)
        tokens = _inverse_cdf(blocks, uniforms)
        if wanted is not None:
            tokens = _into_nucleus(blocks, wanted, tokens, uniforms)
    logps = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0] - log_normaliser
    return tokens, logps


def draw_apart(
    logits: Array, uniforms: Array, sampling: Sampling, rows: NamedSharding | None
) -> tuple[Array, Array]:
    """`draw` on a mesh: each device has all logits of a part of the rows, and waits for no other.

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
    parts = PartitionSpec(split, others or None)
    wanted = (parts, PartitionSpec((*split, *others)))
    if not all(even(logits.shape, NamedSharding(mesh, spec)) for spec in wanted):
        return draw(logits, uniforms, sampling)

    def share(logits: Array, uniforms: Array) -> Any:
        if not others:
            return draw(logits, uniforms, sampling)
        logits = jax.lax.all_to_all(logits, others, 0, 1, tiled=True)
        first = jax.lax.axis_index(others) * logits.shape[0]
        uniforms = jax.lax.dynamic_slice_in_dim(uniforms, first, logits.shape[0])
        return jax.lax.all_gather(draw(logits, uniforms, sampling), others, tiled=True)

    return jax.shard_map(
        share, mesh=mesh, in_specs=(parts, rows.spec), out_specs=rows.spec, check_vma=False
    )(logits, uniforms)


def truncate(weights: Array, sampling: Sampling) -> tuple[Array, Array | None]:
    """What top-k and min-p leave, and how much of it the nucleus of top-p must hold.

    Args:
      weights: float32 [R, V], probabilities relative to the largest, which is 1 in every row.
      sampling: which truncations.

    Returns:
      float32 [R, V] with 0 for what is cut off; float32 [R], or None without top-p.
    """
    if 0 < sampling.top_k < weights.shape[-1]:
        least = jax.lax.top_k(weights, sampling.top_k)[0][:, -1:]
        weights = jnp.where(weights >= least, weights, 0.0)
    wanted = sampling.top_p * jnp.sum(weights, axis=-1) if sampling.top_p < 1.0 else None
    if sampling.min_p > 0.0:
        weights = jnp.where(weights >= sampling.min_p, weights, 0.0)
    return weights, wanted


def mass_above(blocks: Array, pivot: Array | float) -> Array:
    """The weight of all tokens that weigh more than the pivot, block by block.

    Args:
      blocks: float32 [R, B, BLOCK].
      pivot: float32 [R, 1, 1].

    Returns:
      float32 [R, B].
    """
    return jnp.sum(jnp.where(blocks > pivot, blocks, 0.0), axis=-1)


def _into_nucleus(blocks: Array, wanted: Array, tokens: Array, uniforms: Array) -> Array:
    """Tokens of the nucleus (arXiv 1904.09751), drawn as often as they weigh.

    The nucleus has the fewest of the heaviest tokens that hold what is wanted, and all of equal
    weight with the last, so a token belongs to it if those above it hold less. If one does not,
    none below it does, and another is drawn from those above.

    Args:
      blocks: float32 [R, B, BLOCK].
      wanted: float32 [R].
      tokens: int32 [R], drawn from all.
      uniforms: float32 [R, 2], with which they were drawn; further ones are made of these.
    """
    bits = jax.lax.bitcast_convert_type(uniforms, jnp.uint32)
    keys = jax.random.wrap_key_data(bits, impl="threefry2x32")
    flat = blocks.reshape(blocks.shape[0], -1)

    def again(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, tokens, _ = state
        pivot = jnp.take_along_axis(flat, tokens[:, None], axis=-1)[:, None]
        above = mass_above(blocks, pivot)
        inside = ~(jnp.sum(above, axis=-1) >= wanted)  # of a row of NaN too, or it never ends
        fresh = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, count), (2,)))(keys)
        others = _inverse_cdf(blocks, fresh, above, pivot)
        return count + 1, jnp.where(inside, tokens, others), jnp.all(inside)

    start = (jnp.zeros((), jnp.int32), tokens, jnp.zeros((), bool))
    return jax.lax.while_loop(lambda state: ~state[-1], again, start)[1]


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


def _inverse_cdf(
    blocks: Array, uniforms: Array, sums: Array | None = None, pivot: Array | float = 0.0
) -> Array:
    """int32 [R]: index i with probability proportional to its weight, if that is above the pivot.

    Args:
      blocks: float32 [R, B, BLOCK].
      uniforms: float32 [R, 2].
      sums: float32 [R, B], of what is above the pivot; None: it is 0, and all is.
      pivot: float32 [R, 1, 1].
    """
    block = _pick(jnp.sum(blocks, axis=-1) if sums is None else sums, uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)
    inside = jnp.where(inside > pivot, inside, 0.0)[:, 0]
    return (block * BLOCK + _pick(inside, uniforms[:, 1])).astype(jnp.int32)


def _pick(weights: Array, uniform: Array) -> Array:
    """The first index of positive weight at which the running sum exceeds uniform * total."""
    running = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    hit = positive & (running > uniform[:, None] * running[:, -1:])
    # Rounding can leave no hit when uniform is next to 1: then it is the last positive index.
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    return jnp.where(jnp.any(hit, axis=-1), jnp.argmax(hit, axis=-1), last)
