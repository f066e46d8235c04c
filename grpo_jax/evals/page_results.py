"""The report's results: headline, table of arms, paired comparisons and the tax plot, as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from grpo_jax.evals import plots
from grpo_jax.evals.page import Json, Run, css_class, is_number, p_value, section, signed
from grpo_jax.evals.table import (
    COLUMNS,
    FAILURES,
    FLOORS,
    MODELS,
    Cell,
    Column,
    cell,
    order,
    title,
)

FAILURE_NOTE = "Share of outputs. References that copy the source are not held against an arm."
PAIRED_NOTE = (
    "Same sentences, 95% interval and two-sided p of a paired bootstrap (Koehn 2004); coloured "
    "where p &lt; 0.05."
)


def head(run: Run) -> str:
    """Name, one sentence of result, and the facts of the run."""
    devices, config = section(run.config, "devices"), section(run.config, "config")
    seconds = [e["seconds"] for e in run.evaluations.values() if is_number(e.get("seconds"))]
    facts = {
        "Model": section(config, "model").get("path"),
        "Data": section(config, "data").get("train"),
        "Encoder": section(config, "encoder").get("path"),
        "Device": f"{devices.get('count', 1)} × {devices['kind']}" if "kind" in devices else None,
        "Seed": run.config.get("seed"),
        "Started": str(run.config.get("started", ""))[:16].replace("T", " "),
        "Revision": str(run.config.get("git_revision") or "")[:10],
        "Evaluated in": f"{sum(seconds):.0f} s" if seconds else None,
    }
    items = [
        f"<li>{name} <b>{escape(str(value))}</b></li>"
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return (
        f'<div class="kicker">grpo_jax run</div><h1>{escape(run.name)}</h1>'
        f'<p class="lede">{_lede(run)}</p><ul class="facts">{"".join(items)}</ul>'
        f"{_verdicts(run)}"
    )


def _lede(run: Run) -> str:
    arms = [arm for arm in order(run.evaluations) if arm in MODELS]
    if not arms:
        return "No arm has been evaluated yet; the curves show what was trained so far."
    texts = len(run.evaluations[arms[-1]].get("samples") or [])
    number = f"<b>{texts}</b> held-out texts" if texts else "held-out text"
    said = " → ".join(f"<b>{escape(title(arm))}</b>" for arm in arms)
    return (
        f"{said}, measured on {number}: what each stage learned of the new language, and what it "
        "cost of what the model knew before. Ranges are 95% bootstrap intervals."
    )


def _verdicts(run: Run) -> str:
    """Three cards: overlap, meaning, forgetting; the last trained arm against those before it."""
    arms = [arm for arm in order(run.evaluations) if arm in MODELS]
    if len(arms) < 2:
        return ""
    columns = {column.key: column for column in COLUMNS}
    last = run.evaluations[arms[-1]]
    judged = cell(last, columns["judge_similarity"]) is not None
    meaning = columns["judge_similarity" if judged else "similarity"]
    cards = [
        ("Overlap with the reference (chrF++)", columns["chrf++"], False),
        (f"Meaning, {'second' if judged else 'reward’s'} encoder (cosine)", meaning, False),
        ("Forgetting (NLL on general text over base)", columns["nll_mean"], arms[0] == "base"),
    ]
    return f'<div class="verdicts">{"".join(_verdict(run, arms, *card) for card in cards)}</div>'


def _verdict(run: Run, arms: list[str], name: str, column: Column, relative: bool) -> str:
    cells = {arm: cell(run.evaluations[arm], column) for arm in arms}
    last, start = cells[arms[-1]], cells[arms[0]]
    if last is None or (relative and start is None):
        return ""
    shift = start.value if relative and start else 0.0
    sign = "+" if relative else ""
    others = ", ".join(
        f"{escape(title(arm))} {found.value - shift:{sign}.{column.digits}f}"
        for arm, found in cells.items()
        if found and arm != arms[-1] and not (relative and arm == arms[0])
    )
    tail = ""
    compared = run.comparisons.get((arms[-2], arms[-1]), {}).get(column.key)
    if compared:
        gain = compared["difference"] * column.scale
        css = ("good" if gain > 0 else "bad") if compared["p"] < 0.05 else ""
        tail = (
            f'<br><span class="{css}">{signed(gain, column.digits)} over '
            f"{escape(title(arms[-2]))}, {p_value(compared['p'])}</span>"
        )
    return (
        f'<div class="card verdict"><h3>{name}</h3>'
        f"<strong>{last.value - shift:{sign}.{column.digits}f}</strong>"
        f"<p>{escape(title(arms[-1]))}{'; ' if others else ''}{others}{tail}</p></div>"
    )


def results(run: Run) -> str:
    """The headline table, the failure rates and the paired comparisons."""
    if not run.evaluations:
        return '<p class="none">The evaluation stage has not finished an arm yet.</p>'
    table = _results_table(run.evaluations, COLUMNS, banded=True)
    beside = []
    if any(cell(e, column) for e in run.evaluations.values() for column in FAILURES):
        failures = _results_table(run.evaluations, FAILURES, banded=False)
        beside.append(
            f'<div><h3>How outputs fail</h3><p class="sub">{FAILURE_NOTE}</p>{failures}</div>'
        )
    if run.comparisons:
        compared = _comparison_table(run.comparisons)
        beside.append(
            f'<div><h3>Is the difference real?</h3><p class="sub">{PAIRED_NOTE}</p>{compared}</div>'
        )
    return f'{table}<div class="side">{"".join(beside)}</div>'


def _results_table(
    evaluations: Mapping[str, Json], all_columns: Sequence[Column], banded: bool
) -> str:
    columns = [c for c in all_columns if any(cell(e, c) for e in evaluations.values())]
    edge = next((c.key for c in columns if c.section == "retention"), None)
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    heads = "".join(
        f'<th{_edge(c, edge)} scope="col" title="{escape(c.about)}">{escape(c.title)}'
        f"<small>{arrows[c.better]}</small></th>"
        for c in columns
    )
    band = ""
    targets = sum(c.section == "target" for c in columns)
    if banded:
        kept = f'<th class="edge" colspan="{len(columns) - targets}">Kept of the old</th>'
        band = f'<tr class="over"><th></th><th colspan="{targets}">Learned of the new</th>'
        band += f"{kept if edge else ''}</tr>"
    body = []
    scales = {c.key: _column_range(evaluations, c) for c in columns}
    best = {c.key: _best(evaluations, c) for c in columns}
    for arm in order(evaluations):
        cells = [
            _result_cell(cell(evaluations[arm], c), c, scales[c.key], arm in best[c.key], edge)
            for c in columns
        ]
        body.append(
            f'<tr class="{css_class(arm)}"><th scope="row">{escape(title(arm))}</th>'
            f"{''.join(cells)}</tr>"
        )
    return (
        f'<div class="card scroll"><table class="results"><thead>{band}<tr><th></th>{heads}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _result_cell(
    found: Cell | None, column: Column, scale: tuple[float, float], best: bool, edge: str | None
) -> str:
    if found is None:
        return f'<td{_edge(column, edge)}><span class="missing">–</span></td>'
    hint, half, bar = "", "", ""
    if found.low is not None and found.high is not None:
        digits = column.digits
        hint = f' title="95%: {found.low:.{digits}f} to {found.high:.{digits}f}"'
        if column.scale == 1 and column.better:
            half = f" <small>±{(found.high - found.low) / 2:.{digits}f}</small>"
        bar = plots.interval(found, *scale)
    css = " ".join(["best"] * best + ["edge"] * (column.key == edge))
    mark = f' class="{css}"' if css else ""
    return f"<td{mark}{hint}><b>{found.value:.{column.digits}f}</b>{half}{bar}</td>"


def _edge(column: Column, edge: str | None) -> str:
    return ' class="edge"' if column.key == edge else ""


def _column_range(evaluations: Mapping[str, Json], column: Column) -> tuple[float, float]:
    found = [c for e in evaluations.values() if (c := cell(e, column))]
    return plots.padded([v for c in found for v in c if v is not None], 0.02)


def _best(evaluations: Mapping[str, Json], column: Column) -> set[str]:
    """The best arm that is neither a floor nor, for what was kept, the base it is compared with."""
    arms = [a for a in evaluations if a not in FLOORS]
    if column.section == "retention":
        arms = [arm for arm in arms if arm != "base"]
    values = {arm: c.value for arm in arms if (c := cell(evaluations[arm], column))}
    if len(set(values.values())) < 2 or not column.better:
        return set()
    top = max(values.values(), key=lambda value: value * column.better)
    return {arm for arm, value in values.items() if value == top}


def _comparison_table(comparisons: Mapping[tuple[str, str], Json]) -> str:
    pairs = list(comparisons)
    heads = "".join(
        f'<th scope="col">{escape(title(a))} → {escape(title(b))}</th>' for a, b in pairs
    )
    rows = []
    for column in COLUMNS:
        found = [comparisons[pair].get(column.key) for pair in pairs]
        if not any(found):
            continue
        cells = "".join(_comparison_cell(entry, column) for entry in found)
        rows.append(f'<tr><th scope="row">{escape(column.title)}</th>{cells}</tr>')
    return (
        f'<div class="card scroll"><table><thead><tr><th></th>{heads}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
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
        f'<td><span class="{css}">{gain}</span> '
        f"<small>[{low}, {high}], {p_value(entry['p'])}</small></td>"
    )


def tax(run: Run) -> str:
    """Target score against retention, once by NLL and once by KL; '' if either is missing."""
    columns = {column.key: column for column in COLUMNS}
    models = {arm: run.evaluations[arm] for arm in order(run.evaluations) if arm not in FLOORS}
    judged = any(cell(e, columns["judge_similarity"]) for e in models.values())
    y = columns["judge_similarity" if judged else "similarity"]
    if not any(cell(e, y) for e in models.values()):
        y = columns["chrf++"]
    floors = [
        (title(arm), found.value)
        for arm in FLOORS
        if (found := cell(run.evaluations.get(arm, {}), y))
    ]
    y_title = {
        "judge_similarity": "target: cosine, second encoder",
        "similarity": "target: cosine, reward’s encoder",
        "chrf++": "target: chrF++",
    }[y.key]
    figures = []
    for key, name in (
        ("nll_mean", "tax: rise of NLL on general text (nats a token)"),
        ("kl_general", "tax: KL(base‖arm) on general text (nats a token)"),
    ):
        base = cell(models.get("base", {}), columns[key]) if key == "nll_mean" else Cell(0, 0, 0)
        points = []
        for arm, evaluation in models.items():
            across, up = cell(evaluation, columns[key]), cell(evaluation, y)
            if across and up and base:
                moved = across.shifted(-base.value)
                points.append(plots.Point(title(arm), css_class(arm), moved, up))
        if len(points) > 1:
            figures.append(plots.tax_plot(points, floors, name, y_title))
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""
