"""The head of a GGUF file, looked at before the gguf library reads it, and what its fields hold.

The library takes the lengths that a file claims: an array said to have 2^62 numbers would fill the
memory, and a field of another type than usual would fail far from here. Layout of the file:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.text.strict import shown

MAX_ITEMS = 1 << 23  # of all arrays together; the largest vocabularies have a tenth
_ARRAY, _STRING = 9, 8
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type -> bytes

_SIZES = (  # integers from 1 on, all required
    "llama.embedding_length", "llama.feed_forward_length", "llama.block_count",
    "llama.context_length", "llama.attention.head_count",
)  # fmt: skip
_MORE_SIZES = (  # integers that may be missing or 0
    "llama.vocab_size", "llama.attention.head_count_kv", "llama.attention.key_length",
    "llama.attention.value_length", "llama.attention.sliding_window",
    "llama.rope.dimension_count", "llama.rope.scaling.original_context_length",
)  # fmt: skip
_NUMBERS = ("llama.rope.freq_base", "llama.rope.scaling.factor", "llama.rope.scale_linear")
_TEXTS = (
    "llama.rope.scaling.type", "tokenizer.ggml.model", "tokenizer.ggml.pre",
    "tokenizer.chat_template", "general.name", "general.license",
)  # fmt: skip
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces")
_LISTS: dict[str, type] = {"token_type": int, "scores": float, "merges": str}
_MAX_LAYERS = 4096


def check_header(file: Path) -> None:
    """Follows the metadata from length to length.

    Raises:
      ValueError: not a GGUF file of version 2 or 3 in this byte order, lengths beyond the end of
        the file, arrays in arrays, or more than MAX_ITEMS in them.
    """
    if file.stat().st_size < 24:
        raise ValueError("too short")
    with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("no GGUF mark at its start")
        version, _, fields = struct.unpack("<IQQ", data[4:24])
        if version not in (2, 3):
            raise ValueError(f"version {version}, wanted 2 or 3")
        at, items = 24, 0

        def number(layout: str) -> int:
            nonlocal at
            width = struct.calcsize(layout)
            if at + width > len(data):
                raise ValueError("its metadata ends early")
            at += width
            return struct.unpack_from(layout, data, at - width)[0]

        def skip(kind: int) -> None:
            nonlocal at
            length = number("<Q") if kind == _STRING else _width(kind)
            at += length
            if at > len(data):
                raise ValueError("its metadata ends early")

        for _ in range(min(fields, MAX_ITEMS)):
            skip(_STRING)
            kind = number("<I")
            if kind != _ARRAY:
                skip(kind)
                continue
            kind, count = number("<I"), number("<Q")
            items += count
            if items > MAX_ITEMS:
                raise ValueError(f"arrays of {items} items")
            if kind == _STRING:
                for _ in range(count):
                    skip(kind)
            else:
                at += count * _width(kind)


def _width(kind: int) -> int:
    if kind not in _WIDTHS:
        raise ValueError(f"a field of type {kind}")
    return _WIDTHS[kind]


def check_fields(file: Path, fields: Mapping[str, Any]) -> None:
    """Raises ValueError where a field that we read is missing or is not what it should be."""

    def fail(name: str, wanted: str) -> None:
        raise ValueError(f"{file}: {name} is {shown(fields.get(name))}, wanted {wanted}")

    for name in (*_SIZES, *_MORE_SIZES):
        value, least = fields.get(name, None if name in _SIZES else 0), int(name in _SIZES)
        most = _MAX_LAYERS if name == "llama.block_count" else 2**31 - 1
        if type(value) is not int or not least <= value <= most:
            fail(name, f"an integer from {least} to {most}")
    name = "llama.attention.layer_norm_rms_epsilon"
    if not _is_number(fields.get(name)) or fields[name] <= 0:
        fail(name, "a positive number")
    for name in _NUMBERS:
        if not _is_number(fields.get(name, 0.0)) or fields.get(name, 0.0) < 0:
            fail(name, "a number, not negative")
    for name in _TEXTS:
        if not isinstance(fields.get(name, ""), str):
            fail(name, "text")
    for short in _FLAGS:
        name = f"tokenizer.ggml.{short}"
        if not isinstance(fields.get(name, False), bool):
            fail(name, "true or false")
    tokens = fields.get("tokenizer.ggml.tokens")
    if not _is_list(tokens, str) or not tokens:
        fail("tokenizer.ggml.tokens", "a list of texts")
        return
    for short, kind in _LISTS.items():
        name = f"tokenizer.ggml.{short}"
        values = fields.get(name, [])
        size = 0 if name not in fields or short == "merges" else len(tokens)
        if not _is_list(values, kind) or (size and len(values) != size):
            fail(name, f"a list of {len(tokens) if size else 'texts'}")
    for name, value in fields.items():
        special = name.startswith("tokenizer.ggml.") and name.endswith("_token_id")
        if special and (type(value) is not int or not 0 <= value < len(tokens)):
            fail(name, f"an id below {len(tokens)}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_list(values: Any, kind: type) -> bool:
    """Whether it is a list of `kind`, numbers finite."""
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        return False
    return kind is not float or all(map(math.isfinite, values))


def check_shapes(file: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raises ValueError where a tensor has not the shape that the metadata ask for.

    Args:
      file: for messages.
      stored: name -> the gguf library's tensor.
      config: the config.json made of the metadata.
    """
    hidden, ffn, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "token_embd": (vocab, hidden), "output": (vocab, hidden), "output_norm": (hidden,),
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_q": (q, hidden),
        "attn_k": (kv, hidden), "attn_v": (kv, hidden), "attn_output": (hidden, q),
        "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden), "ffn_down": (hidden, ffn),
        "rope_freqs": (config["head_dim"] // 2,),
    }  # fmt: skip
    for name, tensor in stored.items():
        parts = name.split(".")
        wanted = shapes.get(parts[-2]) if len(parts) > 1 and parts[-1] == "weight" else None
        got = tuple(reversed(tensor.shape.tolist()))
        if wanted is not None and got != wanted:
            raise ValueError(
                f"{file}: {name} is {shown(list(got))}, the metadata ask for {list(wanted)}"
            )
