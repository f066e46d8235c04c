"""safetensors <-> stacked parameters, strictly: every tensor is accounted for or nothing is read.

In: a folder with model.safetensors, or shards with model.safetensors.index.json, and a name table.
Out: a nested dict of arrays, in host memory or straight in their places on the devices. A table
maps a Hugging Face tensor name to a `Slot`, its place in the parameters. Only safetensors is read,
never pickle.
"""

from __future__ import annotations

import functools
import math
import mmap
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from grpo_jax.hub.folder import read_object
from grpo_jax.hub.place import Index, place
from grpo_jax.hub.tensors import INDEX, SINGLE, Slot, numpy_dtype
from grpo_jax.text.strict import inside, listed, parse_json, plain, shown

_FLOATS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}

# (path, shape) of a leaf -> where it lies.
Placement = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


class _Stored(NamedTuple):
    """A tensor in a file, read when asked for."""

    file: Path
    size: int  # of the file
    dtype: str
    shape: tuple[int, ...]
    start: int  # its bytes in the file
    stop: int

    def view(self, memory: mmap.mmap) -> np.ndarray:
        """The tensor in the mapped file; nothing may keep it."""
        dtype = _FLOATS[self.dtype]
        flat = np.frombuffer(memory, dtype, math.prod(self.shape), self.start)
        return flat.reshape(self.shape)


