"""What strangers wrote, read within bounds: JSON, names that stay in their folder, short messages.

Every JSON file and row of the package that did not come from the package itself passes through
`parse_json`. Python's own parser takes NaN and names that are there twice, and ends in a
RecursionError or an overflow far from the file on deep nesting and endless numbers.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

MAX_BYTES = 1 << 28  # of one JSON file; the largest published tokenizer.json has a tenth of it
MAX_LINE = 1 << 24  # characters of one row of a data file
_MAX_DEPTH = 64  # of lists and objects
_MAX_DIGITS = 300  # of one number: it still fits a float
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxtuple = 3, 12, 8, 12
_short.maxstring = _short.maxother = _short.maxlong = 80


def shown(value: Any, most: int = 200) -> str:
    """`value` for a message: at most `most` characters, none of them invisible or a control."""
    text = _short.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def plain(name: str) -> str:
    """A name for a message: as it is where a terminal can show it, else as `shown`."""
    return name if name.isprintable() and len(name) <= 200 else shown(name)


def listed(problems: Sequence[str], most: int = 40) -> str:
    """Problems one a line, the first `most` of them."""
    rest = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "\n  ".join([*problems[:most], *rest])


def parse_json(text: str | bytes, lenient: bool = False) -> Any:
    """The value of a JSON text.

    Args:
      text: str, or bytes in UTF-8.
      lenient: take NaN, infinities and lone surrogates, which a row may have where nobody looks.

    Raises:
      ValueError: what is wrong, in a few words: no JSON, NaN or Infinity, a name twice in an
        object, more than 64 levels, a number of more than 300 digits, a lone surrogate.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=None if lenient else _constant,
            parse_float=None if lenient else _float,
            parse_int=_int,
        )
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except RecursionError:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH and _deep(value):
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    if not lenient and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds a lone surrogate") from None
    return value


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
      FileNotFoundError, OSError: it is not there, or cannot be read.
      ValueError: see `parse_json`; a file of more than MAX_BYTES.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); fetch the file again") from None


def inside(folder: Path, name: Any, told_by: Path) -> Path:
    """folder / name, for a name that a file says and that must not lead out of the folder.

    Args:
      folder: where to look.
      name: relative, "" for the folder itself.
      told_by: the file that says the name, for the message.

    Raises:
      ValueError: not printable text, absolute, with a step upwards, or a link out of the folder.
    """
    if isinstance(name, str) and name.isprintable():
        ways = (PurePosixPath(name), PureWindowsPath(name))
        steps = {step for way in ways for step in way.parts}
        if ".." not in steps and not any(way.root or way.drive for way in ways):
            path = folder / name
            if not leaves(path, folder):
                return path
    raise ValueError(f"{told_by}: {shown(name)} is no name of something in the folder")


def leaves(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, leads out of a folder (not: into a hub cache's own blobs)."""
    try:
        end = path.resolve()
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # a name without a file system form, links in a ring
        return True
    cached = end.parent.name == "blobs" and end.parents[1].name.startswith("models--")
    return not cached and not end.is_relative_to(folder.resolve())


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever a library raises on damaged input into ValueError("WHAT: REASON").

    The Rust libraries raise bare Exception, and a PanicException that is no Exception at all.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{what}: {one_line(reason[0])}") from error


def one_line(text: str) -> str:
    """A line of a library for a message: as it is, if a terminal can show it, at most 300 long."""
    shorter = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return shorter if len(shorter) <= 300 else f"{shorter[:297]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice in one object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]}... is too large")
    return value


def _int(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _deep(value: Any) -> bool:
    """Whether lists and objects are nested more than _MAX_DEPTH deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inner = (node.values() if isinstance(node, dict) else node for node in level)
        level = [child for nodes in inner for child in nodes if isinstance(child, dict | list)]
    return bool(level)
