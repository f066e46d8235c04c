"""The report's results, as HTML: tables of arms, and behind them the paired comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grpo_jax.report import plots
from grpo_jax.report.page import View, is_multi, named
from grpo_jax.report.page_compare import comparisons
from grpo_jax.report.table import COLUMNS, FAILURES, Cell, Column, cell, is_known

FAILURE_NOTE = "Share of outputs. References that copy the source are not held against an arm."
_FAILURES = {column.key for column in FAILURES}
_HEADLINE = {column.key for column in COLUMNS}


def results(view: View, group: str) -> str:
    """Tables of one group: scores, tasks, other test sets, failures, comparisons."""
    arms = view.group(group)
    if not arms:
        return '<p class="none">The evaluation stage has not finished an arm yet.</p>'
    filled = [c for c in view.columns if any(cell(view.scores[arm], c) for arm in arms)]
    main = [c for c in filled if c.key not in _FAILURES and is_known(c)]
    domain = [c for c in filled if c.section == "target" and c.key not in _FAILURES | _HEADLINE]
    main = [c for c in main if c.key in _HEADLINE or c.key.startswith("judge")]
    main.sort(key=lambda c: c.section != "target")
    domain = [c for c in domain if c not in main]
    tasks = [c for c in filled if c.section == "retention" and c not in main]
    failures = [c for c in filled if c.key in _FAILURES]
    parts = [_table(view, arms, main, f"Scores of the arms{_of(group)}", banded=True)]
    beside = []
    for name, about, columns in (
        ("Tasks it could do before", "Measured as for base; bold: least lost.", tasks),
        ("How outputs fail", FAILURE_NOTE, failures),
        ("On other text", "Test sets that are unlike the training text.", domain),
    ):
        if columns:
            html = _table(view, arms, columns, name, banded=False)
            beside.append(f'<div><h3>{name}</h3><p class="sub">{about}</p>{html}</div>')
    parts.append(f'<div class="side">{"".join(beside)}</div>' if beside else "")
    seeds = _seeds(view, arms, filled) if is_multi(view) else ""
    sets = {
        "What was learned and kept": main,
        "Tasks": tasks,
        "On other text": domain,
        "How outputs fail": failures,
    }
    return "".join([*parts, seeds, comparisons(view, group, arms, sets)])


def _seeds(view: View, arms: Sequence[str], columns: Sequence[Column]) -> str:
    """The value of every seed behind the means."""
    heads = "".join(f'<th scope="col">{escape(c.title)}</th>' for c in columns)
    body = []
    for arm in arms:
        cells = []
        for column in columns:
            entry = view.scores[arm].get(column.section, {}).get(column.key, {})
            values = (
                "–" if v is None else f"{v * column.scale:.{column.digits}f}"
                for v in entry.get("seeds", [])
            )
            cells.append(f"<td>{'<br>'.join(values) or '–'}</td>")
        body.append(f'<tr class="{view.css(arm)}">{named(view, arm)}{"".join(cells)}</tr>')
    number = len(view.report["workdirs"])
    return (
        f"<details><summary>Each seed<small>{number} runs, one below the other</small></summary>"
        '<div class="scroll" tabindex="0"><table class="results"><caption>Each seed</caption>'
        f'<thead><tr><th scope="col">arm</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody>'
        "</table></div></details>"
    )


def _of(group: str) -> str:
    return f" of {group}" if group else ""


def _table(
    view: View, arms: Sequence[str], columns: Sequence[Column], caption: str, banded: bool
) -> str:
    """One row an arm. `banded` puts target and retention under headings of their own."""
    edge = next((c.key for c in columns if c.section == "retention"), None) if banded else None
    arrows = {1: "\u00a0↑", -1: "\u00a0↓", 0: ""}
    heads = "".join(
        f'<th{_edge(c, edge)} scope="col" title="{escape(c.about)}">{escape(c.title)}'
        f"<small>{arrows[c.better]}</small></th>"
        for c in columns
    )
    band = ""
    targets = sum(c.section == "target" for c in columns)
    if banded:
        spans = ["<td></td>"]
        if targets:
            spans.append(f'<th scope="colgroup" colspan="{targets}">Learned of the new</th>')
        if edge:
            width = len(columns) - targets
            spans.append(f'<th class="edge" scope="colgroup" colspan="{width}">')
            spans.append("Kept of the old</th>")
        band = f'<tr class="over">{"".join(spans)}</tr>'
    if not banded:
        arms = [arm for arm in arms if any(cell(view.scores[arm], c) for c in columns)]
    scales = {c.key: _column_range(view, arms, c) for c in columns}
    best = {c.key: _best(view, arms, c) for c in columns}
    body = []
    for arm in arms:
        cells = [
            _cell(cell(view.scores[arm], c), c, scales[c.key], arm in best[c.key], edge)
            for c in columns
        ]
        body.append(f'<tr class="{view.css(arm)}">{named(view, arm)}{"".join(cells)}</tr>')
    return (
        '<div class="card scroll" tabindex="0"><table class="results" data-sort><caption>'
        f"{escape(caption)}</caption><thead>{band}<tr>"
        f'<th scope="col">arm</th>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _cell(
    found: Cell | None, column: Column, scale: tuple[float, float], best: bool, edge: str | None
) -> str:
    if found is None:
        return f'<td{_edge(column, edge)}><span class="missing">–</span></td>'
    hint, half, bar = "", "", ""
    if found.low is not None and found.high is not None:
        digits = column.digits
        hint = f' title="{found.low:.{digits}f} to {found.high:.{digits}f}"'
        if column.scale == 1 and column.better:
            half = f" <small>±{(found.high - found.low) / 2:.{digits}f}</small>"
        bar = plots.interval(found, *scale)
    css = " ".join(["best"] * best + ["edge"] * (column.key == edge))
    marked = f' class="{css}"' if css else ""
    value = f"<b>{found.value:.{column.digits}f}</b>"
    return f'<td{marked}{hint} data-value="{found.value:.8g}">{value}{half}{bar}</td>'


def _edge(column: Column, edge: str | None) -> str:
    return ' class="edge"' if column.key == edge else ""


def _column_range(view: View, arms: Sequence[str], column: Column) -> tuple[float, float]:
    found = [c for arm in arms if (c := cell(view.scores[arm], column))]
    return plots.padded([v for c in found for v in c if v is not None], 0.02)


def _best(view: View, arms: Sequence[str], column: Column) -> set[str]:
    """The best arm that is neither a floor nor, for what was kept, the base it is compared with."""
    values = {
        arm: found.value
        for arm in arms
        if view.arms[arm]["method"] != "floor"
        and not (column.section == "retention" and view.arms[arm]["method"] == "base")
        and (found := cell(view.scores[arm], column))
    }
    if len(set(values.values())) < 2 or not column.better:
        return set()
    top = max(values.values(), key=lambda value: value * column.better)
    best = {arm for arm, value in values.items() if value == top}
    return best if 2 * len(best) <= len(values) else set()  # what most arms reach marks nobody
