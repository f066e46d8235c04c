"""A batch without its padding: the tokens in the order in which linear layers see them.

Attention works on a grid, in which a prompt has S places and each of its G completions T, and many
hold padding. Linear layers, norms and the output head do not ask where a token stands: for them the
tokens that count lie side by side, and attention's inputs are laid out on the grid and taken back
in each layer. Each of the B devices that share a batch's rows packs its own.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import chex
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.models.layers import Array, even


class Packing(NamedTuple):
    """Which token is where; a slot that is left over holds any token of the padding.

    Completions come first, in the order of the grid, then prompts.
    """

    source: Array  # int32 [B, N], the place of each slot's token in its device's part of the grid
    slot: Array  # int32 [P, S + G T], the slot of each place; N or more: none
    complete: Array  # bool [B], every token has a slot

    @classmethod
    def of(
        cls,
        prompt_lengths: Array,
        prompt_places: int,
        mask: Array,
        slots: int,
        rows: jax.sharding.NamedSharding | None,
    ) -> Self:
        """The packing of a batch as `Decoder.predict` lays it out.

        Args:
          prompt_lengths: int32 [P], at least 1; the last token of a prompt begins completions.
          prompt_places: S.
          mask: bool [P, G, T], True up to the last token that is asked for.
          slots: N, of `slots_for`.
          rows: how the batch's first axis is split over devices; None: it is not.
        """
        P = len(prompt_lengths)
        B = P // rows.shard_shape((P,))[0] if rows is not None and even((P,), rows) else 1
        shared = jnp.arange(prompt_places) < prompt_lengths[:, None] - 1
        own = jnp.reshape(mask, (P, -1))
        kind = jnp.concatenate([jnp.where(shared, 1, 2), jnp.where(own, 0, 2)], axis=1)
        kind = kind.reshape(B, -1)
        source = jnp.argsort(kind, axis=1, stable=True)
        slot = jnp.argsort(source, axis=1)
        chex.assert_axis_dimension_gteq(source, 1, slots)
        complete = jnp.sum(kind < 2, axis=1) <= slots
        return cls(source[:, :slots], slot.reshape(P, -1), complete)

    def pack(self, grid: Array) -> Array:
        """[P, S + G T, ...] -> [B, N, ...]."""
        B = len(self.source)
        parts = grid.reshape(B, -1, *grid.shape[2:])
        return _take(parts, self.source, self.slot.reshape(B, -1))

    def unpack(self, packed: Array) -> Array:
        """The inverse of `pack`: [B, N, ...] -> [P, S + G T, ...], 0 where no token has a slot."""
        slot = self.slot.reshape(len(self.source), -1)
        return _take(packed, slot, self.source).reshape(*self.slot.shape, *packed.shape[2:])

    def pack_completions(self, x: Array) -> Array:
        """[P, G, T, ...] -> [B, N, ...], 0 for prompts."""
        P, G, T = x.shape[:3]
        x = x.reshape(P, G * T, *x.shape[3:])
        S = self.slot.shape[1] - G * T
        return self.pack(jnp.pad(x, ((0, 0), (S, 0), *((0, 0),) * (x.ndim - 2))))

    def unpack_completions(self, packed: Array, shape: tuple[int, ...]) -> Array:
        """[B, N, ...] -> [P, G, T, ...], where the shape is (P, G, T)."""
        P, G, T = shape
        return self.unpack(packed)[:, -G * T :].reshape(*shape, *packed.shape[2:])


@jax.custom_vjp
def _take(x: Array, index: Array, inverse: Array) -> Array:
    """x [B, A, ...] at index int32 [B, C] -> [B, C, ...], 0 where the index is A or more.

    `inverse` [B, A] says where each element of x went. So the gradient is taken in the same way,
    and not added up place by place as XLA would, to which the indices might repeat.
    """
    index = jnp.expand_dims(index, tuple(range(2, x.ndim)))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)


def _take_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(x, index, inverse), (index, inverse)


def _take_backward(given: tuple[Array, Array], flow: Array) -> tuple[Array, None, None]:
    index, inverse = given
    return _take(flow, inverse, index), None, None


_take.defvjp(_take_forward, _take_backward)


EIGHTHS = (1, 2, 3, 4, 5, 6)  # of all places: few, for each is a program of its own
LEAST = 256  # slots below which nothing is gained


def tokens_of(prompt_lengths: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Slots that prompts need with their completions, int [P]: of both their tokens [P].

    A prompt's last token is not among its own: it begins each of the completions.
    """
    return prompt_lengths - 1 + trained


def slots_for(tokens: np.ndarray, places: int, parts: int, devices: int) -> int | None:
    """How many slots a device needs for its share of any part of a batch.

    Args:
      tokens: int [P], of `tokens_of`.
      places: S + G T.
      parts: a step's micro-batches; part i has prompts i, i + parts, ...
      devices: that share the rows of each part.

    Returns:
      one of EIGHTHS of a device's places; None where it would be all of them, or where devices
      cannot share evenly.
    """
    rows, left = divmod(len(tokens), parts * devices)
    if left:
        return None
    most = int(tokens.reshape(devices, rows, parts).sum(1).max())
    for eighths in EIGHTHS:
        slots = max(LEAST, -(-eighths * rows * places // 64) * 8)
        if most <= slots < rows * places:
            return slots
    return None
