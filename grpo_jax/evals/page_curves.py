"""The report's learning curves, as HTML: arms of one method together, then each arm by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from grpo_jax.evals import plots
from grpo_jax.evals.page import COLOURS, View
from grpo_jax.evals.runs import Json

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
METHODS = {
    "sft": "Supervised fine-tuning",
    "self_sft": "SFT on the policy’s own samples",
    "grpo": "GRPO",
    "recover": "Recovery SFT",
    "interpolate": "Interpolation",
}
STAGES = {"sft": "Supervised cold start", "grpo": "GRPO", "recover": "Recovery SFT"}


def curves(view: View) -> str:
    """Small multiples; '' without metrics."""
    series: dict[str, Json] = view.report["curves"]
    by_method: dict[tuple[str, str], list[str]] = {}
    for arm in series:
        kind = view.arms[arm]["method"], view.arms[arm]["group"]
        by_method.setdefault(kind, []).append(arm)
    crowded = any(len(arms) > 1 for arms in by_method.values())
    parts = []
    for (method, group), arms in by_method.items():
        if len(arms) > 1:
            name = METHODS.get(method, "Other arms") + (f", {escape(group)}" if group else "")
            parts.append(f"<h3>{name}: {len(arms)} arms</h3>")
            parts.append(_together(view, arms))
    for arm in series:
        html = _arm(view, arm)
        if crowded:
            parts.append(f'<details class="{view.css(arm)}"><summary>{view.symbol(arm)}')
            parts.append(f'{view.title(arm)}<small>curves</small></summary><div class="inside">')
            parts.append(f"{html}</div></details>")
        else:
            parts.append(f"<h3>{escape(STAGES.get(arm) or view.arms[arm]['title'])}</h3>{html}")
    return "".join(parts)


def is_dev(metric: str) -> bool:
    """Measured on held-out text while training: dev scores and the forgetting gauge."""
    return metric.startswith(("dev", "eval", "retention", "forgetting"))


def _together(view: View, arms: Sequence[str]) -> str:
    """One chart a metric, one line an arm, for what at least two of them logged."""
    series = view.report["curves"]
    names = list(dict.fromkeys(name for arm in arms for name in series[arm]))
    terms = [name for name in names if _is_term(name)]
    wanted = [*filter(is_dev, names), *(n for n in SHOWN if n in names), *terms]
    charts = []
    for name in wanted:
        lines = [_line(view, arm, name) for arm in arms if name in series[arm]]
        if len(lines) > 1:
            note = "" if name == "reward" else NOTES.get(name, "")
            charts.append(plots.line_chart(name, lines, note))
    legend = "".join(
        f'<li class="{view.css(arm)}{" dash" if _dashed(view, arm) else ""}">'
        f'<svg viewBox="0 0 26 6" aria-hidden="true"><line class="line" x1="1" x2="25" y1="3" '
        f'y2="3"/></svg>{view.title(arm)}</li>'
        for arm in arms
    )
    return f'<ul class="legend">{legend}</ul><div class="charts">{"".join(charts)}</div>'


def _dashed(view: View, arm: str) -> bool:
    return (view.arms[arm]["index"] or 0) >= COLOURS


def _line(view: View, arm: str, name: str) -> plots.Line:
    curve = view.report["curves"][arm][name]
    title = view.arms[arm]["title"]
    css = view.css(arm)
    return plots.Line(
        title, css, curve["steps"], curve["values"], curve["last"], dash=_dashed(view, arm)
    )


def _is_term(name: str) -> bool:
    return re.fullmatch(r"rewards/.+/mean", name) is not None


def _arm(view: View, arm: str) -> str:
    """All that one arm logged."""
    series = view.report["curves"][arm]
    terms = [m for m in series if _is_term(m)]
    first = [*filter(is_dev, series), *(m for m in SHOWN if m in series)]
    spreads = {"reward": "reward_std"} | {m: m.replace("/mean", "/std") for m in terms}
    used = {*first, *terms, *spreads.values()}
    rest = sorted(m for m in series if m not in used)
    css = view.css(arm)
    parts = [_charts(first, series, spreads, css)]
    if terms:
        parts.append("<h3>Reward terms and their spread</h3>")
        parts.append('<p class="sub">Band: standard deviation within a group, averaged over ')
        parts.append("groups. A term without spread teaches nothing.</p>")
        parts.append(_charts(terms, series, spreads, css))
    if rest:
        parts.append(f"<details><summary>All other metrics<small>{len(rest)}</small>")
        parts.append(f'</summary><div class="inside">{_charts(rest, series, {}, css)}')
        parts.append("</div></details>")
    return "".join(parts)


def _charts(names: Sequence[str], series: Json, spreads: Mapping[str, str], css: str) -> str:
    charts = []
    for name in names:
        curve = series[name]
        spread = series.get(spreads.get(name, ""), {})
        band = spread["values"] if spread.get("steps") == curve["steps"] else None
        note = NOTES.get(name, "") if band or name != "reward" else ""
        if band is None and "sd" in curve:
            band = curve["sd"]
            note = f"{note}; band: standard deviation of seeds" if note else "band: seeds"
        line = plots.Line("", css, curve["steps"], curve["values"], curve["last"], band)
        charts.append(plots.line_chart(name, [line], note))
    return f'<div class="charts">{"".join(charts)}</div>'
