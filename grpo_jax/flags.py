"""`check_flags`: the command line in, nothing or one line that says what to write instead out.

Runs before absl and ml_collections parse: their own answers to a misspelled field are stack
traces, and a tuple written as a,b silently becomes a tuple of one string.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from grpo_jax.config import Arm, Config
from grpo_jax.config_dicts import did_you_mean
from grpo_jax.config_values import describe


def check_flags(argv: list[str], config: type = Config, name: str = "config") -> None:
    """Checks `--config=FILE` and every `--config.x.y=VALUE` before they are parsed.

    Args:
      argv: the command line, the program's name first.
      config: the Config class.
      name: of the flag.

    Raises:
      SystemExit: with status 2, after one line on stderr that says what to write instead.
    """
    try:
        _check_flags(argv[1:], config, name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _check_flags(args: list[str], kind: type, name: str) -> None:
    types = _field_types(kind)
    seen_file = False
    position = 0
    while position < len(args) and args[position] != "--":
        match = re.fullmatch(rf"--?(no)?{name}(?:\.([^=]*))?(?:=(.*))?", args[position], re.DOTALL)
        position += 1
        if not match:
            continue
        negated, field, value = match.groups()
        hint = types.get(field) if field else None
        if value is None and not negated and hint is not bool and position < len(args):
            value, position = args[position], position + 1  # --config.seed 3
        if field is None:
            _check_file(value or "", name)
            seen_file = True
        elif not seen_file:
            raise ValueError(f"--{name}.{field} stands before --{name}=FILE; give the file first")
        elif hint is None:
            near = did_you_mean(field, [f for f, h in types.items() if not _is_section(h)])
            raise ValueError(f"--{name}.{field}: the configuration has no such field{near}")
        else:
            _check_value(f"--{name}.{field}", value, hint, bool(negated))


def _field_types(kind: type, prefix: str = "") -> dict[str, Any]:
    """Dotted field -> type, sections included."""
    types: dict[str, Any] = {}
    for field, hint in get_type_hints(kind).items():
        types[prefix + field] = hint
        if _is_section(hint):
            types |= _field_types(hint, f"{prefix}{field}.")
    return types


def _is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def _check_file(path: str, name: str) -> None:
    if not os.path.isfile(path.split(":", 1)[0]):
        folder = Path(path).parent
        files = [file.name for file in folder.glob("*.py")] if folder.is_dir() else []
        close = difflib.get_close_matches(Path(path).name, files, n=1)
        near = f"; did you mean {folder / close[0]}?" if close else ""
        raise ValueError(f"--{name}={path}: no such file{near}")


def _check_value(flag: str, value: str | None, hint: Any, negated: bool) -> None:
    if _is_section(hint):
        fields = ", ".join(get_type_hints(hint))
        raise ValueError(f"{flag}: is a section, not a value; set one of its fields: {fields}")
    if hint is bool and (negated or value is None):
        return
    if negated:
        raise ValueError(
            f"{flag.replace('--', '--no', 1)}: only true-or-false fields can be negated"
        )
    if value is None:
        raise ValueError(f"{flag}: got no value, wanted {describe(hint)}")
    if hint == tuple[Arm, ...]:
        raise ValueError(f"{flag}: arms stand in the config file; --config.only picks some")
    if get_origin(hint) is tuple:
        _check_tuple(flag, value)
        return
    for kind in get_args(hint) or (hint,):
        if kind is str or _parses(value, kind):
            return
    kinds = [k for k in get_args(hint) or (hint,) if k is not type(None)]
    raise ValueError(f"{flag}: got {value!r}, wanted {' or '.join(map(describe, kinds))}")


def _parses(value: str, kind: type) -> bool:
    try:
        if kind is int:
            int(value, 16 if value[:2].lower() == "0x" else 10)
        elif kind is float:
            float(value)
        else:
            return kind is bool and value.lower() in ("true", "t", "1", "false", "f", "0")
    except ValueError:
        return False
    return True


def _check_tuple(flag: str, value: str) -> None:
    try:
        parsed = ast.literal_eval(value)
    except (ValueError, SyntaxError):  # a bare word is fine: config_flags makes it a tuple of one
        parsed = value
    if isinstance(parsed, str):
        parsed = (parsed,) if re.fullmatch(r"[^\s,()\[\]]+", parsed) else None
    if isinstance(parsed, tuple | list) and all(isinstance(v, str) for v in parsed):
        return
    words = re.findall(r"[^\s,()\[\]'\"]+", value) or ["a", "b"]
    literal = "(" + ",".join(f"'{w}'" for w in words) + ("," if len(words) == 1 else "") + ")"
    raise ValueError(f'{flag}: got {value!r}, wanted a tuple of strings: {flag}="{literal}"')
