"""Per-token log-probabilities through a chunked output head.

[B, T, V] never exists: the head runs on a chunk of tokens at a time, the fewer the larger the
vocabulary, and every device on chunks of its own rows. A loss that is a sum over tokens is taken
inside the chunk (`loss_of_tokens`), where its gradient is complete before the logits are gone; the
gradient of log-probs that are used otherwise (`token_logps`) computes each chunk's logits again.
Products accumulate in float32 whatever the compute dtype, because bfloat16 rounding of chunked
products biases training.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.learn.objectives import LossFn, Stats, Tokens
from grpo_jax.models.layers import even, softcap
from grpo_jax.structs import Array

# Numbers among the logits that a device has at one time: 32 MiB or 512 MiB. A product with a
# chunk's tokens reads the whole head, and the head's gradient is read and written once a chunk:
# accelerators need hundreds of tokens to be bound by arithmetic, and caches of CPUs hold megabytes.
LOGITS = {"cpu": 2**23, "gpu": 2**27, "tpu": 2**27}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logps(
    hidden: Array,
    head: Array,
    targets: Array,
    temperature: float = 1.0,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Log-probs of given tokens, differentiable in `hidden` and `head`, and the entropy.

    Args:
      hidden: [..., D], the state just before each token.
      head: [D, V].
      targets: int32 [...].
      temperature: logits are divided by it; must be positive.
      cap: the model's final_logit_softcapping.
      rows: how the first axis of hidden and targets is split over devices; None: it is not. The
        vocabulary is split over the mesh's other axes, as far as it divides.

    Returns:
      logps float32 [...] and entropy float32 [...] in nats (no gradient).
    """
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))

    def chunk(head: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap) / temperature
        shares, log_normaliser = _normalise(scores)
        mean_score = jnp.sum(shares * scores, axis=-1) / jnp.sum(shares, axis=-1)
        return _at(scores, targets) - log_normaliser, log_normaliser - mean_score

    return _in_chunks(chunk, rows, (head,), hidden, targets)


