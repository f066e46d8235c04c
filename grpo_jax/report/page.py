"""The report as the page's sections read it, and the HTML small change that they share.

Every text that comes from a run passes `escape`; nothing else is put between tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from grpo_jax.report.plots import mark
from grpo_jax.report.runs import Json
from grpo_jax.report.table import Column
from grpo_jax.text.scripts import units

MAX_TEXT = 2000  # characters of one text on the page
COLOURS = 8  # of arms, in report.css; behind them the marks and dashes differ


class View(NamedTuple):
    """report.json, and what the sections look up in it."""

    report: Json
    arms: dict[str, Json]  # by name, in order
    columns: list[Column]
    scores: dict[str, Json]  # by arm, as `table.cell` reads them

    def group(self, name: str, floors: bool = True) -> list[str]:
        """The measured arms of a group, in order."""
        return [
            arm
            for arm, entry in self.arms.items()
            if entry["group"] == name
            and arm in self.scores
            and (floors or entry["method"] != "floor")
        ]

    def title(self, arm: str) -> str:
        """The arm's name as HTML."""
        return escape(self.arms[arm]["title"] if arm in self.arms else arm)

    def css(self, arm: str) -> str:
        """The class that sets the arm's colour."""
        entry = self.arms.get(arm, {})
        if entry.get("index") is None:
            return "base" if entry.get("method") == "base" else "floors"
        return f"c{entry['index'] % COLOURS}"

    def symbol(self, arm: str) -> str:
        """The arm's mark, to stand before its name."""
        entry = self.arms.get(arm, {})
        line = '<line class="floor" x1="-6" x2="6" y1="0" y2="0"/>'
        drawn = line if entry.get("method") == "floor" else mark(entry.get("index"), 0, 0, 5)
        return f'<svg class="mark" viewBox="-7 -7 14 14" aria-hidden="true">{drawn}</svg>'


def view(report: Json) -> View:
    """Index a report."""
    arms = {entry["name"]: entry for entry in report["arms"]}
    return View(report, arms, [Column(**c) for c in report["columns"]], report["scores"])


def is_multi(view: View) -> bool:
    """True when the report averages several runs."""
    return view.report["spread"] == "seeds"


def groups(view: View) -> list[str]:
    """The names of the groups, "" first."""
    return list(dict.fromkeys(["", *(arm["group"] for arm in view.arms.values())]))


def group_id(view: View, group: str) -> str:
    """A name for element ids; group names come from the configuration."""
    return str(groups(view).index(group))


def named(view: View, arm: str) -> str:
    """The head of an arm's row: mark and name."""
    return f'<th scope="row">{view.symbol(arm)}{view.title(arm)}</th>'


def flatten(values: Mapping[str, Any], joint: str = "/") -> Json:
    """Nested objects as one, their names joined."""
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
    there = set(units(reference)) if reference else set()
    shown = []
    for piece in re.split(r"(\s+)", text) if there else [text]:
        found = units(piece) if there else []
        shared = found and there.issuperset(found)
        shown.append(f"<u>{escape(piece)}</u>" if shared else escape(piece))
    joined = "".join(shown).replace("</u> <u>", " ")
    script = ""
    if re.search("[\u0f00-\u0fff]", text):
        script = " tall"
    elif re.search("[\u0600-\u077f\ufb50-\ufdff\ufe70-\ufeff]", text):
        script = " arabic"
    return f'<span class="text{script}" dir="auto">{joined}</span>'


Options = Sequence[tuple[str, str]]  # value, and text as HTML


def chooser(name: str, choices: Sequence[tuple[str, Options | Mapping[str, Options]]]) -> str:
    """Labelled lists that pick one of the `panels` of this name; hidden without a script.

    Args:
      choices: label and options of each list, or options under headings; a panel's key is the
        values joined.
    """

    def listing(options: Options) -> str:
        return "".join(f'<option value="{escape(key)}">{text}</option>' for key, text in options)

    lists = []
    for label, options in choices:
        if isinstance(options, Mapping):
            listed = "".join(
                f'<optgroup label="{escape(heading)}">{listing(some)}</optgroup>'
                for heading, some in options.items()
            )
        else:
            listed = listing(options)
        lists.append(f'<label>{label} <select data-for="{name}">{listed}</select></label>')
    return f'<div class="tools" data-tools hidden>{"".join(lists)}</div>'


def panels(name: str, contents: Mapping[Any, str]) -> str:
    """One piece of HTML for each choice, a tuple of values; the first is shown, the others wait."""
    parts = [
        f'<div data-key="{escape("|".join(key))}"{" hidden" if i else ""}>{html}</div>'
        for i, (key, html) in enumerate(contents.items())
    ]
    return (
        f'<div data-panels="{name}">{"".join(parts)}'
        '<p class="none" data-otherwise hidden>This was not measured.</p></div>'
    )


def signed(value: float, digits: int) -> str:
    """A difference with its sign, and none on a zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def p_value(p: float) -> str:
    """A p-value as HTML: two digits, or how small."""
    return "p &lt; 0.01" if p < 0.01 else f"p = {p:.2f}"
