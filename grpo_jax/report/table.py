"""Columns of the results, cells of an evaluation, and the plain-text table at the end of a run.

An evaluation is what WORKDIR/evaluation/ARM.json holds: {"arm", "target": {metric: {"value",
"low", "high"}}, "retention": {metric: number or the same}, "samples", "seconds", "tokens"}.
Anything may be missing: floors have no retention, a run without a judge no judge similarity.

Metrics that are not listed here get a column of their own: "SET/METRIC" under target is a metric on
another test set, "judge_similarity/NAME" one more judge, and anything else under retention a task
of which more is better, unless its entry says {"better": -1} or 0.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# In the order of the rows; unknown arms come after the models and before the floors.
MODELS = {"base": "base", "sft": "SFT", "grpo": "GRPO", "recover": "recover"}
FLOORS = {"copy": "copy floor", "tm": "TM floor"}


WIDTH = 160  # columns of a terminal that the plain table keeps to
HEAD = 12  # characters that a heading may always have in one line


class Column(NamedTuple):
    """One metric as people read it."""

    key: str
    section: str  # "target" or "retention"
    title: str
    digits: int
    scale: float  # shown = value * scale
    better: int  # 1: higher, -1: lower, 0: neither
    about: str


COLUMNS = (
    Column("chrf++", "target", "chrF++", 1, 1, 1, "character and word n-gram F-score, 0 to 100"),
    Column("bleu", "target", "BLEU", 1, 1, 1, "sacrebleu corpus BLEU-4, 0 to 100"),
    Column("rouge_l", "target", "ROUGE-L", 1, 1, 1, "longest common subsequence F1, 0 to 100"),
    Column("similarity", "target", "sim", 3, 1, 1, "cosine with the reference, reward's encoder"),
    Column("judge_similarity", "target", "judge sim", 3, 1, 1, "the same under a second encoder"),
    Column("language_consistency", "target", "lang %", 1, 100, 1, "outputs in the right language"),
    Column("length_ratio", "target", "len ratio", 2, 1, 0, "output length over reference length"),
    Column("nll_mean", "retention", "NLL mean", 3, 1, -1, "nats a token on general text"),
    Column("nll_p90", "retention", "NLL P90", 3, 1, -1, "the worst tenth of passages starts here"),
    Column("kl_general", "retention", "KL(base‖·)", 3, 1, -1, "nats a token, on general text"),
    Column("kl_task", "retention", "KL task", 3, 1, -1, "nats a token, on the task's own prompts"),
)
FAILURES = (
    Column("copy_rate", "target", "copies %", 1, 100, -1, "outputs made of the source's words"),
    Column("empty_rate", "target", "empty %", 1, 100, -1, "outputs without visible text"),
    Column("repeated_4grams", "target", "repeats %", 1, 100, -1, "4-grams that occurred before"),
)
_KNOWN = {column.key: column for column in (*COLUMNS, *FAILURES)}


class Cell(NamedTuple):
    """A value in the column's unit, with its 95% interval where there is one."""

    value: float
    low: float | None
    high: float | None

    def shifted(self, by: float) -> Cell:
        """The same interval elsewhere."""
        low, high = (None if end is None else end + by for end in (self.low, self.high))
        return Cell(self.value + by, low, high)


def is_number(value: Any) -> bool:
    """True for ints and floats, not for bools."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(evaluation: Mapping[str, Any], column: Column) -> Cell | None:
    """Look a column up in an evaluation; None where it was not measured."""
    section = evaluation.get(column.section)
    entry = section.get(column.key) if isinstance(section, Mapping) else None
    if not isinstance(entry, Mapping):
        entry = {"value": entry}
    value, low, high = (
        float(entry[name]) * column.scale if is_number(entry.get(name)) else None
        for name in ("value", "low", "high")
    )
    return None if value is None else Cell(value, low, high)


def columns(evaluations: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The columns that these evaluations fill: COLUMNS and FAILURES first, then their own."""
    evaluations = list(evaluations)
    found = {c.key: c for c in _KNOWN.values() if any(cell(e, c) for e in evaluations)}
    for section in ("target", "retention"):
        for evaluation in evaluations:
            entries = evaluation.get(section)
            for key, entry in entries.items() if isinstance(entries, Mapping) else ():
                column = _unlisted(str(key), section, entry)
                if key not in found and cell(evaluation, column):
                    found[str(key)] = column
    return list(found.values())


def is_known(column: Column) -> bool:
    """True for a column of COLUMNS or FAILURES, and for another judge's similarity."""
    return column.key in _KNOWN or column.key.split("/")[0] in _KNOWN


