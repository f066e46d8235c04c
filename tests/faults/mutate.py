"""Damage to files, by their format: JSON values, safetensors headers, GGUF fields, text and bytes.

In: a case, which is the files of a folder by name, and a generator of random numbers. Out: the case
with one to four changes. What is changed stays mostly well formed, so that the damage gets past
the first check; what a stranger would try on purpose (claims of terabytes, deep nesting, paths out
of the folder, numbers without end) is drawn more often than chance would.
"""

from __future__ import annotations

import json
import random
import re
import struct
from typing import Any

Case = dict[str, bytes]

CANARY = "canary.json"  # lies beside the folder that is read; nothing may open it


class Raw(str):
    """Text that goes into the JSON as it is, quoted by nothing."""


NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 16, 255, 4097, 2**31 - 1, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30,
    -(2**63), 0.5, -0.0, 1e-320, 1e38, 1e308, 2.0, 1.0, Raw("1e999"), Raw("-1e999"), Raw("NaN"),
    Raw("Infinity"), Raw("-Infinity"), Raw("9" * 400), Raw("1" * 5000), Raw("1." + "0" * 3000),
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "x", "\0", "a\0b", "\ud800", "\udcff", "\u202e\u200f", "\ufdd0\U0010ffff", "\r\n\t",
    "\u2028", "\x1b[2J", "e\u0301" * 3, "a" * 5000, "{source}", "%s", "..", ".", "/",
    "../" + CANARY, "../../" + CANARY, "/etc/passwd", "../" + CANARY + "\0", "C:\\x", "~", "file:///etc/passwd",
    "__class__", "linear", "yarn", "mean", "(a+)+$", "true", "F32", "I64", "BF16", "nan",
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [{}], {"": {}}, [None], [[], [[]]], {"a": {"b": {"c": []}}},
    Raw("[" * 100_000), Raw("[" * 3000 + "]" * 3000), Raw("[" * 900 + "]" * 900),
    Raw("[" * 480 + "]" * 480), Raw('{"a":' * 700 + "1" + "}" * 700),
    Raw('{"a": 1, "a": [2]}'), Raw("[1,]"), Raw("{'a': 1}"), Raw("undefined"), Raw('"\\ud800"'),
    Raw("[" + "1," * 3000 + "1]"),
)  # fmt: skip
BYTES = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b"\r\n", b'"', b"'", b",",
    b"\t", b"\\", b"{", b"}", b"[", b"]", b":", b"\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff\xff\xff\x7f", b"\0\0\0\0\0\0\0\0", b"\x80" * 10,
    b"\xe2\x80\xae", b"\x1b[0m", b"a" * 3000, b"1" * 5000,
)  # fmt: skip


def mutate(case: Case, rng: random.Random) -> Case:
    """The case with one to four changes."""
    out = dict(case)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        if not out:
            return out
        # the larger files are rarely what decides
        name = rng.choice(sorted(out))
        if rng.random() < 0.02:
            del out[name]
        elif rng.random() < 0.02:
            out[name] = out[rng.choice(sorted(out))]
        else:
            out[name] = _mutate_file(name, out[name], rng)
    return out


