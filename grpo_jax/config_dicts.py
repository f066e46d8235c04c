"""A configuration as nested or flat dicts, and the part of it that identifies a run."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable
from typing import Any, get_args, get_origin, get_type_hints

from grpo_jax.config import Config

# Not part of what an arm is, so these may change when it is resumed: what changes nothing that was
# computed so far, and what only a stage behind the training reads, which then runs again.
CADENCE = (
    "stages", "arms", "only", "seed", "on_nonfinite", "log", "checkpoint.every", "checkpoint.keep",
    "mesh", "model.remat", "encoder.batch_size", "grpo.lanes",
)  # fmt: skip
AFTER_TRAINING = {"evaluate": ("evaluation", "encoder.judge"), "export": ("export",)}


def to_dict(cfg: Any) -> dict[str, Any]:
    """A section as nested JSON-ready dicts; tuples become lists, ints in float fields floats."""
    hints = get_type_hints(type(cfg))
    out: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        elif isinstance(value, tuple):
            value = [to_dict(v) if dataclasses.is_dataclass(v) else v for v in value]
        elif isinstance(value, dict):
            value = flatten(value)  # {"grpo": {"beta": 0}} and {"grpo.beta": 0} are the same
        elif type(value) is int and float in (hints[f.name], *get_args(hints[f.name])):
            value = float(value)  # beta=1 and beta=1.0 are the same run
        out[f.name] = value
    return out


def from_dict(values: dict[str, Any], kind: type = Config, prefix: str = "") -> Any:
    """The inverse of `to_dict`: absent fields keep their defaults; ValueError for unknown ones."""
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"config: no field {prefix}{name}{did_you_mean(name, hints)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            value = from_dict(value, hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif get_origin(hint) is tuple:
            kind_of = get_args(hint)[0]
            nested = dataclasses.is_dataclass(kind_of)
            value = tuple(from_dict(v, kind_of, f"{prefix}{name}.") if nested else v for v in value)
        fields[name] = value
    return kind(**fields)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict of dotted names: {"grpo.beta": 0.01, ...}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def identity(values: dict[str, Any]) -> dict[str, Any]:
    """The dotted fields of a `to_dict` that decide what a run trains."""
    others = CADENCE + sum(AFTER_TRAINING.values(), ())
    return {k: v for k, v in flatten(values).items() if not under(k, others)}


def stage_fields(values: dict[str, Any], stage: str) -> dict[str, Any]:
    """The dotted fields of a `to_dict` that only this stage, behind the training, depends on."""
    own = AFTER_TRAINING.get(stage, ())
    return {k: v for k, v in flatten(values).items() if under(k, own)}


def fingerprint(cfg: Config) -> str:
    """16 hex digits that name the run's identity; equal fingerprints compute the same thing."""
    text = json.dumps(identity(to_dict(cfg)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def under(name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a dotted name is one of the prefixes or lies below one."""
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """'; did you mean ...?' with the options closest to `name`, or '' when none is close."""
    options = list(options)
    last = name.rsplit(".", 1)[-1]
    close = [o for o in options if o.rsplit(".", 1)[-1] == last]
    close = close or difflib.get_close_matches(name, options, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(close[:3])}?" if close else ""
