"""Work on tokens through the output head, a chunk at a time: how many at once, and on which device.

[B, T, V] never exists: a chunk has fewer tokens the larger the vocabulary, and every device works
on chunks of its own rows, up to the last one that holds a token that counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.models.layers import even
from grpo_jax.structs import Array

# Numbers among the logits that a device has at one time: 32 MiB or 512 MiB. A product with a
# chunk's tokens reads the whole head, and the head's gradient is read and written once a chunk:
# accelerators need hundreds of tokens to be bound by arithmetic, and caches of CPUs hold megabytes.
LOGITS = {"cpu": 2**23, "gpu": 2**27, "tpu": 2**27}


def count(tokens: int, vocab_size: int, backend: str) -> int:
    """Chunks of that many tokens whose logits fit LOGITS; unknown backends are taken for GPUs."""
    most = LOGITS.get(backend, LOGITS["gpu"])
    return -(-tokens // max(1, most // vocab_size))


class Shares(NamedTuple):
    """How devices share the work: each has the tokens of its rows and its part of the vocabulary.

    A device works through chunks of its own and needs nothing of other rows' until it is done;
    the vocabulary's parts are left to the compiler.
    """

    rows: NamedSharding | None  # None: they are not split, or do not divide
    vocab_size: int  # of one part

    @classmethod
    def of(cls, lead: tuple[int, ...], vocab_size: int, rows: NamedSharding | None) -> Shares:
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

    def chunks(self, lead: tuple[int, ...]) -> Chunks:
        """Of one device's tokens."""
        return Chunks(lead, count(math.prod(lead), self.vocab_size, jax.default_backend()))

    @property
    def axes(self) -> tuple[str, ...]:
        """The mesh's axes along which `run` splits."""
        return () if self.rows is None else tuple(self.rows.spec[0])


class Chunks(NamedTuple):
    """How tokens are dealt out, in their order, to n chunks whose logits fit LOGITS."""

    lead: tuple[int, ...]  # the leading axes, which are a token's
    n: int

    def split(self, x: Array) -> Array:
        """[*lead, ...] -> [n, ceil(tokens / n), ...], padded with zeros."""
        tokens = math.prod(self.lead)
        x = x.reshape(tokens, *x.shape[len(self.lead) :])
        x = jnp.pad(x, ((0, -tokens % self.n), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(self.n, -1, *x.shape[1:])

    def merge(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = x.reshape(-1, *x.shape[2:])
        return x[: math.prod(self.lead)].reshape(*self.lead, *x.shape[1:])

    def scan(
        self, body: Callable[[Any, Any], tuple[Any, Any]], start: Any, xs: Any, mask: Array
    ) -> tuple[Any, Any]:
        """As `lax.scan` over arrays of `split`, but only up to the last token that counts.

        Args:
          body, start, xs: as of `lax.scan`.
          mask: bool [n, ...], split as they are: the tokens that count.

        Returns:
          the last carry; what body gave, stacked, 0 for chunks that were left out.
        """
        wanted = jnp.max(jnp.where(jnp.any(mask, axis=1), 1 + jnp.arange(self.n), 0))

        def at(i: Array | int, carry: Any) -> tuple[Any, Any]:
            return body(carry, jax.tree.map(lambda x: x[i], xs))

        shapes = jax.eval_shape(at, 0, start)[1]
        blank = jax.tree.map(lambda x: jnp.zeros((self.n, *x.shape), x.dtype), shapes)

        def step(i: Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
            carry, found = at(i, state[0])
            return carry, jax.tree.map(lambda out, x: out.at[i].set(x), state[1], found)

        return jax.lax.fori_loop(0, wanted, step, (start, blank))


def in_chunks(
    fn: Callable[..., Any],
    rows: NamedSharding | None,
    heads: tuple[Array, ...],
    mask: Array,
    hidden: Array,
    *arrays: Array,
) -> Any:
    """Maps fn(*heads, hidden, *arrays) over chunks of tokens; has no gradient of its own.

    Args:
      fn: of heads [D, V] and arrays [t, ...].
      rows: as in `token_logps`.
      heads: as they come, of any dtype.
      mask: bool, the tokens that count; results are 0 elsewhere.
      hidden, arrays: the leading axes of all are a token's.
    """
    work = Shares.of(mask.shape, heads[0].shape[1], rows)

    def share(heads: tuple, xs: tuple) -> tuple[tuple, Any]:
        chunks = work.chunks(xs[0].shape)
        xs = jax.tree.map(chunks.split, xs)

        def body(carry: tuple, xs: tuple) -> tuple[tuple, Any]:
            mask, *arrays = xs
            found = fn(*heads, *arrays)
            return carry, jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros((), x.dtype)), found)

        return (), jax.tree.map(chunks.merge, chunks.scan(body, (), xs, xs[0])[1])

    heads = tuple(head.astype(hidden.dtype) for head in heads)
    return work.run(share, heads, (mask, hidden, *arrays))[1]
