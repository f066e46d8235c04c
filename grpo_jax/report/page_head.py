"""The head of the report and its tax plots, as HTML."""

from __future__ import annotations

from html import escape

from grpo_jax.report.page import (
    View,
    chooser,
    group_id,
    is_multi,
    named,
    p_value,
    panels,
    signed,
)
from grpo_jax.report.page_compare import baselines, compared
from grpo_jax.report.runs import Json, section
from grpo_jax.report.table import COLUMNS, Cell, Column, cell, is_number
from grpo_jax.report.tax_plot import Point, tax_plot

TARGETS = {"similarity": "cosine, reward’s encoder", "judge_similarity": "cosine, second encoder"}
KEPT = {
    "nll_mean": "rise of NLL on general text (nats a token)",
    "nll_p90": "rise of the 90th percentile of NLL (nats a token)",
    "kl_general": "KL(base‖arm) on general text (nats a token)",
    "kl_task": "KL(base‖arm) on the task’s prompts (nats a token)",
}


def head(view: View) -> str:
    """Name, one sentence of result, and the facts of the run."""
    run = view.report["runs"][0]
    devices, config = section(run, "devices"), section(run, "config")
    costs = view.report["costs"].values()
    trained = [c["seconds"] for c in costs if "seconds" in c]
    seconds = [c["evaluation_seconds"] for c in costs if "evaluation_seconds" in c]
    seeds = [str(seed) for seed in view.report["seeds"] if seed is not None]
    facts = {
        "Model": section(config, "model").get("path"),
        "Data": section(config, "data").get("train"),
        "Encoder": section(config, "encoder").get("path"),
        "Device": f"{devices.get('count', 1)} × {devices['kind']}" if "kind" in devices else None,
        "Seeds" if len(seeds) > 1 else "Seed": ", ".join(seeds),
        "Started": str(run.get("started") or "")[:16].replace("T", " "),
        "Revision": str(run.get("git_revision") or "")[:10],
        "Trained in": duration(sum(trained)) if trained else None,
        "Evaluated in": duration(sum(seconds)) if seconds else None,
    }
    items = [
        f"<li>{name} <b>{escape(str(value))}</b></li>"
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return (
        f'<div class="kicker">grpo_jax run</div><h1>{escape(view.report["name"])}</h1>'
        f'<p class="lede">{_lede(view)}</p><ul class="facts">{"".join(items)}</ul>'
        f"{_verdicts(view)}"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


def _lede(view: View) -> str:
    arms = view.group("", floors=False)
    if not arms:
        return "No arm has been evaluated yet; the curves show what was trained so far."
    texts = view.arms[arms[-1]]["samples"]
    number = f"<b>{texts}</b> held-out texts" if texts else "held-out text"
    chain = all(view.arms[b]["start"] == a for a, b in zip(arms, arms[1:], strict=False))
    if chain and len(arms) < 6:
        said = " → ".join(f"<b>{view.title(arm)}</b>" for arm in arms)
    else:
        said = f"<b>{len(arms)} arms</b>"
    ranges = "Ranges are 95% bootstrap intervals"
    if is_multi(view):
        count = len(view.report["workdirs"])
        ranges = f"Means of <b>{count} seeds</b>; ranges are one standard deviation of the seeds"
    return (
        f"{said}, measured on {number}: what each arm learned of the new language, and what it "
        f"cost of what the model knew before. {ranges}; "
        "p-values are corrected for the number of arms (Holm)."
    )


def _verdicts(view: View) -> str:
    """Three cards: overlap, meaning, forgetting; GRPO (or the last arm) against the baselines."""
    arms = view.group("", floors=False)
    if len(arms) < 2:
        return ""
    # A run of plain stages ends with what it is about; in a tree of arms that is GRPO.
    plain = all(view.arms[a]["method"] in ("base", a) for a in arms)
    grpo = [arm for arm in arms if view.arms[arm]["method"] == "grpo"]
    last = arms[-1] if plain or not grpo else grpo[0]
    references = [arm for arm in baselines(view, "") if arm != last]
    columns = {column.key: column for column in COLUMNS}
    judged = cell(view.scores[last], columns["judge_similarity"]) is not None
    meaning = columns["judge_similarity" if judged else "similarity"]
    cards = [
        ("Overlap with the reference (chrF++)", columns["chrf++"], False),
        (f"Meaning, {'second' if judged else 'reward’s'} encoder (cosine)", meaning, False),
        ("Forgetting (NLL on general text over base)", columns["nll_mean"], "base" in arms),
    ]
    # Base first; the differences are from the cold start and the strong SFT, else from base.
    others = [arm for arm in references if arm != arms[0]]
    shown = [arms[0], *others, last]
    html = "".join(_verdict(view, shown, others or arms[:1], *card) for card in cards)
    return f'<div class="verdicts">{html}</div>'


def _verdict(
    view: View, arms: list[str], against: list[str], name: str, column: Column, relative: bool
) -> str:
    cells = {arm: cell(view.scores[arm], column) for arm in arms}
    last, start = cells[arms[-1]], cells[arms[0]]
    if last is None or (relative and start is None):
        return ""
    shift = start.value if relative and start else 0.0

    def shown(found: Cell) -> str:
        value = found.value - shift
        return signed(value, column.digits) if relative else f"{value:.{column.digits}f}"

    others = ", ".join(
        f"{view.title(arm)} {shown(found)}"
        for arm, found in cells.items()
        if found and arm != arms[-1] and not (relative and arm == arms[0])
    )
    tail = ""
    for arm in against:
        if found := compared(view, arm, arms[-1]).get(column.key):
            gain = found["difference"] * column.scale
            css = "plain"
            if found["holm"] < 0.05:
                css = "good" if gain * column.better > 0 else "bad"
            tail += (
                f'<br><span class="{css}">{signed(gain, column.digits)} against '
                f"{view.title(arm)}, {p_value(found['holm'])}</span>"
            )
    return (
        f'<div class="card verdict"><h3>{name}</h3><strong>{shown(last)}</strong>'
        f"<p>{view.title(arms[-1])}{'; ' if others else ''}{others}{tail}</p></div>"
    )


def tax(view: View, group: str) -> str:
    """Plots of a target score against what was lost, chosen by two lists; '' without any."""
    entries = [entry for entry in view.report["tax"] if entry["group"] == group]
    if not entries:
        return ""
    columns = {column.key: column for column in view.columns}
    number = group_id(view, group)
    ups = list(dict.fromkeys(entry["target"] for entry in entries))
    acrosses = list(dict.fromkeys(entry["retention"] for entry in entries))
    plots = {}
    # The first combination of the lists comes first, because that is what a new page shows.
    for i, entry in enumerate(
        sorted(entries, key=lambda e: (ups.index(e["target"]), acrosses.index(e["retention"])))
    ):
        y, x = columns[entry["target"]], columns[entry["retention"]]
        plots[y.key, x.key] = _figure(view, entry, y, x, f"tax-{number}-{i}")
    lists = [
        ("Learned", [(key, escape(y_title(columns[key]))) for key in ups]),
        ("Lost", [(key, escape(x_title(columns[key]))) for key in acrosses]),
    ]
    name = f"tax-{number}"
    return f"{chooser(name, lists)}{panels(name, plots)}"


def y_title(column: Column) -> str:
    """What is learned, as an axis says it."""
    first, _, rest = column.key.partition("/")
    if first == "judge_similarity" and rest:
        return f"cosine, {rest}"
    return TARGETS.get(column.key, column.title)


def x_title(column: Column) -> str:
    """What is lost, as an axis says it."""
    if column.key in KEPT:
        return KEPT[column.key]
    return f"{'fall' if column.better > 0 else 'rise'} of {column.title}, against base"


def _figure(view: View, entry: Json, y: Column, x: Column, name: str) -> str:
    points, rows = [], []
    for point in entry["points"]:
        arm = point["arm"]
        entered = view.arms[arm]
        up, across = _scaled(point["y"], y.scale), _scaled(point["x"], x.scale)
        on_front = arm in entry["front"]
        points.append(
            Point(entered["title"], view.css(arm), entered["index"], across, up, on_front)
        )
        rows.append(
            f'<tr class="{view.css(arm)}">{named(view, arm)}'
            f"{_range(up, y.digits)}{_range(across, x.digits)}"
            f"<td>{'yes' if on_front else ''}</td></tr>"
        )
    floors = [
        (view.arms[arm]["title"], value * y.scale)
        for arm, value in entry["floors"].items()
        if is_number(value)
    ]
    svg = tax_plot(points, floors, f"lost: {x_title(x)}", f"learned: {y_title(y)}", name)
    front = ", ".join(view.title(arm) for arm in entry["front"])
    return (
        f'<figure class="tax"><div class="plot">{svg}</div><figcaption>The line is the front: no '
        f"arm scores higher at the same or a smaller loss. On it: {front}.</figcaption>"
        "<details><summary>The numbers of this plot</summary>"
        '<div class="scroll" tabindex="0"><table class="results" data-sort>'
        f"<caption>{escape(y_title(y))} against {escape(x_title(x))}</caption>"
        '<thead><tr><th scope="col">arm</th><th scope="col">learned</th><th scope="col">lost</th>'
        f'<th scope="col">front</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</details></figure>"
    )


def _scaled(entry: Json, scale: float) -> Cell:
    value, low, high = (
        entry[name] * scale if is_number(entry[name]) else None for name in ("value", "low", "high")
    )
    return Cell(value or 0.0, low, high)


def _range(found: Cell, digits: int) -> str:
    hint = ""
    if found.low is not None and found.high is not None:
        hint = f" <small>{found.low:.{digits}f} to {found.high:.{digits}f}</small>"
    return f'<td data-value="{found.value:.8g}"><b>{found.value:.{digits}f}</b>{hint}</td>'
