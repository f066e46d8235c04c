"""Per-token log-probabilities through a chunked output head.

[B, T, V] never exists: the head runs on a chunk of tokens at a time, the fewer the larger the
vocabulary, and the backward pass recomputes each chunk's logits. Products accumulate in float32
whatever the compute dtype, because bfloat16 rounding of chunked products biases training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

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
    head = head.astype(hidden.dtype)
    return softcap(jnp.matmul(hidden, head, preferred_element_type=jnp.float32), cap)


def _in_chunks(fn: Callable[..., Any], vocab_size: int, hidden: Array, *arrays: Array) -> Any:
    """Maps fn over at most LOGITS / V tokens at a time; the leading axes of all are a token's.

    Chunk i takes tokens i, i + n, i + 2 n ...: the batch is sharded over its first axis, and so
    every device has its share of every chunk.
    """
    lead = hidden.shape[:-1]
    count = math.prod(lead)
    n = -(-count // max(1, LOGITS // vocab_size))

    def split(x: Array) -> Array:
        x = x.reshape(count, *x.shape[len(lead) :])
        x = jnp.pad(x, ((0, -count % n), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(x.reshape(-1, n, *x.shape[1:]), 1, 0)

    chunks = tuple(split(x) for x in (hidden, *arrays))
    out = jax.lax.map(lambda c: jax.checkpoint(fn)(*c), chunks)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1)[:count].reshape(lead), out)
