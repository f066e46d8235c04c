"""Arrays straight from files to their places on the devices, a bounded piece of them at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]  # one slice a dimension, with bounds and without steps


def place(
    read: Callable[[Index], np.ndarray],
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
    whole_bytes: int,
) -> jax.Array:
    """An array made of what `read` gives for the parts that this process's devices hold.

    Equal parts are read once. Beside what is already placed, host memory holds one device's part,
    or, where that is larger and the first dimension is not split, `whole_bytes` of it.

    Args:
      read: index -> a fresh array of that part, which nothing else refers to.
      shape: of the whole array, at least one dimension.
      dtype: of the array and of what `read` gives.
      sharding: where it lies; of several processes, all must call.
      whole_bytes: a larger part goes to its device in pieces of a quarter of this, which takes
        twice the time: the array is written once more.

    Returns:
      Array of `shape`. Nothing else refers to its memory, so it may be donated.
    """
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        pairs = zip(index or (), shape, strict=True)
        bounds = ((s.start or 0, n if s.stop is None else s.stop) for s, n in pairs)
        holders.setdefault(tuple(bounds), []).append(device)

    def rows(first: int, count: int) -> jax.Array:
        """[count, ...] from row `first` on; all of the array if count is shape[0]."""
        arrays = []
        for bounds, devices in holders.items():
            index = [slice(*pair) for pair in bounds]
            if count < shape[0]:
                index[0] = slice(first, first + count)
            part = read(tuple(index))
            for i, device in enumerate(devices):  # on CPU jax may keep the memory it is given
                given = part if i == 0 else part.copy(order="K")
                arrays.append(jax.device_put(given, device).block_until_ready())
        return jax.make_array_from_single_device_arrays((count, *shape[1:]), sharding, arrays)

    part = sharding.shard_shape(shape)
    row = dtype.itemsize * math.prod(part[1:])
    if part[0] != shape[0] or row * shape[0] <= whole_bytes:
        return rows(0, shape[0])
    count = min(shape[0], max(1, whole_bytes // (4 * row)))
    empty, insert = _build_insert(shape, dtype, sharding)
    whole = empty()
    for first in range(0, shape[0], count):
        first = min(first, shape[0] - count)  # the last piece overlaps: all have one shape
        whole = insert(whole, rows(first, count), first).block_until_ready()
    return whole


def _build_insert(
    shape: tuple[int, ...], dtype: np.dtype, sharding: jax.sharding.Sharding
) -> tuple[Callable[[], jax.Array], Callable[[jax.Array, jax.Array, int], jax.Array]]:
    """Jitted: an array of zeros; and writing rows into one, in place."""

    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[dtype.itemsize]
    cast = jax.lax.bitcast_convert_type

    def insert(whole: jax.Array, rows: jax.Array, first: int) -> jax.Array:
        # As integers: XLA's CPU backend would take all of a bfloat16 array to float32 and back.
        whole, rows = cast(whole, bits), cast(rows, bits)
        return cast(jax.lax.dynamic_update_slice_in_dim(whole, rows, first, axis=0), dtype)

    return (
        jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding),
        jax.jit(insert, out_shardings=sharding, donate_argnums=0),
    )