def _mutate_file(name: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.75:
        try:
            if name.endswith(".json"):
                return _json_text(_mutate_value(json.loads(data), rng), rng)
            if name.endswith((".jsonl", ".ndjson")):
                lines = data.split(b"\n")
                place = rng.randrange(len(lines))
                lines[place] = _json_text(_mutate_value(json.loads(lines[place]), rng), rng)
                return b"\n".join(lines)
            if name.endswith(".safetensors"):
                return _mutate_safetensors(data, rng)
            if name.endswith(".gguf"):
                return _mutate_gguf(data, rng)
        except (ValueError, RecursionError, OverflowError, struct.error):  # damaged before
            pass
    return _mutate_bytes(data, rng)


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    kind = rng.randrange(8)
    start = rng.randrange(len(out) + 1)
    stop = min(len(out), start + rng.choice((1, 1, 2, 4, 8, 16, 64)))
    if kind == 0 and out:
        out[start % len(out)] ^= 1 << rng.randrange(8)
    elif kind == 1 and out:
        out[start % len(out)] = rng.randrange(256)
    elif kind == 2:
        del out[start:stop]
    elif kind == 3:
        out[start:start] = rng.choice(BYTES)
    elif kind == 4:
        value = rng.choice(BYTES)
        out[start : start + len(value)] = value
    elif kind == 5:
        out[start:start] = out[start:stop] * rng.choice((1, 2, 50))
    elif kind == 6:
        del out[start:]
    elif out:  # a number in the text, or a word of the file elsewhere
        words = list(re.finditer(rb"[0-9]+|[A-Za-z_.]{2,}", bytes(out[:20_000])))
        if words:
            word = rng.choice(words)
            other = rng.choice(words)[0]
            number = str(rng.choice((0, 1, 2**31, 2**63, 10**30))).encode()
            out[word.start() : word.end()] = number if word[0].isdigit() else other
    return bytes(out)


# JSON


def _value(rng: random.Random) -> Any:
    return rng.choice(rng.choice((NUMBERS, TEXTS, SHAPES)))


def _places(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """(container, key) of every value below, those of huge containers thinned."""
    if isinstance(value, dict):
        keys = list(value)[:200]
    elif isinstance(value, list):
        keys = list(range(min(len(value), 50)))
    else:
        return found
    for key in keys:
        found.append((value, key))
        if depth < 6 and len(found) < 600:
            _places(value[key], found, depth + 1)
    return found


def _mutate_value(value: Any, rng: random.Random) -> Any:
    places = _places(value, [])
    if not places or rng.random() < 0.02:
        return _value(rng)
    container, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind < 5:
        container[key] = _value(rng)
    elif kind == 5 and isinstance(container[key], int | float):
        container[key] = container[key] * rng.choice((-1, 0, 2, 0.5, 1000)) + rng.choice((0, 1, -1))
    elif kind == 6:
        del container[key]
    elif kind == 7:
        other, name = rng.choice(places)
        container[key] = other[name] if other is not container else _value(rng)
    elif kind == 8 and isinstance(container, dict):
        container[str(rng.choice(TEXTS))] = container.pop(key)
    elif isinstance(container, dict):
        container[str(rng.choice((*TEXTS, f"{key}2")))] = _value(rng)
    else:
        container.append(_value(rng))
    return value


def _json_text(value: Any, rng: random.Random) -> bytes:
    raws: list[str] = []

    def cleared(node: Any, depth: int = 0) -> Any:
        if isinstance(node, Raw) or depth > 12:
            raws.append(str(node) if isinstance(node, Raw) else "0")
            return f"<<RAW{len(raws) - 1}>>"
        if isinstance(node, dict):
            return {key: cleared(child, depth + 1) for key, child in node.items()}
        return [cleared(child, depth + 1) for child in node] if isinstance(node, list) else node

    text = json.dumps(cleared(value), ensure_ascii=rng.random() < 0.5)
    for i, raw in enumerate(raws):
        text = text.replace(f'"<<RAW{i}>>"', raw)
    if rng.random() < 0.05:  # one name twice
        names = re.findall(r'"([^"\\]{1,40})": ', text)
        if len(names) > 1:
            text = text.replace(f'"{rng.choice(names)}": ', f'"{rng.choice(names)}": ', 1)
    return text.encode("utf-8", "surrogatepass")


# safetensors: 8 bytes of length, a JSON header, the tensors


def _mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + size], data[8 + size :]
    kind = rng.randrange(6)
    if kind == 0:
        size = rng.choice((0, 1, size - 1, size + 1, len(data), 2**32, 2**40, 2**63, 2**64 - 1))
        return (size % 2**64).to_bytes(8, "little") + data[8:]
    if kind == 1:
        return data[: rng.randrange(len(data) + 1)]
    if kind == 2:
        header = _mutate_bytes(header, rng)
    else:
        entries = json.loads(header)
        if not isinstance(entries, dict) or not entries:
            raise ValueError("damaged before")
        name = rng.choice(sorted(entries))
        entry = entries[name]
        if kind == 3 or name == "__metadata__" or not isinstance(entry, dict):
            entries = _mutate_value(entries, rng)
        elif kind == 4 and isinstance(entry.get("data_offsets"), list):  # it fits itself
            wide = rng.choice((0, 2**20, 2**40, 2**62, 2**63))
            entry["shape"] = rng.choice(([wide], [wide, wide], [1] * 3000, [-1], [], [0, wide]))
            if rng.random() < 0.5:
                entry["data_offsets"] = [0, 4 * wide]
        else:
            entry["dtype"] = rng.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "C64", "?"))
        header = _json_text(entries, rng)
    return len(header).to_bytes(8, "little") + header + body


# GGUF: magic, version, two counts, key-values, tensor entries, data


def _mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    kind = rng.randrange(5)
    if kind == 0:  # version and counts
        at, width = rng.choice(((4, 4), (8, 8), (16, 8)))
        value = rng.choice((0, 1, 2, 3, 4, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
        out[at : at + width] = (value % 256**width).to_bytes(width, "little")
        return bytes(out)
    if kind == 1:  # a length or number somewhere in the metadata
        at = rng.randrange(24, max(25, min(len(out), 12_000)))
        value = rng.choice((0, 1, 9, 255, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
        width = rng.choice((4, 8))
        out[at : at + width] = (value % 256**width).to_bytes(width, "little")
        return bytes(out)
    keys = [m for m in re.finditer(rb"(?:llama|tokenizer|general)\.[a-z_.]+", data)]
    if not keys:
        return _mutate_bytes(data, rng)
    key = rng.choice(keys)
    if kind == 2:  # the type or the first bytes of a value
        at = key.end() + rng.choice((0, 0, 4, 8))
        out[at : at + 4] = rng.choice((0, 1, 4, 6, 7, 8, 9, 12, 13, 2**31)).to_bytes(4, "little")
    elif kind == 3:  # another name of the same length: the field is gone
        out[key.start() : key.end()] = bytes(reversed(key[0]))
    else:
        at = key.end() + 4
        out[at : at + 4] = rng.choice(
            (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"\0\0\xc0\x7f", b"\0\0\x80\x7f")
        )
    return bytes(out)
