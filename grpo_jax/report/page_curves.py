"""The report's learning curves, as HTML: arms of one method together, then each arm by itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from grpo_jax.report import plots
from grpo_jax.report.page import COLOURS, View
from grpo_jax.report.runs import Json, section
from grpo_jax.report.table import is_number

DASHES = 4  # in report.css, the first being none
# Curves shown at once, in this order; the rest waits behind a click.
SHOWN = (
    "reward", "similarity", "loss", "kl", "beta", "entropy", "frac_reward_zero_std",
    "completions/mean_length", "completions/clipped_ratio", "grad_norm",
)  # fmt: skip
NOTES = {
    "reward": "band: spread within a group",
    "similarity": "cosine under the reward's encoder",
    "kl": "to the reference policy",
    "beta": "weight of the KL; a forgetting budget moves it",
    "forgetting/kl": "KL(base‖policy) on general text, nats a token",
    "forgetting/nll": "general text, nats a token",
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
    without = [
        view.title(arm)
        for arm, entry in view.arms.items()
        if entry["method"] == "interpolate" and arm not in series
    ]
    if without and series:
        parts.append(f'<p class="sub">Without curves: {", ".join(without)}. Interpolated weights ')
        parts.append("are not trained.</p>")
    alone = []
    for arm in series:
        html = _arm(view, arm)
        method = METHODS.get(view.arms[arm]["method"], "")
        if crowded:
            alone.append(f'<details class="{view.css(arm)}"><summary>{view.symbol(arm)}')
            alone.append(f"{view.title(arm)}<small>{method}</small></summary>")
            alone.append(f'<div class="inside">{html}</div></details>')
        else:
            parts.append(f"<h3>{escape(STAGES.get(arm) or view.arms[arm]['title'])}</h3>{html}")
    if alone:
        parts.append("<details><summary>Each arm by itself<small>all that it logged</small>")
        parts.append(f'</summary><div class="inside">{"".join(alone)}</div></details>')
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
        # A metric that every arm logged once, at its end, is no curve; the tables say it better.
        if len(lines) > 1 and any(len(line.steps) > 1 for line in lines):
            note = "" if name == "reward" else NOTES.get(name, "")
            limits = {_budget(view, arm) for arm in arms}
            limit = limits.pop() if name == "forgetting/kl" and len(limits) == 1 else None
            note += "; dashed: the budget" if limit is not None else ""
            charts.append(plots.line_chart(name, lines, note, limit))
    legend = "".join(
        f'<li class="{view.css(arm)} dash{_dash(view, arm)}" data-arm="{escape(arm)}" tabindex="0">'
        f'<svg viewBox="0 0 34 6" aria-hidden="true"><line class="line" x1="1" x2="33" y1="3" '
        f'y2="3"/></svg>{view.title(arm)}</li>'
        for arm in arms
    )
    return (
        f'<div data-curves><ul class="legend">{legend}</ul>'
        f'<div class="charts">{"".join(charts)}</div></div>'
    )


def _dash(view: View, arm: str) -> int:
    return (view.arms[arm]["index"] or 0) // COLOURS % DASHES


def _budget(view: View, arm: str) -> float | None:
    """The arm's own forgetting budget, or the run's; GRPO alone keeps one."""
    entry = view.arms[arm]
    if entry["method"] != "grpo":
        return None
    run = section(section(view.report["runs"][0], "config"), "grpo").get("forgetting_budget")
    budget = entry["overrides"].get("grpo.forgetting_budget", run)
    return float(budget) if is_number(budget) else None


def _line(view: View, arm: str, name: str) -> plots.Line:
    curve = view.report["curves"][arm][name]
    return plots.Line(
        view.arms[arm]["title"], view.css(arm), curve["steps"], curve["values"], curve["last"],
        dash=_dash(view, arm), arm=arm,
    )  # fmt: skip


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
    parts = [_charts(first, series, spreads, css, _budget(view, arm))]
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


def _charts(
    names: Sequence[str],
    series: Json,
    spreads: Mapping[str, str],
    css: str,
    budget: float | None = None,
) -> str:
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
        limit = budget if name == "forgetting/kl" else None
        note += "; dashed: the budget" if limit is not None else ""
        charts.append(plots.line_chart(name, [line], note, limit))
    return f'<div class="charts">{"".join(charts)}</div>'
