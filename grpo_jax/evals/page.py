"""What a run left, as the report's sections read it, and the HTML small change that they share.

Every text that comes from a run passes `escape`; nothing else is put between tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from grpo_jax.evals.table import FLOORS, MODELS
from grpo_jax.text.scripts import units

Json = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]  # metric -> (step, value), in order

MAX_TEXT = 2000  # characters of one text on the page


class Run(NamedTuple):
    """What the files of a working directory say."""

    name: str
    config: Json  # config.json: {"config", "seed", "versions", "devices", ...}
    metrics: dict[str, Series]  # by stage
    rollouts: list[Json]  # samples.jsonl
    evaluations: dict[str, Json]  # by arm
    comparisons: dict[tuple[str, str], Json]  # (first, second) -> metrics.paired_bootstrap


def flatten(values: Mapping[str, Any], joint: str = "/") -> Json:
    flat: Json = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}{joint}{k}": v for k, v in flatten(value, joint).items()}
        else:
            flat[str(key)] = value
    return flat


def text_span(text: str, reference: str = "") -> str:
    """A text in its own direction; words that the reference has too are underlined."""
    if not text.strip():
        return '<span class="text"><em>nothing</em></span>'
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + " …"
    there = set(units(reference))
    shown = []
    for piece in re.split(r"(\s+)", text):
        found = units(piece)
        shared = found and there.issuperset(found)
        shown.append(f"<u>{escape(piece)}</u>" if shared else escape(piece))
    joined = "".join(shown).replace("</u> <u>", " ")
    tall = " tall" if any("\u0f00" <= char <= "\u0fff" for char in text) else ""
    return f'<span class="text{tall}" dir="auto">{joined}</span>'


def section(values: Mapping[str, Any], name: str) -> Json:
    """A nested object of a file we did not write ourselves; {} if it is not one."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def css_class(arm: str) -> str:
    return arm if arm in MODELS else "floors" if arm in FLOORS else "other"


def signed(value: float, digits: int) -> str:
    """A difference with its sign, and none on a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def p_value(p: float) -> str:
    return "p &lt; 0.01" if p < 0.01 else f"p = {p:.2f}"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
