"""Work on tokens through the output head, a chunk at a time: how many at once, and on which device.

[B, T, V] never exists: a chunk has fewer tokens the larger the vocabulary, and every device works
on chunks of its own rows.
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
    """How tokens are dealt out to n chunks whose logits fit LOGITS; chunk i takes i, i + n ..."""

    lead: tuple[int, ...]  # the leading axes, which are a token's
    n: int

    def split(self, x: Array) -> Array:
        """[*lead, ...] -> [n, tokens / n, ...], padded with zeros."""
        tokens = math.prod(self.lead)
        x = x.reshape(tokens, *x.shape[len(self.lead) :])
        x = jnp.pad(x, ((0, -tokens % self.n), *((0, 0),) * (x.ndim - 1)))
        return jnp.moveaxis(x.reshape(-1, self.n, *x.shape[1:]), 1, 0)

    def merge(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
        return x[: math.prod(self.lead)].reshape(*self.lead, *x.shape[1:])


def in_chunks(
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
    work = Shares.of(hidden.shape[:-1], heads[0].shape[1], rows)

    def share(heads: tuple, xs: tuple) -> tuple[tuple, Any]:
        chunks = work.chunks(xs[0].shape[:-1])
        out = jax.lax.map(lambda x: fn(*heads, *x), jax.tree.map(chunks.split, xs))
        return (), jax.tree.map(chunks.merge, out)

    heads = tuple(head.astype(hidden.dtype) for head in heads)
    return work.run(share, heads, (hidden, *arrays))[1]
