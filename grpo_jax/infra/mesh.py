"""The device mesh and where every array lies on it.

One table of path rules shards the policy, its adapters and, since the paths of optimizer moments
end in the same names, the optimizer state. Whatever no rule names is replicated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax import config

AXES = ("data", "fsdp", "tensor")

# The end of a leaf's path -> its dimensions' axes. Layer leaves are stacked, [L, in, out]. Column
# parallel linears split their output over "tensor" and row parallel ones their input, so that a
# block needs one reduction (Megatron-LM, arXiv 1909.08053); "fsdp" takes the other dimension.
_COLUMN = r"(q_proj|k_proj|v_proj|qkv_proj|gate_proj|up_proj|gate_up_proj)"
_ROW = r"(o_proj|down_proj)"
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),  # [V, D]
    (r"lm_head/kernel", P("fsdp", "tensor")),  # [D, V]
    (_COLUMN + r"/kernel", P(None, "fsdp", "tensor")),
    (_COLUMN + r"/bias", P(None, "tensor")),
    (_COLUMN + r"/lora_a", P(None, "fsdp", None)),  # [L, in, r]
    (_COLUMN + r"/lora_b", P(None, None, "tensor")),  # [L, r, out]
    (_ROW + r"/kernel", P(None, "tensor", "fsdp")),
    (_ROW + r"/lora_a", P(None, "tensor", None)),
    (_ROW + r"/lora_b", P(None, None, "fsdp")),
)


def make_mesh(cfg: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), axes ("data", "fsdp", "tensor"), -1 filled in.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or processes would have to
        share rows.
    """
    devices = jax.devices() if devices is None else devices
    grid = _arranged(fill_in(cfg, len(devices)), devices)
    _check_processes(grid, said(cfg))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def fill_in(cfg: config.Mesh, devices: int) -> tuple[int, int, int]:
    """The sizes of the three axes over so many devices, -1 filled in.

    Raises:
      ValueError: they do not multiply to that number, or some are still to be chosen.
    """
    data, fsdp, tensor = (
        1 if size == 0 and -1 in (cfg.data, cfg.fsdp, cfg.tensor) else size
        for size in (cfg.data, cfg.fsdp, cfg.tensor)
    )
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise ValueError(f"{said(cfg)}: wanted positive sizes, and -1 at most once")
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    if math.prod(sizes) != devices:
        raise ValueError(
            f"{said(cfg)}: the sizes do not fit the {devices} devices of this run; wanted sizes "
            "whose product is that number (one of them may be -1: whatever is left)"
        )
    return sizes[0], sizes[1], sizes[2]


def said(cfg: config.Mesh) -> str:
    """The sizes as the configuration has them, for messages."""
    return f"mesh.data={cfg.data}, mesh.fsdp={cfg.fsdp}, mesh.tensor={cfg.tensor}"


def _arranged(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as a grid; several processes' one process after another.

    So a global batch has its rows in the order in which processes take them (`data.batches.take`),
    whatever the hardware. Not by `jax.make_mesh`, which orders them by a TPU's torus, refuses
    several slices, and takes each host of a GPU cluster for one.
    """
    if devices[0].platform == "tpu" and len({device.process_index for device in devices}) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return np.array(order, dtype=object).reshape(sizes)


def _check_processes(grid: np.ndarray, asked: str) -> None:
    """Each process reads rows of its own, so its devices must hold whole rows, as many as others'.

    Raises:
      ValueError: the devices along "tensor" belong to several processes, or processes have
        different numbers of devices.
    """
    rows = grid.reshape(-1, grid.shape[-1])
    owners = [{device.process_index for device in row} for row in rows]
    counts = {process: 0 for row in owners for process in row}
    if any(len(row) > 1 for row in owners):
        raise ValueError(
            f"{asked}: mesh.tensor would run over several of the {len(counts)} processes, but each "
            f"reads its own rows; wanted mesh.tensor to divide the devices of one process"
        )
    for (process,) in owners:
        counts[process] += grid.shape[-1]
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{n} in process {p}" for p, n in sorted(counts.items())[:8])
        raise ValueError(f"the processes have different numbers of devices: {shown}; wanted equal")


def param_shardings(mesh: Mesh, tree: Any, axes: Sequence[str] = AXES) -> Any:
    """A NamedSharding for each leaf of a tree of arrays or ShapeDtypeStructs, by PARAM_RULES.

    An axis that does not divide its dimension, or is not among `axes`, is dropped there.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, _spec(mesh, name, leaf.shape, axes))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def gathered(mesh: Mesh) -> Callable[[Any], Any]:
    """Where sampling wants parameters: whole along "fsdp", since every token needs all of them."""
    return partial(param_shardings, mesh, axes=("tensor",))


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...], axes: Sequence[str]) -> P:
    for ending, spec in PARAM_RULES:
        if re.search(rf"(^|/){ending}$", name) and len(spec) == len(shape):
            fits = (
                axis if axis in axes and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(spec, shape, strict=True)
            )
            return P(*fits)
    return P()


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first dimension split over "data" and "fsdp"."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def row_parts(mesh: Mesh) -> int:
    """Devices that share a batch's rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(parts: int, name: str, rows: int) -> None:
    """Raises ValueError unless `rows` global rows can be split evenly over the mesh.

    Args:
      parts: devices along "data" times those along "fsdp".
      name: what has that many rows, in the config's words, for the message.
    """
    if rows % parts:
        raise ValueError(
            f"{name}: got {rows} rows, wanted a multiple of {parts}, the devices along mesh.data * "
            f"mesh.fsdp; change {name}, or give devices to mesh.tensor"
        )


def check_heads(tensor: int, model: str, num_heads: int, num_kv_heads: int) -> None:
    """Raises ValueError unless each device along "tensor" can hold whole attention heads.

    Args:
      tensor: devices along it.
      model: its name, for the message.
      num_heads, num_kv_heads: of queries, and of keys and values.
    """
    common = math.gcd(num_heads, num_kv_heads)
    if common % tensor:
        raise ValueError(
            f"mesh.tensor: got {tensor}, but {model} has {num_heads} heads and {num_kv_heads} "
            f"key-value heads; wanted a divisor of {common}, so that no head is split over devices"
        )


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Places a NamedTuple of host arrays (None leaves allowed) by `batch_sharding`.

    Args:
      batch: this process's rows; the global arrays hold those of all processes, in their order.
    """
    sharding = batch_sharding(mesh)
    rows = jax.tree.leaves(batch)[0].shape[0]
    check_rows(row_parts(mesh), "the batch", rows * jax.process_count())
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def put_same(mesh: Mesh, tree: Any) -> Any:
    """Places host arrays that every process holds alike: split by rows where they divide evenly."""
    parts = row_parts(mesh)

    def put(x: Any) -> jax.Array:
        even = np.shape(x)[0] % parts == 0
        return jax.device_put(np.asarray(x), batch_sharding(mesh) if even else replicated(mesh))

    return jax.tree.map(put, tree)


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array on the host, on every process."""
    if x.is_fully_addressable:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def fetch_local(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split by `batch_sharding`."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