def _unlisted(key: str, section: str, entry: Any) -> Column:
    first, _, last = key.rpartition("/")
    if first in _KNOWN:  # judge_similarity/NAME
        like, name = _KNOWN[first], last
        return like._replace(key=key, title=f"{like.title} {name}", about=f"{like.about}: {name}")
    if last in _KNOWN and section == "target":  # SET/chrf++
        like = _KNOWN[last]
        return like._replace(key=key, title=f"{first} {like.title}")
    better = entry.get("better", 1) if isinstance(entry, Mapping) else 1
    value: Any = entry.get("value") if isinstance(entry, Mapping) else entry
    digits = 1 if is_number(value) and abs(value) > 1.5 else 3
    better = better if better in (-1, 0, 1) else 1
    return Column(
        key, section, key.replace("_", " "), digits, 1, better, f"as {section} reports it"
    )


def order(arms: Iterable[str]) -> list[str]:
    """Sort arms: base, SFT, GRPO, recover, others by name, floors."""
    first, last = list(MODELS), list(FLOORS)

    def place(arm: str) -> tuple[int, int, str]:
        if arm in MODELS:
            return 0, first.index(arm), arm
        return (2, last.index(arm), arm) if arm in FLOORS else (1, 0, arm)

    return sorted(arms, key=place)


def title(arm: str) -> str:
    """The arm's name for readers."""
    return MODELS.get(arm) or FLOORS.get(arm) or arm


def table(
    evaluations: Mapping[str, Mapping[str, Any]],
    arms: Sequence[str] | None = None,
    titles: Mapping[str, str] | None = None,
) -> str:
    """Lay evaluations out as plain text: one row an arm, target metrics | retention.

    Args:
      evaluations: {arm: evaluation}. Columns that no arm has are left out; '-' marks a gap; ± is
        half the width of the interval that the evaluation states (95%, or one standard deviation
        to each side when seeds were averaged).
      arms: the rows, in their order; None takes all, ordered by `order`.
      titles: what to call them; `title` where it says nothing.

    Returns:
      Lines of at most WIDTH columns without a trailing newline. Where they would be longer, other
      test sets and tasks follow below, in further tables. '' when there is nothing.
    """
    arms = order(evaluations) if arms is None else [arm for arm in arms if arm in evaluations]
    failures = {column.key for column in FAILURES}
    shown = [
        c
        for c in columns(evaluations[arm] for arm in arms)
        if c.key not in failures and c.key.split("/")[-1] not in failures
    ]
    names = [(titles or {}).get(arm) or title(arm) for arm in arms]
    room = WIDTH - max(map(len, names), default=0) - 1
    laid = []
    for column in sorted(shown, key=lambda c: c.section != "target"):
        texts = [_text(cell(evaluations[arm], column), column) for arm in arms]
        laid.append(_Laid(column, _broken(column.title, max(map(len, texts))), texts))
    parts = [laid] if laid else []
    if sum(each.width + 2 for each in laid) > room:
        parts = []
        for usual in (True, False):
            chosen = [each for each in laid if is_known(each.column) is usual]
            for i, each in enumerate(chosen):
                if i == 0 or sum(one.width + 2 for one in (*parts[-1], each)) > room:
                    parts.append([])
                parts[-1].append(each)
    return "\n\n".join(_join(names, part) for part in parts)


class _Laid(NamedTuple):
    """A column of the plain table."""

    column: Column
    head: list[str]  # lines
    texts: list[str]  # one a row

    @property
    def width(self) -> int:
        return max(map(len, (*self.head, *self.texts)))


def _broken(text: str, width: int) -> list[str]:
    """A heading in lines, where it is much longer than what stands under it."""
    spaced = text.replace("/", "/ ").replace("_", "_ ")
    if len(text) <= max(width, HEAD):
        return [text]
    lines = textwrap.wrap(spaced, max(width, HEAD), break_long_words=False)
    return [line.replace("/ ", "/").replace("_ ", "_") for line in lines]


def _join(names: list[str], part: list[_Laid]) -> str:
    """Lines of one table."""
    heads = max(len(laid.head) for laid in part)
    labels = [*[""] * heads, *names]
    width = max(map(len, labels))
    split = sum(laid.column.section == "target" for laid in part)
    lines = []
    for i, label in enumerate(labels):
        cells = []
        for laid in part:
            column = [*[""] * (heads - len(laid.head)), *laid.head, *laid.texts]
            cells.append(column[i].rjust(laid.width))
        halves = ["  ".join([label.ljust(width), *cells[:split]]), "  ".join(cells[split:])]
        lines.append(" │ ".join(half for half in halves if half).rstrip())
    return "\n".join([*lines[:heads], "─" * max(map(len, lines[:heads])), *lines[heads:]])


def _text(found: Cell | None, column: Column) -> str:
    if found is None:
        return "-"
    text = f"{found.value:.{column.digits}f}"
    has_interval = column.section == "target" and column.better and column.scale == 1
    if not has_interval or found.low is None or found.high is None:
        return text
    return f"{text} ±{(found.high - found.low) / 2:.{column.digits}f}"