def _logps_forward(
    hidden: Array, head: Array, targets: Array, *settings: Any
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return token_logps(hidden, head, targets, *settings), (hidden, head, targets)


def _logps_backward(
    temperature: float,
    cap: float,
    rows: NamedSharding | None,
    given: tuple[Array, Array, Array],
    cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None]:
    """The gradient of the log-probs' sum, weighted by what flows back to them."""

    def weighted(logps: Array, entropy: Array, weights: Array) -> tuple[jax.Array, Stats]:
        return jnp.sum(logps * weights), Stats({}, {})

    found = _loss_and_flow(*given, cotangents[0], weighted, temperature, cap, rows)[1]
    return *found, None


token_logps.defvjp(_logps_forward, _logps_backward)


def token_choices(
    hidden: Array,
    head: Array,
    targets: Array,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> tuple[Array, Array]:
    """Log-probs of given tokens, and whether each is the likeliest of the vocabulary.

    Args:
      hidden, head, targets, cap, rows: as in `token_logps`.

    Returns:
      float32 [...] in nats, and bool [...].
    """

    def chunk(head: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        scores = _scores(hidden, head, cap)
        best = jnp.argmax(scores, axis=-1) == targets
        return _at(scores, targets) - jax.nn.logsumexp(scores, axis=-1), best

    return _in_chunks(chunk, rows, (head,), hidden, targets)


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

    Equal to `loss_fn(*token_logps(hidden, head, targets, temperature, cap, rows), tokens)`, but
    each chunk's gradient is taken while its logits are there, so that nothing is computed twice.

    Args:
      hidden: [..., D], differentiable.
      head: [D, V], differentiable.
      targets: int32 [...].
      tokens: arrays [...].
      loss_fn: of an objectives.Loss that is `by_token`.
      temperature, cap, rows: as in `token_logps`.

    Returns:
      the loss, float32 [], and its Stats, which have no gradient.
    """
    return _loss_and_flow(hidden, head, targets, tokens, loss_fn, temperature, cap, rows)[0]


class _Sums(NamedTuple):
    """What adds up over chunks, and then over devices."""

    loss: Array
    stats: Stats
    table: Array  # float32 [V, D], the head's gradient transposed


def _loss_and_flow(
    hidden: Array,
    head: Array,
    targets: Array,
    tokens: Any,
    loss_fn: Callable[..., tuple[jax.Array, Stats]],
    temperature: float,
    cap: float,
    rows: NamedSharding | None,
) -> tuple[tuple[Array, Stats], tuple[Array, Array]]:
    """The loss with its Stats, and its gradients by hidden and head."""
    chex.assert_shape(hidden, (*targets.shape, head.shape[0]))
    work = _Shares.of(targets.shape, head.shape[1], rows)

    def chunk(table: Array, sums: _Sums, xs: tuple) -> tuple[_Sums, Array]:
        hidden, targets, tokens = xs
        capped = softcap(_matmul("td,vd->tv", hidden, table), cap)
        scores = capped / temperature
        shares, log_normaliser = _normalise(scores)
        logps = _at(scores, targets) - log_normaliser
        shares = shares.astype(hidden.dtype)
        total = jnp.sum(shares, axis=-1, dtype=jnp.float32)  # as rounded, so that they make one
        if cap:
            mean_score = jnp.sum(shares * scores, axis=-1) / total
            by_logit = 1.0 - (capped / cap) ** 2
            shares = (shares * by_logit).astype(hidden.dtype)
            pull = _at(by_logit, targets)[:, None]  # of the target's score by its logit
            drawn = _matmul("tv,vd->td", shares, table) / total[:, None]
        else:  # scores are linear: their mean is the score of the expected row
            pull = jnp.ones((len(targets), 1))
            drawn = _matmul("tv,vd->td", shares, table) / total[:, None]
            mean_score = jnp.sum(drawn * hidden, axis=-1) / temperature
        value = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), slope = value(logps, log_normaliser - mean_score, tokens)
        slope = (slope / temperature)[:, None]
        # The gradient by the scores, slope (1[target] - shares / total), is never written: a row's
        # factors go to the other side of the products, and targets are added by themselves.
        pushed = (slope / total[:, None] * hidden).astype(hidden.dtype)
        to_table = jnp.subtract(sums.table, _matmul("tv,td->vd", shares, pushed))
        to_table = to_table.at[targets].add(slope * pull * hidden)
        means = jax.tree.map(jnp.add, sums.stats.means, stats.means)
        maxima = jax.tree.map(jnp.maximum, sums.stats.maxima, stats.maxima)
        to_hidden = slope * (pull * table[targets] - drawn)
        sums = _Sums(sums.loss + loss, Stats(means, maxima), to_table)
        return sums, to_hidden.astype(hidden.dtype)

    def share(table: Array, xs: tuple) -> tuple[_Sums, Array]:
        chunks = work.chunks(xs[1].shape)
        xs = jax.tree.map(chunks.split, xs)
        first = jax.tree.map(lambda x: x[0], xs)
        shapes = jax.eval_shape(loss_fn, *([jnp.zeros(first[1].shape)] * 2), first[2])
        loss, stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        start = _Sums(loss, stats, jnp.zeros(table.shape, jnp.float32))
        sums, to_hidden = jax.lax.scan(functools.partial(chunk, table), start, xs)
        return work.together(sums), chunks.merge(to_hidden)

    table = head.T.astype(hidden.dtype)  # [V, D], as a tied embedding lies in memory
    sums, to_hidden = work.run(share, table, (hidden, targets, tokens))
    return (sums.loss, sums.stats), (to_hidden, sums.table.T.astype(head.dtype))


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


loss_of_tokens.defvjp(_loss_and_flow, _loss_backward)


def forward_kl(
    hidden_p: Array,
    head_p: Array,
    hidden_q: Array,
    head_q: Array,
    cap: float = 0.0,
    rows: NamedSharding | None = None,
) -> Array:
    """KL(p || q) over the whole vocabulary at each position.

    Args:
      hidden_p, hidden_q: [..., D] states of the two models.
      head_p, head_q: [D, V].
      cap: the models' final_logit_softcapping.
      rows: as in `token_logps`.

    Returns:
      float32 [...] in nats.
    """

    def chunk(head_p: Array, head_q: Array, hidden_p: Array, hidden_q: Array) -> Array:
        log_p = jax.nn.log_softmax(_scores(hidden_p, head_p, cap), axis=-1)
        log_q = jax.nn.log_softmax(_scores(hidden_q, head_q, cap), axis=-1)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _in_chunks(chunk, rows, (head_p, head_q), hidden_p, hidden_q)


def _scores(hidden: Array, head: Array, cap: float) -> Array:
    return softcap(_matmul("td,dv->tv", hidden, head), cap)


def _normalise(scores: Array) -> tuple[jax.Array, jax.Array]:
    """exp(scores - their maximum), [t, V], and the logarithm of the sum of exp(scores), [t]."""
    top = jnp.max(scores, axis=-1, keepdims=True)
    shares = jnp.exp(scores - top)
    return shares, jnp.log(jnp.sum(shares, axis=-1)) + top[:, 0]


def _at(scores: Array, targets: Array) -> Array:
    return jnp.take_along_axis(scores, targets[:, None], axis=-1)[:, 0]


def _matmul(spec: str, a: Array, b: Array) -> jax.Array:
    """A product that adds up in float32."""
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


class _Shares(NamedTuple):
    """How devices share the work: each has the tokens of its rows and its part of the vocabulary.

    A device works through chunks of its own and needs nothing of other rows' until it is done;
    the vocabulary's parts are left to the compiler.
    """

    rows: NamedSharding | None  # None: they are not split, or do not divide
    vocab_size: int  # of one part

    @classmethod
    def of(cls, lead: tuple[int, ...], vocab_size: int, rows: NamedSharding | None) -> _Shares:
        if rows is None or not even(lead, rows):
            return cls(None, vocab_size)
        parts = lead[0] // rows.shard_shape(lead)[0]
        others = rows.mesh.size // parts
        vocab_size = vocab_size if vocab_size % others else vocab_size // others
        return cls(rows if parts > 1 else None, vocab_size)

    def run(self, fn: Callable[[Any, Any], Any], whole: Any, split: Any) -> Any:
        """fn(whole, split) -> (whole, split) by every device, of arrays that are split by rows."""
        if self.rows is None:
            return fn(whole, split)
        specs = (P(), self.rows.spec)
        return jax.shard_map(
            fn, mesh=self.rows.mesh, in_specs=specs, out_specs=specs, axis_names=set(self.axes),
            check_vma=False,
        )(whole, split)  # fmt: skip

    def chunks(self, lead: tuple[int, ...]) -> _Chunks:
        """Of one device's tokens."""
        return _Chunks(
            lead,
            -(
                -math.prod(lead)
                // max(1, LOGITS.get(jax.default_backend(), LOGITS["gpu"]) // self.vocab_size)
            ),
        )

    def together(self, sums: _Sums) -> _Sums:
        """The sums of all devices, inside `run`."""
        maxima = jax.lax.pmax(sums.stats.maxima, self.axes)
        sums = jax.lax.psum(sums, self.axes)
        return sums._replace(stats=sums.stats._replace(maxima=maxima))

    @property
    def axes(self) -> tuple[str, ...]:
        return () if self.rows is None else tuple(self.rows.spec[0])


class _Chunks(NamedTuple):
    """How tokens are dealt out to n chunks whose logits fit LOGITS; chunk i takes i, i + n ..."""

    lead: tuple[int, ...]  # the leading axes, which are a token's
    n: int

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


def _in_chunks(
    fn: Callable[..., Any],
    rows: NamedSharding | None,
    heads: tuple[Array, ...],
    hidden: Array,
    *arrays: Array,
) -> Any:
    """Maps fn(*heads, hidden, *arrays) over chunks of tokens.

    Args:
      fn: of heads [D, V] and arrays [t, ...].
      rows: as in `token_logps`.
      heads: as they come, of any dtype.
      hidden, arrays: the leading axes of all are a token's.
    """
    work = _Shares.of(hidden.shape[:-1], heads[0].shape[1], rows)

    def share(heads: tuple, xs: tuple) -> tuple[tuple, Any]:
        chunks = work.chunks(xs[0].shape[:-1])
        out = jax.lax.map(lambda x: fn(*heads, *x), jax.tree.map(chunks.split, xs))
        return (), jax.tree.map(chunks.merge, out)

    heads = tuple(head.astype(hidden.dtype) for head in heads)
    return work.run(share, heads, (hidden, *arrays))[1]
