"""Per-token log-probabilities through the output head, on a chunk of tokens at a time.

A loss that is a sum over tokens is taken inside the chunk (`loss_of_tokens`), where its gradient is
complete before the logits are gone; the gradient of log-probs that are used otherwise
(`token_logps`) computes each chunk's logits again. Products accumulate in float32 whatever the
compute dtype, because bfloat16 rounding of chunked products biases training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from grpo_jax.learn.chunks import Shares, in_chunks
from grpo_jax.learn.objectives import LossFn, Stats, Tokens
from grpo_jax.models.layers import softcap
from grpo_jax.structs import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def token_logps(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    temperature: float = 1.0,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Log-probs of given tokens, differentiable in `hidden` and `head`, and the entropy.

    Args:
      hidden: [..., D], the state just before each token.
      head: [D, V].
      targets: int32 [...].
      mask: bool [...], the tokens that are asked for; chunks behind the last one cost nothing.
      temperature: logits are divided by it; must be positive.
      cap: the model's final_logit_softcapping.
      rows: how the first axis of hidden and targets is split over devices; None: it is not. The
        vocabulary is split over the mesh's other axes, as far as it divides.

    Returns:
      logps float32 [...] and entropy float32 [...] in nats (no gradient), 0 where masked.
    """
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))

    def chunk(head: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap) / temperature
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        mean_score = jnp.sum(jax.nn.softmax(scores, axis=-1) * scores, axis=-1)
        return _at(scores, targets) - log_normaliser, log_normaliser - mean_score

    return in_chunks(chunk, rows, (head,), mask, hidden, targets)


