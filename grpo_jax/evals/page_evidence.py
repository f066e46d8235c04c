"""The report's evidence: learning curves, samples side by side and what was run, as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from grpo_jax.evals import plots
from grpo_jax.evals.page import Json, Run, Series, css_class, flatten, is_number, section, text_span
from grpo_jax.evals.table import COLUMNS, FAILURES, FLOORS, MODELS, order, title

# Curves shown at once, in this order; the rest waits behind a click.
SHOWN = (
    "reward", "similarity", "loss", "kl", "entropy", "frac_reward_zero_std",
    "completions/mean_length", "completions/clipped_ratio", "grad_norm",
)  # fmt: skip
NOTES = {
    "reward": "band: spread within a group",
    "similarity": "cosine under the reward's encoder",
    "kl": "to the reference policy",
    "entropy": "nats a token",
    "frac_reward_zero_std": "groups that teach nothing",
    "completions/mean_length": "tokens",
    "completions/clipped_ratio": "cut off at the limit",
}
STAGES = {"sft": "Supervised cold start", "grpo": "GRPO", "recover": "Recovery SFT"}
MAX_ROLLOUT_STEPS = 8


def curves(run: Run) -> str:
    """Small multiples for each stage; '' without metrics."""
    parts = []
    known = [stage for stage in STAGES if stage in run.metrics]
    for stage in [*known, *(stage for stage in run.metrics if stage not in STAGES)]:
        series = run.metrics[stage]
        terms = [m for m in series if re.fullmatch(r"rewards/.+/mean", m)]
        dev = [m for m in series if m.startswith(("dev", "eval"))]
        first = [*dev, *(m for m in SHOWN if m in series)]
        spreads = {"reward": "reward_std"} | {m: m.replace("/mean", "/std") for m in terms}
        used = {*first, *terms, *spreads.values()}
        rest = sorted(m for m in series if m not in used)
        parts.append(f"<h3>{escape(STAGES.get(stage, stage))}</h3>")
        parts.append(_charts(first, series, spreads, stage))
        if terms:
            parts.append("<h3>Reward terms and their spread</h3>")
            parts.append('<p class="sub">Band: standard deviation within a group, averaged over ')
            parts.append("groups. A term without spread teaches nothing.</p>")
            parts.append(_charts(terms, series, spreads, stage))
        if rest:
            parts.append(f"<details><summary>All other metrics<small>{len(rest)}</small>")
            parts.append(f'</summary><div class="inside">{_charts(rest, series, {}, stage)}')
            parts.append("</div></details>")
    return "".join(parts)


def _charts(names: Sequence[str], series: Series, spreads: Mapping[str, str], stage: str) -> str:
    charts = []
    for name in names:
        steps, values = zip(*series[name], strict=True)
        spread = dict(series.get(spreads.get(name, ""), []))
        band = [spread[step] for step in steps] if all(s in spread for s in steps) else None
        css = stage if stage in MODELS else "other"
        charts.append(plots.line_chart(name, steps, values, band, css, NOTES.get(name, "")))
    return f'<div class="charts">{"".join(charts)}</div>'


def samples(run: Run) -> str:
    """Held-out texts, every arm's answer under the reference; '' without samples."""
    # The copy floor's answer is the source, which is there already.
    arms = [a for a in order(run.evaluations) if a != "copy" and run.evaluations[a].get("samples")]
    if not arms:
        return ""
    answers = {arm: _by_text(run.evaluations[arm]["samples"]) for arm in arms}
    models = [arm for arm in arms if arm not in FLOORS]
    cards = [_sample_card(key, answers, models) for key in answers[arms[0]]]
    last = escape(title(models[-1])) if models else ""
    before = escape(title(models[-2])) if len(models) > 1 else ""
    options = [("", "as in the test set")]
    if before:
        options += [("gain:-1", f"{last} gains most over {before}")]
        options += [("gain:1", f"{last} loses most against {before}")]
    options += [("score:-1", f"best of {last}"), ("score:1", f"worst of {last}")] if last else []
    chosen = "".join(f'<option value="{value}">{text}</option>' for value, text in options)
    return (
        '<div class="tools" id="tools" hidden><input type="search" id="find" '
        'placeholder="Search source, reference and answers" aria-label="Search the samples">'
        f'<select id="order" aria-label="Order">{chosen}</select>'
        '<span class="count" id="count"></span></div>'
        f'<div id="cards">{"".join(cards)}</div><button id="more" hidden>Show more</button>'
    )


def _by_text(rows: Iterable[Json]) -> dict[tuple[str, str], Json]:
    return {(str(r.get("source", "")), str(r.get("reference", ""))): r for r in rows}


