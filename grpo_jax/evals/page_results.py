"""The report's results: headline, tables of arms, paired comparisons and tax plots, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from grpo_jax.evals import plots
from grpo_jax.evals.page import View, chooser, p_value, panels, signed
from grpo_jax.evals.runs import Json
from grpo_jax.evals.table import COLUMNS, FAILURES, Cell, Column, cell, is_known

FAILURE_NOTE = "Share of outputs. References that copy the source are not held against an arm."
PAIRED_NOTE = (
    "Row minus the chosen arm, on the same rows, with the 95% interval and the two-sided p of a "
    "paired bootstrap (Koehn 2004); coloured where p &lt; 0.05. The p-values are not corrected for "
    "the number of comparisons."
)
SEEDS_NOTE = " Means over the seeds; a resample draws seeds and rows."
_FAILURES = {column.key for column in FAILURES}
_HEADLINE = {column.key for column in COLUMNS}


def is_multi(view: View) -> bool:
    """True when the report averages several runs."""
    return view.report["spread"] == "seeds"


def reference_arm(view: View, group: str) -> str | None:
    """The arm that others are first compared with: SFT if there is one, else base."""
    arms = view.group(group, floors=False)
    sft = [arm for arm in arms if view.arms[arm]["method"] == "sft"]
    return sft[0] if sft else arms[0] if arms else None


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
        ("On other text", "Test sets that are unlike the training text.", domain),
        ("How outputs fail", FAILURE_NOTE, failures),
    ):
        if columns:
            html = _table(view, arms, columns, name, banded=False)
            beside.append(f'<div><h3>{name}</h3><p class="sub">{about}</p>{html}</div>')
    parts.append(f'<div class="side">{"".join(beside)}</div>' if beside else "")
    seeds = _seeds(view, arms, filled) if is_multi(view) else ""
    return "".join([*parts, seeds, _comparisons(view, group, arms)])


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
        body.append(
            f'<tr class="{view.css(arm)}"><th scope="row">{view.symbol(arm)}{view.title(arm)}</th>'
            f"{''.join(cells)}</tr>"
        )
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
    arrows = {1: " ↑", -1: " ↓", 0: ""}
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
        body.append(
            f'<tr class="{view.css(arm)}"><th scope="row">{view.symbol(arm)}{view.title(arm)}</th>'
            f"{''.join(cells)}</tr>"
        )
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
        and not (column.section == "retention" and arm == "base")
        and (found := cell(view.scores[arm], column))
    }
    if len(set(values.values())) < 2 or not column.better:
        return set()
    top = max(values.values(), key=lambda value: value * column.better)
    return {arm for arm, value in values.items() if value == top}


def compared(view: View, first: str, second: str) -> Json:
    """{metric: second - first with its interval and p}, whichever way round the pair is stored."""
    for entry in view.report["comparisons"]:
        if (entry["first"], entry["second"]) == (first, second):
            return entry["metrics"]
        if (entry["first"], entry["second"]) == (second, first):
            return {
                key: c | {"difference": -c["difference"], "low": -c["high"], "high": -c["low"]}
                for key, c in entry["metrics"].items()
            }
    return {}


def _comparisons(view: View, group: str, arms: Sequence[str]) -> str:
    """A table for every arm that the others can be compared with."""
    start = reference_arm(view, group)
    if start is None:
        return ""
    others = [arm for arm in view.group("", floors=False) if arm == "base" and arm not in arms]
    references = [start, *(arm for arm in [*others, *arms] if arm != start)]
    tables = {
        (reference,): html
        for reference in references
        if (html := _comparison_table(view, reference, arms))
    }
    if not tables:
        return ""
    name = f"compare-{group_id(view, group)}"
    options = [(arm, view.title(arm)) for (arm,) in tables]
    note = PAIRED_NOTE + (SEEDS_NOTE if is_multi(view) else "")
    return (
        f'<h3>Is the difference real?</h3><p class="sub">{note}</p>'
        f"{chooser(name, [('Against', options)])}{panels(name, tables)}"
    )


def _comparison_table(view: View, reference: str, arms: Sequence[str]) -> str:
    rows = {arm: compared(view, reference, arm) for arm in arms if arm != reference}
    rows = {arm: found for arm, found in rows.items() if found}
    columns = [c for c in view.columns if any(c.key in found for found in rows.values())]
    if not columns:
        return ""
    heads = "".join(
        f'<th scope="col" title="{escape(c.about)}">{escape(c.title)}</th>' for c in columns
    )
    body = "".join(
        f'<tr class="{view.css(arm)}"><th scope="row">{view.symbol(arm)}{view.title(arm)}</th>'
        f"{''.join(_comparison_cell(found.get(c.key), c) for c in columns)}</tr>"
        for arm, found in rows.items()
    )
    return (
        '<div class="card scroll" tabindex="0"><table class="results compared" data-sort><caption>'
        f"Differences from {view.title(reference)}</caption><thead><tr>"
        f'<th scope="col">minus {view.title(reference)}</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _comparison_cell(entry: Json | None, column: Column) -> str:
    if not entry:
        return '<td><span class="missing">–</span></td>'
    digits, scale = column.digits, column.scale
    css = ""
    if entry["p"] < 0.05 and column.better:
        css = "sure" if entry["difference"] * column.better > 0 else "sure down"
    gain, low, high = (signed(entry[k] * scale, digits) for k in ("difference", "low", "high"))
    return (
        f'<td data-value="{entry["difference"] * scale:.8g}"><span class="{css}">{gain}</span>'
        f"<small>[{low}, {high}]</small><small>{p_value(entry['p'])}</small></td>"
    )


def group_id(view: View, group: str) -> str:
    """A name for element ids; group names come from the configuration."""
    return str(list(dict.fromkeys(["", *(a["group"] for a in view.arms.values())])).index(group))
