"""What reading and writing weights have in common: file names, dtypes, a tensor's place."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Slot(NamedTuple):
    """Where one tensor goes: params[path][layer], or params[path] if layer is None."""

    path: tuple[str, ...]
    layer: int | None
    transpose: bool  # Hugging Face stores a linear's weight as [out, in]
    shape: tuple[int, ...]  # as Hugging Face has it


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of "float32", "bfloat16" or "float16".

    Raises:
      ValueError: any other name.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r}: use {', '.join(_DTYPES)}")
    return np.dtype(_DTYPES[name])