def _sample_card(
    key: tuple[str, str], answers: Mapping[str, Mapping[tuple[str, str], Json]], models: list[str]
) -> str:
    source, reference = key
    rows = {arm: found[key] for arm, found in answers.items() if key in found}
    data = ""
    last_two = [rows[arm].get("similarity") for arm in models if arm in rows][-2:]
    values = [float(value) for value in last_two if value is not None]
    if values:
        data += f' data-score="{values[-1]:.4f}"'
    if len(values) == 2:
        data += f' data-gain="{values[1] - values[0]:.4f}"'
    parts = [f'<article class="card sample"{data}><dl>']
    for name, given in (("source", source), ("reference", reference)):
        parts.append(
            f'<div class="answer given {name}"><dt>{name}</dt><dd>{text_span(given)}</dd></div>'
        )
    for arm, row in rows.items():
        score = ""
        if is_number(row.get("similarity")):
            value = float(row["similarity"])
            share = min(max(value, 0.0), 1.0)
            score = f'<span class="sim"><i style="--v:{share:.3f}"></i>{value:.2f}</span>'
        answer = text_span(str(row.get("completion", "")), reference)
        parts.append(f'<div class="answer {css_class(arm)}">')
        parts.append(f'<dt class="chip">{escape(title(arm))}</dt><dd>{answer}{score}</dd></div>')
    return "".join([*parts, "</dl></article>"])


def rollouts(run: Run) -> str:
    """What the policy wrote while it was trained, at a few steps; '' without samples.jsonl."""
    groups: dict[tuple[str, int], list[Json]] = {}
    for row in run.rollouts:
        step = row.get("step")
        key = str(row.get("stage", "")), step if isinstance(step, int) else 0
        groups.setdefault(key, []).append(row)
    if not groups:
        return ""
    keys = list(groups)
    stride = max(1, -(-(len(keys) - 1) // (MAX_ROLLOUT_STEPS - 1))) if len(keys) > 1 else 1
    chosen = sorted({*keys[::stride], keys[-1]}, key=keys.index)
    return "".join(_rollout_group(stage, step, groups[stage, step]) for stage, step in chosen)


def _rollout_group(stage: str, step: int, rows: list[Json]) -> str:
    flat = [flatten(row) for row in rows]
    numbers = [
        name
        for name in dict.fromkeys(name for row in flat for name in row)
        if name not in ("step", "stage") and any(is_number(row.get(name)) for row in flat)
    ]
    heads = "".join(f"<th>{escape(name)}</th>" for name in numbers)
    body = []
    previous = None
    for row in flat[:64]:
        prompt, reference = str(row.get("prompt", "")), str(row.get("reference", ""))
        if (prompt, reference) != previous:
            shown = text_span(prompt)
            if reference:
                shown += f" <small>→</small> {text_span(reference)}"
            body.append(
                f'<tr class="asked"><td class="text" colspan="{len(numbers) + 1}">{shown}</td></tr>'
            )
            previous = prompt, reference
        cells = "".join(
            f"<td>{plots.short(float(row[n])) if is_number(row.get(n)) else ''}</td>"
            for n in numbers
        )
        answer = text_span(str(row.get("completion", "")), reference)
        body.append(f'<tr><td class="text grpo">{answer}</td>{cells}</tr>')
    return (
        f"<details><summary>{escape(stage)} step {step}<small>{len(rows)} completions</small>"
        '</summary><div class="inside scroll"><table class="rollouts"><thead><tr><th>prompt, '
        f"reference and completions</th>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        "</div></details>"
    )


def provenance(run: Run) -> str:
    """What was run and on what: config.json, section by section, and the meaning of each metric."""
    parts = []
    rest = {name: value for name, value in run.config.items() if name != "config"}
    effort = {
        title(arm): ", ".join(
            f"{evaluation[name]:,.0f} {name}"
            for name in ("seconds", "tokens")
            if is_number(evaluation.get(name))
        )
        for arm, evaluation in run.evaluations.items()
    }
    if rest:
        parts.append(_key_values("Run", "versions, devices, seed", rest, opened=True))
    if any(effort.values()):
        parts.append(_key_values("Evaluation", "effort of each arm", effort))
    sections = section(run.config, "config")
    plain = {name: value for name, value in sections.items() if not isinstance(value, dict)}
    if plain:
        parts.append(_key_values("Configuration", "", plain))
    for name, value in sections.items():
        if isinstance(value, dict):
            parts.append(_key_values(name, "configuration", value))
    parts.append(
        _key_values("What the columns mean", "", {c.title: c.about for c in (*COLUMNS, *FAILURES)})
    )
    return "".join(parts)


def _key_values(name: str, note: str, values: Mapping[str, Any], opened: bool = False) -> str:
    items = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value)) or '–'}</dd>"
        for key, value in flatten(values, ".").items()
    )
    return (
        f"<details{' open' if opened else ''}><summary>{escape(name)}<small>{escape(note)}</small>"
        f'</summary><div class="inside"><dl class="kv">{items}</dl></div></details>'
    )
