"""safetensors <-> stacked parameters, strictly: every tensor is accounted for or nothing is read.

In: a folder with model.safetensors, or shards with model.safetensors.index.json, and a name table.
Out: a nested dict of NumPy arrays. A table maps a Hugging Face tensor name to a `Slot`: where in
the parameters it goes. Only safetensors is read, never pickle.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from grpo_jax.hub.folder import read_json

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")


class Slot(NamedTuple):
    """Where one tensor goes: params[path][layer], or params[path] if layer is None."""

    path: tuple[str, ...]
    layer: int | None
    transpose: bool  # Hugging Face stores a linear's weight as [out, in]
    shape: tuple[int, ...]  # as Hugging Face has it


class _Stored(NamedTuple):
    """A tensor in an open file, read when asked for."""

    handle: Any
    key: str

    def array(self) -> np.ndarray:
        return self.handle.get_tensor(self.key)


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of "float32" or "bfloat16".

    Raises:
      ValueError: any other name.
    """
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype {name!r}: use float32 or bfloat16")
    return np.dtype(np.float32 if name == "float32" else ml_dtypes.bfloat16)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order.

    Raises:
      FileNotFoundError: none there, or shards missing.
    """
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{folder / _INDEX}: shards outside the folder: {outside}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise FileNotFoundError(f"{folder}: shards missing: {missing or 'all'}; fetch again")
        return [folder / name for name in names]
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    remedy = (
        f"found only {pickles}, and pickles are never read: convert them to safetensors first"
        if pickles
        else "is this a Hugging Face model folder?"
    )
    raise FileNotFoundError(f"{folder}: no {_SINGLE} and no {_INDEX}; {remedy}")


def _open(stack: contextlib.ExitStack, file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return stack.enter_context(safe_open(file, framework="np"))
    except SafetensorError as error:
        raise ValueError(
            f"{file}: truncated or damaged ({error}); delete it and fetch it again"
        ) from error


def read_params(
    files: list[Path],
    table: Mapping[str, Slot],
    dtype: str,
    ignored: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict:
    """Read and stack every tensor of the table.

    Args:
      files: safetensors files that together hold the table's tensors, each exactly once.
      table: Hugging Face name -> slot.
      dtype: of the result, float32 or bfloat16.
      ignored: names that may be there and carry nothing that we compute with.
      aliases: names that may be there as an exact copy of another one (tied embeddings).
      prefix: taken off the files' names where all the table's tensors carry it.

    Returns:
      Nested dict of NumPy arrays, layers stacked [L, ...], linears [in, out].

    Raises:
      ValueError: damaged files; unknown, duplicate, missing, misshapen tensors, all listed.
    """
    aliases = aliases or {}
    with contextlib.ExitStack() as stack:
        stored: dict[str, _Stored] = {}
        problems = []
        for file in files:
            handle = _open(stack, file)
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
                name = key.removeprefix(prefix)
                if name in stored:
                    problems.append(f"duplicate: {name}")
                stored[name] = _Stored(handle, key)
        problems += [f"missing: {name}" for name in table if name not in stored]
        for name, tensor in stored.items():
            if name in table:
                problems += _check(name, tensor, table[name].shape)
            elif name in aliases and aliases[name] in stored:
                if not np.array_equal(tensor.array(), stored[aliases[name]].array()):
                    problems.append(f"{name} differs from {aliases[name]}, to which it is tied")
            elif name not in ignored:
                problems.append(f"unknown: {name}")
        if problems:
            raise ValueError(_report(files[0].parent, problems))
        return _fill(stored, table, numpy_dtype(dtype))


def _check(name: str, tensor: _Stored, shape: tuple[int, ...]) -> list[str]:
    piece = tensor.handle.get_slice(tensor.key)
    got = tuple(piece.get_shape())
    if got != shape:
        return [f"misshapen: {name} is {list(got)}, the config asks for {list(shape)}"]
    if piece.get_dtype() not in _FLOATS:
        return [f"{name} is {piece.get_dtype()}; only {', '.join(_FLOATS)} are read"]
    return []


def _report(folder: Path, problems: list[str]) -> str:
    shown = "\n  ".join(problems[:40])
    rest = f"\n  and {len(problems) - 40} more" if len(problems) > 40 else ""
    return (
        f"{folder}: problems with the weights ({len(problems)}):\n  {shown}{rest}\n"
        "The weights do not belong to this config.json, or the model is of another family."
    )


def _fill(stored: Mapping[str, _Stored], table: Mapping[str, Slot], dtype: np.dtype) -> dict:
    """Allocate the stacked arrays once and copy tensor by tensor, so memory holds one model."""
    depth: dict[tuple[str, ...], int] = {}
    for slot in table.values():
        if slot.layer is not None:
            depth[slot.path] = max(depth.get(slot.path, 0), slot.layer + 1)
    params: dict = {}
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, slot in table.items():
        if slot.path not in flat:
            shape = slot.shape[::-1] if slot.transpose else slot.shape
            flat[slot.path] = np.empty(
                shape if slot.layer is None else (depth[slot.path], *shape), dtype
            )
            node = params
            for key in slot.path[:-1]:
                node = node.setdefault(key, {})
            node[slot.path[-1]] = flat[slot.path]
        tensor = stored[name].array()
        target = flat[slot.path] if slot.layer is None else flat[slot.path][slot.layer]
        target[...] = tensor.T if slot.transpose else tensor
    return params


def unstack(params: Mapping, table: Mapping[str, Slot], dtype: str | None) -> dict[str, np.ndarray]:
    """The inverse of `read_params`: Hugging Face names -> contiguous arrays [out, in].

    Args:
      params: nested dict of arrays, NumPy or jax, on one process.
      table: Hugging Face name -> slot.
      dtype: float32 or bfloat16; None keeps each array's own.

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
        kept = value.dtype if dtype is None else numpy_dtype(dtype)
        tensors[name] = np.ascontiguousarray(value, kept)
    return tensors


def write_safetensors(
    folder: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = 5_000_000_000
) -> None:
    """Write model.safetensors, or shards with an index where they would exceed `shard_bytes`."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = np.ascontiguousarray(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        _save(shards[0], folder / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:  # the library does not raise OSError itself
        kind = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise OSError(kind, str(error), str(file)) from error
    file.chmod(0o644)  # the library makes it private
