"""Per-token log-probabilities through a chunked output head.

[B, T, V] never exists: the head runs on a chunk of tokens at a time, the fewer the larger the
vocabulary. `token_logps` serves any use and recomputes each chunk's logits in its backward pass. A
loss that is a sum over tokens is taken inside the chunk instead (`loss_of_tokens`), where its
gradient is complete before the logits are gone. Products accumulate in float32 whatever the compute
dtype, because bfloat16 rounding of chunked products biases training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from grpo_jax.learn.objectives import LossFn, Stats, Tokens
from grpo_jax.models.layers import softcap
from grpo_jax.structs import Array

LOGITS = 2**24  # numbers among the logits that exist at one time: 64 MiB


def token_logps(
    hidden: Array, head: Array, targets: Array, temperature: float = 1.0, cap: float = 0.0
) -> tuple[Array, Array]:
    """Log-probs of given tokens, differentiable in `hidden` and `head`, and the entropy.

    Args:
      hidden: [..., D], the state just before each token.
      head: [D, V].
      targets: int32 [...].
      temperature: logits are divided by it; must be positive.
      cap: the model's final_logit_softcapping.

    Returns:
      logps float32 [...] and entropy float32 [...] in nats (no gradient).
    """
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))
    # The gradient of the head adds up over chunks in the dtype that the head has outside of them.
    head = head.astype(jnp.float32)

    def chunk(hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap) / temperature
        log_normaliser = jax.nn.logsumexp(scores, axis=-1)
        chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
        frozen = jax.lax.stop_gradient(scores)
        mean_score = jnp.sum(jax.nn.softmax(frozen, axis=-1) * frozen, axis=-1)
        entropy = jax.lax.stop_gradient(log_normaliser) - mean_score
        return chosen - log_normaliser, entropy

    return _in_chunks(chunk, head.shape[1], hidden, targets)


def token_choices(
    hidden: Array, head: Array, targets: Array, cap: float = 0.0
) -> tuple[Array, Array]:
    """Log-probs of given tokens, and whether each is the likeliest of the vocabulary.

    Args:
      hidden, head, targets, cap: as in `token_logps`.

    Returns:
      float32 [...] in nats, and bool [...].
    """

    def chunk(hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap)
        chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]
        best = jnp.argmax(scores, axis=-1) == targets
        return chosen - jax.nn.logsumexp(scores, axis=-1), best

    return _in_chunks(chunk, head.shape[1], hidden, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def loss_of_tokens(
    hidden: Array,
    head: Array,
    targets: Array,
    tokens: Tokens,
    loss_fn: LossFn,
    temperature: float = 1.0,
    cap: float = 0.0,
) -> tuple[Array, Stats]:
    """A loss that is a sum over tokens, with its gradient in one pass over the logits.

    Equal to `loss_fn(*token_logps(hidden, head, targets, temperature, cap), tokens)`, but each
    chunk's gradient is taken while its logits are there, so that nothing is computed twice.

    Args:
      hidden: [..., D], differentiable.
      head: [D, V], differentiable.
      targets: int32 [...].
      tokens: arrays [...].
      loss_fn: of an objectives.Loss that is `by_token`.
      temperature, cap: as in `token_logps`.

    Returns:
      the loss, float32 [], and its Stats, which have no gradient.
    """
    return _loss_and_flow(hidden, head, targets, tokens, loss_fn, temperature, cap)[0]


class _Sums(NamedTuple):
    """What adds up over chunks."""

    loss: Array
    stats: Stats
    table: Array  # float32 [V, D], the head's gradient transposed


def _loss_and_flow(
    hidden: Array,
    head: Array,
    targets: Array,
    tokens: Tokens,
    loss_fn: LossFn,
    temperature: float,
    cap: float,
) -> tuple[tuple[Array, Stats], tuple[Array, Array]]:
    """The loss with its Stats, and its gradients by hidden and head."""
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))
    table = head.T.astype(hidden.dtype)  # [V, D], as a tied embedding lies in memory

    def chunk(sums: _Sums, xs: tuple[Array, Array, Tokens]) -> tuple[_Sums, Array]:
        hidden, targets, tokens = xs
        capped = softcap(_matmul("td,vd->tv", hidden, table), cap)
        scores = capped / temperature
        log_normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        probs = jnp.exp(scores - log_normaliser)
        chosen = jnp.take_along_axis(scores, targets[:, None], axis=-1)
        logps = (chosen - log_normaliser)[:, 0]
        entropy = log_normaliser[:, 0] - jnp.sum(probs * scores, axis=-1)
        value = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), slope = value(logps, entropy, tokens)
        is_target = jnp.arange(head.shape[1]) == targets[:, None]
        flow = (slope / temperature)[:, None] * (is_target - probs)
        if cap:
            flow = flow * (1.0 - (capped / cap) ** 2)
        flow = flow.astype(hidden.dtype)
        to_table = _matmul("tv,td->vd", flow, hidden)
        means = jax.tree.map(jnp.add, sums.stats.means, stats.means)
        maxima = jax.tree.map(jnp.maximum, sums.stats.maxima, stats.maxima)
        sums = _Sums(sums.loss + loss, Stats(means, maxima), sums.table + to_table)
        return sums, _matmul("tv,vd->td", flow, table).astype(hidden.dtype)

    chunks = _Chunks.of(targets.shape, head.shape[1])
    xs = jax.tree.map(chunks.split, (hidden, targets, tokens))
    first = jax.tree.map(lambda x: x[0], xs)
    shapes = jax.eval_shape(loss_fn, *([jnp.zeros(first[1].shape)] * 2), first[2])
    loss, stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = _Sums(loss, stats, jnp.zeros(table.shape, jnp.float32))
    sums, to_hidden = jax.lax.scan(chunk, start, xs)
    gradients = (chunks.merge(to_hidden), sums.table.T.astype(head.dtype))
    return (sums.loss, sums.stats), gradients


def _loss_backward(
    loss_fn: LossFn,
    temperature: float,
    cap: float,
    gradients: tuple[Array, Array],
    cotangents: tuple[Array, Stats],
) -> tuple[Array, Array, None, None]:
    scale = cotangents[0]
    to_hidden, to_head = (x * scale.astype(x.dtype) for x in gradients)
    return to_hidden, to_head, None, None


loss_of_tokens.defvjp(_loss_and_flow, _loss_backward)


def forward_kl(
    hidden_p: Array, head_p: Array, hidden_q: Array, head_q: Array, cap: float = 0.0
) -> Array:
    """KL(p || q) over the whole vocabulary at each position.

    Args:
      hidden_p, hidden_q: [..., D] states of the two models.
      head_p, head_q: [D, V].
      cap: the models' final_logit_softcapping.

    Returns:
      float32 [...] in nats.
    """

    def chunk(hidden_p: Array, hidden_q: Array) -> Array:
        log_p = jax.nn.log_softmax(_scores(hidden_p, head_p, cap), axis=-1)
        log_q = jax.nn.log_softmax(_scores(hidden_q, head_q, cap), axis=-1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _in_chunks(chunk, head_p.shape[1], hidden_p, hidden_q)


def _scores(hidden: Array, head: Array, cap: float) -> Array:
    # Cast inside the chunk, so that the backward pass casts each chunk's share before adding it.
    return softcap(_matmul("td,dv->tv", hidden, head.astype(hidden.dtype)), cap)


def _matmul(spec: str, a: Array, b: Array) -> jax.Array:
    """A product that adds up in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class _Chunks(NamedTuple):
    """How tokens are dealt out to n chunks whose logits fit LOGITS.

    Chunk i takes tokens i, i + n, i + 2 n ...: the batch is sharded over its first axis, and so
    every device has its share of every chunk.
    """

    lead: tuple[int, ...]  # the leading axes, which are a token's
    n: int

    @classmethod
    def of(cls, lead: tuple[int, ...], vocab_size: int) -> _Chunks:
        return cls(lead, -(-math.prod(lead) // max(1, LOGITS // vocab_size)))

    def split(self, x: Array) -> Array:
        """[*lead, ...] -> [n, tokens / n, ...], padded with zeros."""
        count = math.prod(self.lead)
        x = x.reshape(count, *x.shape[len(self.lead) :])
        x = jnp.pad(x, ((0, -count % self.n), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(x.reshape(-1, self.n, *x.shape[1:]), 1, 0)

    def merge(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
        return x[: math.prod(self.lead)].reshape(*self.lead, *x.shape[1:])


def _in_chunks(fn: Callable[..., Any], vocab_size: int, hidden: Array, *arrays: Array) -> Any:
    """Maps fn over chunks of tokens; the leading axes of all arrays are a token's."""
    chunks = _Chunks.of(hidden.shape[:-1], vocab_size)
    xs = tuple(chunks.split(x) for x in (hidden, *arrays))
    return jax.tree.map(chunks.merge, jax.lax.map(lambda x: jax.checkpoint(fn)(*x), xs))
