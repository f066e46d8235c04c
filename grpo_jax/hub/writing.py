"""Stacked parameters -> safetensors files under Hugging Face's names."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.hub.tensors import INDEX, SINGLE, Slot, numpy_dtype


def unstack(params: Mapping, table: Mapping[str, Slot]) -> dict[str, np.ndarray]:
    """The inverse of `Weights.read`: Hugging Face names -> arrays [out, in], views where possible.

    Args:
      params: nested dict of arrays, NumPy or jax, whole on this process.
      table: Hugging Face name -> slot.

    Raises:
      ValueError: the parameters do not fit the table.
    """
    tensors = {}
    fetched: dict[tuple[str, ...], np.ndarray] = {}
    for name, slot in table.items():
        if slot.path not in fetched:
            leaf: Any = params
            for key in slot.path:
                leaf = leaf[key]
            fetched[slot.path] = np.asarray(leaf)
        value = fetched[slot.path] if slot.layer is None else fetched[slot.path][slot.layer]
        value = value.T if slot.transpose else value
        if value.shape != slot.shape:
            raise ValueError(f"{name}: parameters {value.shape}, the config asks for {slot.shape}")
        tensors[name] = value
    return tensors


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str | None = None,
    shard_bytes: int = 5_000_000_000,
    name: str = SINGLE,
) -> None:
    """Write model.safetensors, or shards with an index where they would exceed `shard_bytes`.

    Args:
      folder: an existing one.
      tensors: name -> array; copies are made of one shard at a time.
      dtype: float32, bfloat16 or float16; None keeps each array's own.
      shard_bytes: of one file.
      name: of the single file.

    Raises:
      ValueError: a number that float16 cannot hold.
      OSError: the disk is full or not writable.
    """
    kept = None if dtype is None else numpy_dtype(dtype)
    shards: list[list[str]] = [[]]
    size = total = 0
    for key, tensor in tensors.items():
        nbytes = tensor.size * (kept or tensor.dtype).itemsize
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes
        total += nbytes
    stem = name.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = name if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _save({key: _converted(key, tensors[key], kept) for key in shard}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _converted(name: str, tensor: np.ndarray, dtype: np.dtype | None) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(tensor, dtype)
    if dtype == np.float16 and tensor.dtype != dtype and np.isinf(out).any():
        raise ValueError(
            f"{name}: numbers up to {np.abs(tensor).max():.3g}, float16 ends at 65504; choose "
            "bfloat16 or float32"
        )
    return out


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library does not raise OSError itself
        kind = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(kind, str(error), str(file)) from error
