"""The report's evidence: samples side by side, rollouts, costs and what was run, as HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from grpo_jax.report import plots
from grpo_jax.report.page import View, flatten, groups, named, text_span
from grpo_jax.report.page_head import duration
from grpo_jax.report.runs import Json, section
from grpo_jax.report.table import COLUMNS, FAILURES, is_number

ORDERS = (
    ("", "as in the test set"),
    ("score:-1", "best first"),
    ("score:1", "worst first"),
    ("gain:-1", "largest gain"),
    ("gain:1", "largest loss"),
)


def samples(view: View) -> str:
    """Held-out texts, every arm's answer under the reference; '' without samples."""
    rows = view.report["samples"]
    # The copy floor's answer is the source, which is there already.
    found = {arm for row in rows for arm in row["answers"]}
    arms = [arm for arm in view.arms if arm in found and arm.partition("@")[0] != "copy"]
    if not arms:
        return ""
    cards = [_sample_card(view, row, arms) for row in rows]
    names = [arm for arm in arms if view.arms[arm]["method"] != "floor"] or arms
    options = [
        f'<option value="{escape(arm)}" data-group="{escape(view.arms[arm]["group"])}">'
        f"{view.title(arm)}</option>"
        for arm in names
    ]
    listed, against = "".join(options[::-1]), "".join(options)
    orders = "".join(f'<option value="{key}">{text}</option>' for key, text in ORDERS)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    group = ""
    if len(groups) > 1:
        chosen = "".join(
            f'<option value="{escape(g)}">{escape(g) or "main"}</option>' for g in groups
        )
        group = f'<label>Test set <select id="group">{chosen}</select></label>'
    boxes = "".join(
        f'<label class="pick {view.css(arm)}" data-group="{escape(view.arms[arm]["group"])}">'
        f'<input type="checkbox" value="{escape(arm)}" checked>'
        f"{view.symbol(arm)}{view.title(arm)}</label>"
        for arm in arms
    )
    return (
        '<div class="tools" data-tools hidden><input type="search" id="find" '
        'placeholder="Search source, reference and answers" aria-label="Search the samples">'
        f'{group}<label>Order <select id="order">{orders}</select></label>'
        f'<label id="of" hidden>of <select id="arm">{listed}</select></label>'
        f'<label id="over" hidden>over <select id="against">{against}</select></label>'
        '<span class="count" id="count" role="status"></span></div>'
        f'<fieldset class="picks" id="picks" data-tools hidden><legend>Arms</legend>{boxes}'
        '<button type="button" data-pick="all">all</button>'
        '<button type="button" data-pick="none">none</button>'
        f'</fieldset><div id="cards">{"".join(cards)}</div>'
        '<button type="button" id="more" hidden>Show more</button>'
    )


def _sample_card(view: View, row: Json, arms: list[str]) -> str:
    answers = {arm: row["answers"][arm] for arm in arms if arm in row["answers"]}
    scores = {a: r["similarity"] for a, r in answers.items() if is_number(r.get("similarity"))}
    data = escape(json.dumps(scores, ensure_ascii=False, separators=(",", ":")), quote=True)
    parts = [f'<article class="card sample" data-group="{escape(row["group"])}" ']
    parts.append(f'data-scores="{data}"><dl>')
    for name in ("source", "reference"):
        given = text_span(row[name])
        parts.append(f'<div class="answer given {name}"><dt>{name}</dt><dd>{given}</dd></div>')
    for arm, answer in answers.items():
        score = ""
        if arm in scores:
            share = min(max(scores[arm], 0.0), 1.0)
            score = f'<span class="sim"><i style="--v:{share:.3f}"></i>{scores[arm]:.2f}</span>'
        text = text_span(answer["completion"], row["reference"])
        parts.append(f'<div class="answer {view.css(arm)}" data-arm="{escape(arm)}"><dt>')
        parts.append(f"{view.symbol(arm)}{view.title(arm)}</dt><dd>{text}{score}</dd></div>")
    return "".join([*parts, "</dl></article>"])


def rollouts(view: View) -> str:
    """What the policy wrote while it was trained, at a few steps; '' without samples.jsonl."""
    parts = []
    for entry in view.report["rollouts"]:
        flat = [flatten(row) for row in entry["rows"]]
        numbers = [
            name
            for name in dict.fromkeys(name for row in flat for name in row)
            if name not in ("step", "stage") and any(is_number(row.get(name)) for row in flat)
        ]
        heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in numbers)
        body = "".join(_rollout_rows(view, entry["stage"], flat, numbers))
        parts.append(
            f"<details><summary>{view.title(entry['stage'])} step {entry['step']}"
            f'<small>{entry["count"]} completions</small></summary><div class="inside scroll" '
            'tabindex="0"><table class="rollouts"><thead><tr><th scope="col">prompt, reference and '
            f"completions</th>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
        )
    return "".join(parts)