class _Leaf(NamedTuple):
    """One array of the parameters and the tensors that it is made of."""

    names: list[str]  # one a layer; a single one where nothing is stacked
    slot: Slot  # of the first

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.slot.shape[::-1] if self.slot.transpose else self.slot.shape
        return shape if self.slot.layer is None else (len(self.names), *shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the index's order.

    Raises:
      FileNotFoundError: none there, or shards missing.
      ValueError: the index cannot be read, or names files outside the folder.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(_weight_map(folder).values()))
        files = [inside(folder, name, folder / INDEX) for name in names]
        if outside := [file.name for file in files if file.parent != folder]:
            raise ValueError(f"{folder / INDEX}: shards outside the folder: {shown(outside)}")
        missing = [file.name for file in files if not file.is_file()]
        if missing or not names:
            what = shown(missing) if missing else "all"
            raise FileNotFoundError(f"{folder}: shards missing: {what}; fetch again")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    remedy = (
        f"found only {pickles}, and pickles are never read: convert them to safetensors first"
        if pickles
        else "is this a Hugging Face model folder?"
    )
    raise FileNotFoundError(f"{folder}: no {SINGLE} and no {INDEX}; {remedy}")


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, of a sharded folder's index."""
    found = read_object(folder / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError(f"{folder / INDEX}: no weight_map in it; fetch the file again")
    return found


def _tensors(file: Path) -> dict[str, _Stored]:
    """Name -> tensor, of one file that the safetensors library finds sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"), open(file, "rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")  # the library has checked it
            header = parse_json(handle.read(start - 8))
            size = os.fstat(handle.fileno()).st_size
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"{file}: truncated or damaged ({shown(str(error))}); delete it and fetch it again"
        ) from error
    header.pop("__metadata__", None)
    return {
        name: _Stored(
            file, size, entry["dtype"], tuple(entry["shape"]),
            start + entry["data_offsets"][0], start + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }  # fmt: skip


def _map(file: Path, size: int) -> mmap.mmap:
    """A file as memory, which goes when nothing refers to it any more."""
    with open(file, "rb") as handle:
        if os.fstat(handle.fileno()).st_size != size:
            raise ValueError(f"{file}: changed since it was opened; start again")
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


class Weights:
    """Files whose tensors are known to be the wanted ones; made by `open_weights`."""

    def __init__(
        self,
        stored: Mapping[str, _Stored],
        table: Mapping[str, Slot],
        dtype: str,
        unused: Collection[str],
    ) -> None:
        self.unused = tuple(sorted(unused))  # names in the files that no parameter is made of
        self.dtype = numpy_dtype(dtype)
        self._stored = {name: stored[name] for name in table}
        self._leaves: dict[tuple[str, ...], _Leaf] = {}
        for name, slot in table.items():
            self._leaves.setdefault(slot.path, _Leaf([], slot)).names.append(name)
        for path, leaf in self._leaves.items():
            layers = [table[name].layer for name in leaf.names]
            assert layers in ([None], list(range(len(layers)))), f"{path}: layers {layers}"

    def shapes(self) -> dict:
        """The parameters as nested dict of jax.ShapeDtypeStruct."""
        return _nest(
            {p: jax.ShapeDtypeStruct(leaf.shape, self.dtype) for p, leaf in self._leaves.items()}
        )

    def read(self, placement: Placement | None = None) -> dict:
        """Reads every tensor, anew at each call.

        Args:
          placement: path and shape of a leaf -> its sharding. Each process reads only what its own
            devices hold, a piece at a time (`hub.place`). None: NumPy arrays in host memory.

        Returns:
          Nested dict, layers stacked [L, ...], linears [in, out] (as NumPy: views that are stored
          transposed). Nothing else refers to the arrays' memory, so they may be donated.

        Raises:
          ValueError, OSError: a file cannot be read any more.
        """
        sizes = {tensor.file: tensor.size for tensor in self._stored.values()}
        maps = {file: _map(file, size) for file, size in sizes.items()}
        whole = _whole_bytes(list(sizes.values()))
        out: dict[tuple[str, ...], Any] = {}
        leaves = list(self._leaves.items())
        for (path, leaf), following in zip(leaves, [*leaves[1:], None], strict=True):
            if following is not None and jax.process_count() == 1:  # else a part is enough
                for name in following[1].names:
                    tensor = self._stored[name]
                    _read_ahead(maps[tensor.file], tensor, slice(0, tensor.shape[0]))
            if placement is None:
                out[path] = self._part(maps, leaf, tuple(slice(0, size) for size in leaf.shape))
            else:
                read = functools.partial(self._part, maps, leaf)
                out[path] = place(read, leaf.shape, self.dtype, placement(path, leaf.shape), whole)
        return _nest(out)

    def _part(self, maps: Mapping[Path, mmap.mmap], leaf: _Leaf, index: Index) -> np.ndarray:
        """leaf[index] as a fresh array; a transposed linear is a view of one."""
        stacked = leaf.slot.layer is not None
        names = leaf.names[index[0]] if stacked else leaf.names
        rest = index[1:] if stacked else index
        rest = rest[::-1] if leaf.slot.transpose else rest
        tensors = [self._stored[name] for name in names]
        for tensor in tensors:
            _read_ahead(maps[tensor.file], tensor, rest[0])
        out = np.empty((len(names), *(s.stop - s.start for s in rest)), self.dtype)
        for layer, tensor in enumerate(tensors):
            out[layer] = tensor.view(maps[tensor.file])[rest]
        out = out if stacked else out[0]
        return out.swapaxes(-1, -2) if leaf.slot.transpose else out


def _whole_bytes(sizes: list[int]) -> int:
    """What may be held in host memory beside what is placed: less than half the largest file."""
    return max(1 << 26, max(sizes) // 2 - (1 << 26))


def _read_ahead(memory: mmap.mmap, tensor: _Stored, rows: slice) -> None:
    """Asks the system to read a tensor's rows, which else come a few pages at a time."""
    if hasattr(mmap, "MADV_WILLNEED"):
        row = (tensor.stop - tensor.start) // max(1, tensor.shape[0])
        first = (tensor.start + rows.start * row) // mmap.PAGESIZE * mmap.PAGESIZE
        memory.madvise(mmap.MADV_WILLNEED, first, tensor.start + rows.stop * row - first)


def open_weights(
    files: list[Path],
    table: Mapping[str, Slot],
    dtype: str,
    ignored: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    prefix: str = "",
    rename: Callable[[str], str | None] | None = None,
) -> Weights:
    """Checks names, shapes and stored dtypes of all tensors; reads none but copies of aliases.

    Args:
      files: safetensors files that together hold the table's tensors, each exactly once.
      table: Hugging Face name -> slot.
      dtype: of the result: float32, bfloat16 or float16.
      ignored: names that may be there and carry nothing that we compute with.
      aliases: names that may be there as an exact copy of another one (tied embeddings).
      prefix: taken off the files' names where all the table's tensors carry it.
      rename: a name in the files -> the table's, or None for a tensor that is knowingly left out
        (a vision tower); those are listed in `Weights.unused`. After `prefix`.

    Raises:
      ValueError: damaged files; an index that does not fit them; unknown, duplicate, missing,
        misshapen tensors, all listed.
    """
    aliases = aliases or {}
    stored: dict[str, _Stored] = {}
    problems: list[str] = []
    unused: list[str] = []
    held = {file: _tensors(file) for file in files}
    for tensors in held.values():
        for key, tensor in tensors.items():
            short = key.removeprefix(prefix)
            name = rename(short) if rename else short
            if name is None:
                unused.append(key)
                continue
            if name in stored:
                problems.append(f"duplicate: {plain(name)}")
            stored[name] = tensor
    problems += _index_problems(held)
    problems += [f"missing: {name}" for name in table if name not in stored]
    for name, tensor in stored.items():
        if name in table:
            problems += _check(name, tensor, table[name].shape)
        elif name in aliases and aliases[name] in stored:
            if not _equal(tensor, stored[aliases[name]]):
                problems.append(f"{name} differs from {aliases[name]}, to which it is tied")
        elif name not in ignored:
            problems.append(f"unknown: {plain(name)}")
    if problems:
        raise ValueError(_report(files[0].parent, problems))
    return Weights(stored, table, dtype, unused)


def read_params(
    files: list[Path],
    table: Mapping[str, Slot],
    dtype: str,
    ignored: Collection[str] = (),
    aliases: Mapping[str, str] | None = None,
    prefix: str = "",
    rename: Callable[[str], str | None] | None = None,
    placement: Placement | None = None,
) -> dict:
    """`open_weights`, whose arguments and errors these are, and `Weights.read(placement)`."""
    return open_weights(files, table, dtype, ignored, aliases, prefix, rename).read(placement)


def _index_problems(held: Mapping[Path, Collection[str]]) -> list[str]:
    """Where a sharded folder's index and its files say different things."""
    folder = next(iter(held)).parent
    if not (folder / INDEX).is_file():
        return []
    said = set(_weight_map(folder).items())
    if not {name for _, name in said} & {file.name for file in held}:
        return []  # other files of the folder than those of the index
    found = {(key, file.name) for file, keys in held.items() for key in keys}
    return [
        *(f"{name} holds {plain(key)}, but {INDEX} does not say so" for key, name in found - said),
        *(
            f"{INDEX} says that {name} holds {plain(key)}, but it does not"
            for key, name in said - found
        ),
    ]


def _check(name: str, tensor: _Stored, shape: tuple[int, ...]) -> list[str]:
    if tensor.shape != shape:
        return [
            f"misshapen: {name} is {shown(list(tensor.shape))}, the config asks for {list(shape)}"
        ]
    if tensor.dtype not in _FLOATS:
        return [f"{name} is {plain(tensor.dtype)}; only {', '.join(_FLOATS)} are read"]
    return []


def _equal(one: _Stored, other: _Stored) -> bool:
    """Whether two tensors in files hold the same, a few rows in memory at a time."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= _FLOATS.keys():
        return False
    first, second = (tensor.view(_map(tensor.file, tensor.size)) for tensor in (one, other))
    pieces = [slice(i, i + 4096) for i in range(0, one.shape[0], 4096)]
    return all(np.array_equal(first[piece], second[piece]) for piece in pieces)


def _report(folder: Path, problems: list[str]) -> str:
    return (
        f"{folder}: problems with the weights ({len(problems)}):\n  {listed(problems)}\n"
        "The weights do not belong to this config.json, or the model is of another family."
    )


def _nest(flat: Mapping[tuple[str, ...], Any]) -> dict:
    """{("a", "b"): x} -> {"a": {"b": x}}."""
    nested: dict = {}
    for path, value in flat.items():
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return nested
