"""The report's comparisons of arms, as HTML: paired differences, and the verdicts of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from grpo_jax.report.page import (
    View,
    chooser,
    group_id,
    groups,
    is_multi,
    named,
    p_value,
    panels,
    signed,
)
from grpo_jax.report.runs import Json
from grpo_jax.report.table import Column, is_number

RATE = "sft.optimizer.learning_rate"
PAIRED_NOTE = (
    "Row minus the chosen arm, on the same rows, with the 95% interval of a paired bootstrap "
    "(Koehn 2004). Starred, and green for better or red for worse: p &lt; 0.05 (two-sided) after "
    "Holm’s correction for the number of rows of the table, for each measure by itself. Point at "
    "a number for its p."
)
SEEDS_NOTE = " Means over the seeds; a resample draws seeds and rows."
JUDGE_NOTE = (
    "A language model chose the better of two answers to each text, twice with the order swapped; "
    "two verdicts that contradict each other are a tie. The score is the share of wins and half "
    "the ties: above 50% the first arm is preferred. Consistency is the share of pairs in which "
    "the order did not change the verdict."
)
SIGN_NOTE = " Starred: p &lt; 0.05 (sign test of wins and losses) after Holm’s correction."


def baselines(view: View, group: str) -> list[str]:
    """What the arms of a group are first compared with: cold start, strong SFT, base.

    The cold start is the SFT arm that most arms start from; the strong SFT is, of those with
    nothing but SFT behind them, the one with the highest learning rate of its own (the last one
    among equals). In another group they are what became of these arms there.
    """
    arms = view.group(group, floors=False)
    base = [arm for arm in (*arms, *view.group("")) if view.arms[arm]["method"] == "base"][:1]
    if group:
        start = {*baselines(view, ""), "base"}
        return [*(arm for arm in arms if view.arms[arm]["start"] in start), *base]
    plain = [arm for arm in arms if _is_plain_sft(view, arm)]
    if not plain:
        return base
    starts = [entry["start"] for entry in view.arms.values() if entry["group"] == group]
    cold = max(plain, key=starts.count)
    strong = max(plain[::-1], key=lambda arm: _rate(view, arm))
    return list(dict.fromkeys([cold, strong, *base]))


def _is_plain_sft(view: View, arm: str) -> bool:
    seen: set[str] = set()
    while arm not in seen and view.arms.get(arm, {}).get("method") == "sft":
        seen.add(arm)
        arm = view.arms[arm]["start"]
    return arm not in seen and arm in ("", "base")


def _rate(view: View, arm: str) -> float:
    rate = view.arms[arm]["overrides"].get(RATE)
    return float(rate) if is_number(rate) else 0.0


def compared(view: View, first: str, second: str) -> Json:
    """{metric: second - first}, whichever way round the pair is stored, as {"difference", "low",
    "high", "p", "holm"}; "holm" is corrected for all that first is compared with."""
    for entry in view.report["comparisons"]:
        if (entry["first"], entry["second"]) == (first, second):
            return {key: c | {"holm": c["holm"][0]} for key, c in entry["metrics"].items()}
        if (entry["first"], entry["second"]) == (second, first):
            return {
                key: c
                | {"difference": -c["difference"], "low": -c["high"], "high": -c["low"]}
                | {"holm": c["holm"][1]}
                for key, c in entry["metrics"].items()
            }
    return {}


def comparisons(
    view: View, group: str, arms: Sequence[str], sets: Mapping[str, Sequence[Column]]
) -> str:
    """A table for every arm that the others can be compared with, and every set of columns."""
    first = baselines(view, group)
    rest = [arm for arm in arms if arm not in first]
    tables: dict[tuple[str, ...], str] = {}
    found = []
    for reference in [*first, *rest]:
        rows = {arm: compared(view, reference, arm) for arm in arms if arm != reference}
        for name, columns in sets.items():
            if html := _table(view, reference, rows, columns):
                tables[reference, name] = html
                found.append(reference)
    if not tables:
        return ""
    name = f"compare-{group_id(view, group)}"
    headed = {
        heading: [(arm, view.title(arm)) for arm in some if arm in found]
        for heading, some in (("Baselines", first), ("Other arms", rest))
    }
    known = [name for name in sets if any(key[1] == name for key in tables)]
    lists = [("Against", {heading: some for heading, some in headed.items() if some})]
    measures = [("Measures", [(name, escape(name)) for name in known])] if len(known) > 1 else []
    if not measures:
        tables = {key[:1]: html for key, html in tables.items()}
    note = PAIRED_NOTE + (SEEDS_NOTE if is_multi(view) else "")
    return (
        f'<h3>Is the difference real?</h3><p class="sub">{note}</p>'
        f"{chooser(name, [*lists, *measures])}{panels(name, tables)}"
    )


def _table(view: View, reference: str, rows: Mapping[str, Json], columns: Sequence[Column]) -> str:
    columns = [c for c in columns if any(c.key in found for found in rows.values())]
    rows = {arm: found for arm, found in rows.items() if any(c.key in found for c in columns)}
    if not columns:
        return ""
    heads = "".join(
        f'<th scope="col" title="{escape(c.about)}">{escape(c.title)}</th>' for c in columns
    )
    body = "".join(
        f'<tr class="{view.css(arm)}">{named(view, arm)}'
        f"{''.join(_cell(found.get(c.key), c) for c in columns)}</tr>"
        for arm, found in rows.items()
    )
    return (
        '<div class="card scroll" tabindex="0"><table class="results compared" data-sort><caption>'
        f"Differences from {view.title(reference)}</caption><thead><tr>"
        f'<th scope="col">minus {view.title(reference)}</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(entry: Json | None, column: Column) -> str:
    if not entry:
        return '<td><span class="missing">–</span></td>'
    digits, scale = column.digits, column.scale
    sure = entry["holm"] < 0.05
    css = "plain"
    if sure and column.better:
        css = "sure" if entry["difference"] * column.better > 0 else "sure down"
    gain, low, high = (signed(entry[k] * scale, digits) for k in ("difference", "low", "high"))
    hint = f"{p_value(entry['holm'])} after Holm, {p_value(entry['p'])} alone"
    return (
        f'<td data-value="{entry["difference"] * scale:.8g}" title="{hint}">'
        f'<span class="{css}">{gain}{"*" if sure else ""}</span><small>[{low}, {high}]</small></td>'
    )


def preferences(view: View) -> str:
    """Wins, ties and losses of each judged pair; '' where no judge was asked."""
    entries = view.report["preferences"]
    if not entries:
        return ""
    order = {group: place for place, group in enumerate(groups(view))}
    body = []
    for entry in sorted(entries, key=lambda e: order.get(_group(view, e["first"]), 0)):
        shares = [entry[name]["value"] for name in ("win", "tie", "lose")]
        bar = "".join(
            f'<i class="{name}" style="--v:{share:.4f}"></i>'
            for name, share in zip(("win", "tie", "lose"), shares, strict=True)
        )
        css = "plain"
        star = entry["holm"] is not None and entry["holm"] < 0.05
        if star:
            css = "sure" if entry["score"]["value"] > 0.5 else "sure down"
        low, high = entry["score"]["low"], entry["score"]["high"]
        around = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
        hint = ""
        if entry["holm"] is not None:
            hint = f"{p_value(entry['holm'])} after Holm, {p_value(entry['p'])} alone"
        names = " <small>over</small> ".join(
            f'<span class="{view.css(arm)}">{view.symbol(arm)}{view.title(arm)}</span>'
            for arm in (entry["first"], entry["second"])
        )
        rates = "".join(_rate_cell(entry[name]) for name in ("win", "tie", "lose"))
        body.append(
            f'<tr class="{view.css(entry["first"])}"><th scope="row">{names}</th>'
            f'<td><span class="split" aria-hidden="true">{bar}</span></td>{rates}'
            f'<td data-value="{100 * entry["score"]["value"]:.8g}" title="{hint}">'
            f'<span class="{css}">{100 * entry["score"]["value"]:.1f}{"*" if star else ""}</span>'
            f" <small>{around}</small></td>"
            f"{_count(entry['judged'])}"
            f'<td data-value="{100 * entry["consistency"]:.8g}">{100 * entry["consistency"]:.1f}'
            f" <small>first {entry['favoured_first']}, second {entry['favoured_second']}</small>"
            f"</td>{_count(entry['malformed'] + entry['failed'])}</tr>"
        )
    titles = {
        "": "", "wins %": "the first arm was preferred in both orders", "ties %": "",
        "losses %": "the second arm was preferred in both orders",
        "score %": "wins and half the ties, with its interval", "rows": "pairs that were judged",
        "consistent %": "the order did not matter; beside it, how often the answer shown first, or "
        "second, won both times",
        "no verdict": "pairs without an answer, or whose answer held no verdict",
    }  # fmt: skip
    heads = "".join(
        f'<th scope="col" title="{about}">{title}</th>' if title else "<td></td>"
        for title, about in titles.items()
    )
    judges = ", ".join(dict.fromkeys(escape(e["model"]) or "not named" for e in entries))
    note = JUDGE_NOTE + (SEEDS_NOTE.split(";")[0] + "." if is_multi(view) else SIGN_NOTE)
    return (
        f'<p class="sub">Judge: <b>{judges}</b>. {note}</p>'
        '<div class="card scroll" tabindex="0"><table class="results judged" data-sort><caption>'
        f'Verdicts of the judge</caption><thead><tr><th scope="col">pair</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _group(view: View, arm: str) -> str:
    return str(view.arms.get(arm, {}).get("group", ""))


def _rate_cell(score: Json) -> str:
    value, low, high = (score[name] for name in ("value", "low", "high"))
    hint = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
    return f'<td data-value="{100 * value:.8g}" title="{hint}">{100 * value:.1f}</td>'


def _count(number: int) -> str:
    return f'<td data-value="{number}">{number}</td>'
