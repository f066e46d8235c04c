"""Arms and columns of the results, and the plain-text table at the end of a run.

An evaluation is what WORKDIR/evaluation/ARM.json holds: {"arm", "target": {metric: {"value",
"low", "high"}}, "retention": {metric: number or the same}, "samples", "seconds", "tokens"}.
Anything may be missing: floors have no retention, a run without a judge no judge similarity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# In the order of the rows; unknown arms come after the models and before the floors.
MODELS = {"base": "base", "sft": "SFT", "grpo": "GRPO", "recover": "recover"}
FLOORS = {"copy": "copy floor", "tm": "TM floor"}


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


class Cell(NamedTuple):
    """A value in the column's unit, with its 95% interval where there is one."""

    value: float
    low: float | None
    high: float | None

    def shifted(self, by: float) -> Cell:
        """The same interval elsewhere."""
        low, high = (None if end is None else end + by for end in (self.low, self.high))
        return Cell(self.value + by, low, high)


def cell(evaluation: Mapping[str, Any], column: Column) -> Cell | None:
    """Look a column up in an evaluation; None where it was not measured."""
    entry = (evaluation.get(column.section) or {}).get(column.key)
    if not isinstance(entry, Mapping):
        entry = {"value": entry}
    value, low, high = (
        float(entry[name]) * column.scale if isinstance(entry.get(name), int | float) else None
        for name in ("value", "low", "high")
    )
    return None if value is None else Cell(value, low, high)


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


def table(evaluations: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay evaluations out as plain text: one row an arm, target metrics | retention.

    Args:
      evaluations: {arm: evaluation}. Columns that no arm has are left out; '-' marks a gap; ± is
        half the width of the 95% interval.

    Returns:
      Lines without a trailing newline; '' when there is nothing to show.
    """
    shown = [c for c in COLUMNS if any(cell(e, c) for e in evaluations.values())]
    if not shown:
        return ""
    header = ["", *(column.title for column in shown)]
    lines = [
        [title(arm), *(_text(cell(evaluations[arm], column), column) for column in shown)]
        for arm in order(evaluations)
    ]
    grid = [header, *lines]
    widths = [max(len(row[i]) for row in grid) for i in range(len(header))]
    split = 1 + sum(column.section == "target" for column in shown)

    def join(row: list[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        halves = ["  ".join(cells[:split]), "  ".join(cells[split:])]
        return " │ ".join(half for half in halves if half).rstrip()

    rule = "─" * len(join(header))
    return "\n".join([join(header), rule, *(join(line) for line in lines)])


def _text(found: Cell | None, column: Column) -> str:
    if found is None:
        return "-"
    text = f"{found.value:.{column.digits}f}"
    has_interval = column.section == "target" and column.better and column.scale == 1
    if not has_interval or found.low is None or found.high is None:
        return text
    return f"{text} ±{(found.high - found.low) / 2:.{column.digits}f}"