def _rollout_rows(view: View, arm: str, flat: list[Json], numbers: list[str]) -> list[str]:
    rows = []
    previous = None
    for row in flat:
        prompt, reference = str(row.get("prompt", "")), str(row.get("reference", ""))
        if (prompt, reference) != previous:
            shown = text_span(prompt)
            if reference:
                shown += f" <small>→</small> {text_span(reference)}"
            rows.append(
                f'<tr class="asked"><td class="text" colspan="{len(numbers) + 1}">{shown}</td></tr>'
            )
            previous = prompt, reference
        cells = "".join(
            f"<td>{plots.short(float(row[n])) if is_number(row.get(n)) else ''}</td>"
            for n in numbers
        )
        answer = text_span(str(row.get("completion", "")), reference)
        rows.append(f'<tr><td class="text {view.css(arm)}">{answer}</td>{cells}</tr>')
    return rows


def costs(view: View) -> str:
    """Tokens, seconds and memory of each arm; '' where nothing was recorded."""
    found: dict[str, Json] = view.report["costs"]
    columns = [
        ("tokens", "tokens", "of the arm's training"),
        ("total_tokens", "tokens in all", "tokens of this arm and of all that it comes from"),
        ("seconds", "training", "of this arm alone"),
        ("total_seconds", "training in all", "time of this arm and of all that it comes from"),
        ("peak_bytes", "peak memory", "of one device"),
        ("evaluation_seconds", "evaluation", "seconds"),
        ("evaluation_tokens", "answers", "tokens of the greedy answers"),
    ]
    columns = [c for c in columns if any(c[0] in cost for cost in found.values())]
    if not columns:
        return ""
    parts = []
    for group in groups(view):
        rows = {arm: cost for arm, cost in found.items() if view.arms[arm]["group"] == group}
        if rows:
            name = escape(group.capitalize())
            parts.append(f"<h3>{name}</h3>" if name else "")
            parts.append(_cost_table(view, rows, columns, f"Costs {name}".strip()))
    return "".join(parts)


def _cost_table(
    view: View, rows: Mapping[str, Json], columns: list[tuple[str, str, str]], caption: str
) -> str:
    heads = "".join(f'<th scope="col" title="{about}">{name}</th>' for _, name, about in columns)
    body = "".join(
        f'<tr class="{view.css(arm)}">{named(view, arm)}'
        f"{''.join(_cost(cost.get(key), key) for key, _, _ in columns)}</tr>"
        for arm, cost in rows.items()
    )
    return (
        f'<div class="card scroll" tabindex="0"><table class="results" data-sort><caption>{caption}'
        f'</caption><thead><tr><th scope="col">arm</th>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _cost(value: Any, key: str) -> str:
    if not is_number(value):
        return '<td><span class="missing">–</span></td>'
    if key == "peak_bytes":
        shown = f"{value / 2**30:.2f} GiB"
    elif "seconds" in key:
        shown = duration(value) if value >= 10 else f"{value:.1f} s"
    else:
        shown = f"{value:,.0f}".replace(",", "\u202f")
    return f'<td data-value="{value:.8g}">{shown}</td>'


def provenance(view: View) -> str:
    """What was run and on what: each arm, config.json, and the meaning of each metric."""
    parts = [_arms(view)]
    runs = view.report["runs"]
    for run in runs:
        rest = {name: value for name, value in run.items() if name not in ("config", "arms")}
        note = "versions, devices, seed" if len(runs) == 1 else str(run["workdir"])
        parts.append(_key_values("Run", note, rest, opened=len(runs) == 1))
    sections = {k: v for k, v in section(runs[0], "config").items() if k != "arms"}
    plain = {name: value for name, value in sections.items() if not isinstance(value, dict)}
    if plain:
        parts.append(_key_values("Configuration", "", plain))
    for name, value in sections.items():
        if isinstance(value, dict):
            parts.append(_key_values(name, "configuration", value))
    meanings = {c.title: c.about for c in (view.columns or (*COLUMNS, *FAILURES))}
    parts.append(_key_values("What the columns mean", "", meanings))
    return "".join(parts)


def _arms(view: View) -> str:
    """The tree of arms, when the configuration says more than the usual stages."""
    arms = [a for a in view.arms.values() if a["method"] not in ("base", "floor")]
    if not any(a["overrides"] or a["group"] or a["method"] != a["name"] for a in arms):
        return ""
    body = "".join(
        f'<tr class="{view.css(a["name"])}"><th scope="row">{view.symbol(a["name"])}'
        f"{view.title(a['name'])}</th><td>{escape(a['method'])}</td><td>{view.title(a['start'])}"
        f"</td><td>{escape(a['group'])}</td><td>{_overrides(a['overrides'])}</td></tr>"
        for a in arms
    )
    heads = "".join(f'<th scope="col">{n}</th>' for n in ("method", "starts from", "group", "own"))
    return (
        '<div class="card scroll" tabindex="0"><table class="results words"><caption>The arms'
        f'</caption><thead><tr><th scope="col">arm</th>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _overrides(values: Json) -> str:
    said = (f"{escape(name)}&nbsp;=&nbsp;{escape(str(value))}" for name, value in values.items())
    return "<br>".join(said)


def _key_values(name: str, note: str, values: Mapping[str, Any], opened: bool = False) -> str:
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value)) or '–'}</dd>"
        for key, value in flatten(values, ".").items()
    )
    return (
        f"<details{' open' if opened else ''}><summary>{escape(name)}<small>{escape(note)}</small>"
        f'</summary><div class="inside"><dl class="kv">{items}</dl></div></details>'
    )