def _logps_forward(
    hidden: Array, head: Array, targets: Array, mask: Array, *settings: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
    given = (hidden, head, targets, mask)
    return token_logps(*given, *settings), given


def _logps_backward(
    temperature: float,
    cap: float,
    rows: NamedSharding | None,
    given: tuple[Array, Array, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None, None]:
    """The gradient of the log-probs' sum, weighted by what flows back to them."""

    def weighted(logps: Array, entropy: Array, weights: Array) -> tuple[jax.Array, Stats]:
        return jnp.sum(logps * weights), Stats({}, {})

    hidden, head, targets, mask = given
    weights = jnp.where(mask, cotangents[0], 0.0)
    found = _loss_and_flow(hidden, head, targets, mask, weights, weighted, temperature, cap, rows)
    return *found[1], None, None


token_logps.defvjp(_logps_forward, _logps_backward)


def token_choices(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Log-probs of given tokens, and whether each is the likeliest of the vocabulary.

    Args:
      hidden, head, targets, mask, cap, rows: as in `token_logps`.

    Returns:
      float32 [...] in nats, and bool [...]; 0 and False where masked.
    """

    def chunk(head: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap)
        best = jnp.argmax(scores, axis=-1) == targets
        return _at(scores, targets) - jax.nn.logsumexp(scores, axis=-1), best

    return in_chunks(chunk, rows, (head,), mask, hidden, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def loss_of_tokens(
    hidden: Array,
    head: Array,
    targets: Array,
    tokens: Tokens,
    loss_fn: LossFn,
    temperature: float = 1.0,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> tuple[Array, Stats]:
    """A loss that is a sum over tokens, with its gradient in one pass over the logits.

    Equal to `loss_fn(*token_logps(hidden, head, targets, tokens.mask, temperature, cap, rows),
    tokens)`, but each chunk's gradient is taken while its logits are there, so that nothing is
    computed twice.

    Args:
      hidden: [..., D], differentiable.
      head: [D, V], differentiable.
      targets: int32 [...].
      tokens: arrays [...]; what the mask leaves out must cost nothing.
      loss_fn: of an objectives.Loss that is `by_token`.
      temperature, cap, rows: as in `token_logps`.

    Returns:
      the loss, float32 [], and its Stats, which have no gradient.
    """
    return _loss_forward(hidden, head, targets, tokens, loss_fn, temperature, cap, rows)[0]


class _Sums(NamedTuple):
    """What adds up over chunks, and then over devices."""

    loss: Array
    stats: Stats
    table: Array  # float32 [V, D], the head's gradient transposed

    def over(self, axes: tuple[str, ...]) -> _Sums:
        """Of all devices along the axes."""
        maxima = jax.lax.pmax(self.stats.maxima, axes)
        sums = jax.lax.psum(self, axes)
        return sums._replace(stats=sums.stats._replace(maxima=maxima))


def _loss_and_flow(
    hidden: Array,
    head: Array,
    targets: Array,
    mask: Array,
    tokens: Any,
    loss_fn: Callable[..., tuple[jax.Array, Stats]],
    temperature: float,
    cap: float,
    rows: NamedSharding | None,
) -> tuple[tuple[Array, Stats], tuple[Array, Array]]:
    """The loss with its Stats, and its gradients by hidden and head."""
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))
    work = Shares.of(targets.shape, head.shape[1], rows)

    def chunk(table: Array, sums: _Sums, xs: tuple) -> tuple[_Sums, Array]:
        hidden, targets, tokens = xs
        capped = softcap(_matmul("td,vd->tv", hidden, table), cap)
        scores = capped / temperature
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        logps = _at(scores, targets) - log_normaliser
        probs = jnp.exp(scores - log_normaliser[:, None]).astype(hidden.dtype)
        total = jnp.sum(probs, axis=-1, dtype=jnp.float32)  # as rounded, so that they make one
        if cap:
            mean_score = jnp.sum(probs * scores, axis=-1) / total
            by_logit = 1.0 - (capped / cap) ** 2
            probs = (probs * by_logit).astype(hidden.dtype)
            pull = _at(by_logit, targets)[:, None]  # of the target's score by its logit
            drawn = _matmul("tv,vd->td", probs, table) / total[:, None]
        else:  # scores are linear: their mean is the score of the expected row
            pull = jnp.ones((len(targets), 1))
            drawn = _matmul("tv,vd->td", probs, table) / total[:, None]
            mean_score = jnp.sum(drawn * hidden, axis=-1) / temperature
        value = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), slope = value(logps, log_normaliser - mean_score, tokens)
        slope = (slope / temperature)[:, None]
        # The gradient by the scores, slope (1[target] - probs / total), is never written: a row's
        # factors go to the other side of the products, and targets are added by themselves.
        pushed = (slope / total[:, None] * hidden).astype(hidden.dtype)
        to_table = jnp.subtract(sums.table, _matmul("tv,td->vd", probs, pushed))
        to_table = to_table.at[targets].add(slope * pull * hidden)
        means = jax.tree.map(jnp.add, sums.stats.means, stats.means)
        maxima = jax.tree.map(jnp.maximum, sums.stats.maxima, stats.maxima)
        to_hidden = slope * (pull * table[targets] - drawn)
        sums = _Sums(sums.loss + loss, Stats(means, maxima), to_table)
        return sums, to_hidden.astype(hidden.dtype)

    def share(table: Array, xs: tuple) -> tuple[_Sums, Array]:
        chunks = work.chunks(xs[0].shape)
        mask, *xs = jax.tree.map(chunks.split, xs)
        first = jax.tree.map(lambda x: x[0], xs)
        shapes = jax.eval_shape(loss_fn, *([jnp.zeros(first[1].shape)] * 2), first[2])
        loss, stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = _Sums(loss, stats, jnp.zeros(table.shape, jnp.float32))
        sums, to_hidden = chunks.scan(functools.partial(chunk, table), start, xs, mask)
        return sums.over(work.axes), chunks.merge(to_hidden)

    table = head.T.astype(hidden.dtype)  # [V, D], as a tied embedding lies in memory
    sums, to_hidden = work.run(share, table, (mask, hidden, targets, tokens))
    return (sums.loss, sums.stats), (to_hidden, sums.table.T.astype(head.dtype))


def _loss_forward(
    hidden: Array, head: Array, targets: Array, tokens: Tokens, *settings: Any
) -> tuple[tuple[Array, Stats], tuple[Array, Array]]:
    return _loss_and_flow(hidden, head, targets, tokens.mask, tokens, *settings)


def _loss_backward(
    loss_fn: LossFn,
    temperature: float,
    cap: float,
    rows: NamedSharding | None,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, Stats],
) -> tuple[Array, Array, None, None]:
    scale = cotangents[0]
    to_hidden, to_head = (x * scale.astype(x.dtype) for x in gradients)
    return to_hidden, to_head, None, None


loss_of_tokens.defvjp(_loss_forward, _loss_backward)


def forward_kl(
    hidden_p: Array,
    head_p: Array,
    hidden_q: Array,
    head_q: Array,
    mask: Array,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> Array:
    """KL(p || q) over the whole vocabulary at each position; without gradient.

    Args:
      hidden_p, hidden_q: [..., D] states of the two models.
      head_p, head_q: [D, V].
      cap: the models' final_logit_softcapping.
      mask, rows: as in `token_logps`.

    Returns:
      float32 [...] in nats, 0 where masked.
    """

    def chunk(head_p: Array, head_q: Array, hidden_p: Array, hidden_q: Array) -> Array:
        log_p = jax.nn.log_softmax(_scores(hidden_p, head_p, cap), axis=-1)
        log_q = jax.nn.log_softmax(_scores(hidden_q, head_q, cap), axis=-1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return in_chunks(chunk, rows, (head_p, head_q), mask, hidden_p, hidden_q)


def _scores(hidden: Array, head: Array, cap: float) -> Array:
    return softcap(_matmul("td,dv->tv", hidden, head), cap)


def _at(scores: Array, targets: Array) -> Array:
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def _matmul(spec: str, a: Array, b: Array) -> jax.Array:
    """A product that adds up in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
