"""report.json: every number of the page, from one run or from the seeds of one experiment.

{
  "format": 1,
  "name", "workdirs": [str], "seeds": [int], "spread": "rows" or "seeds",
  "arms": [{"name", "title", "method", "start", "group", "overrides", "index", "samples"}],
  "columns": [{"key", "section", "title", "digits", "scale", "better", "about"}],
  "scores": {arm: {"target": {key: SCORE}, "retention": {key: SCORE}}},
  "comparisons": [{"first", "second", "metrics": {key: {"difference", "low", "high", "p",
                                                        "holm": [p, p]}}}],
  "preferences": [{"first", "second", "model", "win", "tie", "lose", "score": SCORE, "judged",
                   "disagreed", "malformed", "failed", "consistency", "favoured_first",
                   "favoured_second", "p", "holm"}],
  "tax": [{"group", "target": key, "retention": key, "points": [{"arm", "x": SCORE, "y": SCORE}],
           "front": [arm], "floors": {arm: value}}],
  "curves": {arm: {metric: {"steps", "values", "last", and "sd" over seeds}}},
  "costs": {arm: {"tokens", "seconds", "peak_bytes", "total_tokens", "total_seconds",
                  "evaluation_seconds", "evaluation_tokens"}},
  "samples": [{"group", "source", "reference", "answers": {arm: {"completion", and its scores}}}],
  "rollouts": [{"stage", "step", "count", "rows": [row of samples.jsonl]}],
  "runs": [{"workdir", **config.json}]
}

SCORE is {"value", "low", "high"}. With one run ("spread": "rows") low and high are the 95%
bootstrap interval over test rows, or null where it is not known. With several ("spread": "seeds")
the value is the mean over seeds, low and high are one standard deviation (n - 1) to each side, and
"sd" and "seeds" (the value of each run, in the order of "workdirs"; null where it lacks the arm)
stand beside them. Numbers are in the unit in which they were measured; the page shows value *
scale. "index" sets an arm's colour and mark: arms of one group differ in it, and an arm that starts
from another group's arm has that one's. "overrides" are the fields that are its own.

tax: y is the target score; x is what was lost against base, so that left is better: the rise of a
metric of which less is better, the fall of one of which more is. Its interval is the paired one of
`comparisons` where rows are known, else the arm's own, moved; over seeds, that of the seeds'
differences. The front holds the arms to which no other is at once no worse in both and better in
one. Curves are averaged over equal stretches to at most MAX_POINTS points ("last" is the last value
itself). The totals of an arm count, once each, all arms that it comes from. Samples and rollouts
are those of the first run.

Comparisons: second - first, paired on equal rows (`grpo_jax.report.compare`). "holm" is p corrected
for the arms in a table: all of second's group against first, and all of first's against second.
Preferences: shares of the judged pairs in which the judge preferred first (win), neither or second
(lose); score is wins and half the ties. "judged", "malformed" and "failed" count pairs, over all
seeds; "disagreed" those that are ties because the two orders contradicted each other,
"consistency" is the share of the others; "favoured_first" and "favoured_second" count pairs in
which the answer that was shown first, or second, won both times. "p" is the sign test of wins and
losses, "holm" the same corrected for the number of pairs; null over seeds. A number has at most 8
significant digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from grpo_jax.report.compare import Drawn, compare, draw, over_seeds, preferences, resamples
from grpo_jax.report.costs import costs
from grpo_jax.report.runs import Arm, Json, Run, check_seeds, section
from grpo_jax.report.table import Cell, Column, cell, columns, is_number

FORMAT = 1
MAX_POINTS = 200  # of a curve
MAX_ROLLOUT_STEPS, MAX_ROLLOUTS = 8, 64  # an arm's steps, and completions of each


def summarise(runs: Sequence[Run]) -> Json:
    """The report of one run, or of the seeds of one experiment; its form is above.

    Raises:
      ValueError: the runs are not seeds of one experiment (`check_seeds`).
    """
    check_seeds(runs)
    arms = _all_arms(runs)
    groups = {arm.name: arm.group for arm in arms}
    drawn = [draw(run, resamples(groups)) for run in runs]
    found = columns(evaluation for run in runs for evaluation in run.evaluations.values())
    scores = {arm.name: entry for arm in arms if (entry := _scores(arm.name, runs, drawn, found))}
    comparisons = compare(drawn, {arm: group for arm, group in groups.items() if arm in scores})
    first = runs[0]
    report = {
        "format": FORMAT,
        "name": first.name if len(runs) == 1 else f"{first.name} and {len(runs) - 1} more",
        "workdirs": [run.path for run in runs],
        "seeds": [run.seed for run in runs],
        "spread": "rows" if len(runs) == 1 else "seeds",
        "arms": _arm_entries(arms, runs),
        "columns": [column._asdict() for column in found],
        "scores": scores,
        "comparisons": comparisons,
        "preferences": preferences(runs),
        "tax": _tax(arms, scores, found, comparisons),
        "curves": {arm.name: c for arm in arms if (c := _curves(arm.name, runs))},
        "costs": costs(arms, runs),
        "samples": _samples(first),
        "rollouts": _rollouts(first.rollouts),
        "runs": [{"workdir": run.path, **run.config} for run in runs],
    }
    return _tidy(report)


def _all_arms(runs: Sequence[Run]) -> list[Arm]:
    found: dict[str, Arm] = {}
    for run in runs:
        for arm in run.arms:
            found.setdefault(arm.name, arm)
    place = {"base": 0, "floor": 2}
    return sorted(found.values(), key=lambda arm: place.get(arm.method, 1))


def _arm_entries(arms: list[Arm], runs: Sequence[Run]) -> list[Json]:
    entries = []
    index = _indices([arm for arm in arms if arm.method not in ("base", "floor")])
    for arm in arms:
        samples = runs[0].evaluations.get(arm.name, {}).get("samples")
        number = len(samples) if isinstance(samples, list) else 0
        entries.append(arm._asdict() | {"index": index.get(arm.name), "samples": number})
    return entries


def _indices(arms: list[Arm]) -> dict[str, int]:
    """Places in the group's order; who carries an arm of another group over has that one's."""
    found: dict[str, int] = {}
    group_of = {arm.name: arm.group for arm in arms}
    for group in dict.fromkeys(arm.group for arm in arms):
        members = [arm for arm in arms if arm.group == group]
        taken: set[int] = set()
        for arm in members:
            carried = found.get(arm.start) if group_of.get(arm.start) != group else None
            if carried is not None and carried not in taken:
                found[arm.name] = carried
                taken.add(carried)
        free = (place for place in count() if place not in taken)
        found |= {arm.name: next(free) for arm in members if arm.name not in found}
    return found


def _scores(
    arm: str, runs: Sequence[Run], drawn: list[dict[str, dict[str, Drawn]]], found: list[Column]
) -> Json:
    """{"target": {key: SCORE}, "retention": {...}}; {} for an arm that was not measured."""
    result: Json = {}
    for column in found:
        plain = column._replace(scale=1)
        cells = [cell(run.evaluations.get(arm, {}), plain) for run in runs]
        if len(runs) == 1 and (one := cells[0]):
            resampled = drawn[0].get(arm, {}).get(column.key)
            low, high = one.low, one.high
            if low is None and resampled is not None:
                low, high = (float(x) for x in np.percentile(resampled.draws, [2.5, 97.5]))
            entry = {"value": one.value, "low": low, "high": high}
        elif any(cells):
            entry = over_seeds([c.value if c else None for c in cells])
        else:
            continue
        result.setdefault(column.section, {})[column.key] = entry
    return result


def _tax(
    arms: list[Arm], scores: dict[str, Json], found: list[Column], comparisons: list[Json]
) -> list[Json]:
    """One entry for every group, target score and measure of what was kept."""
    paired = {c["second"]: c["metrics"] for c in comparisons if c["first"] == "base"}
    goals = [c for c in found if c.section == "target" and _is_goal(c.key)]
    goals.sort(key=lambda c: (not c.key.startswith("judge"), c.key != "similarity"))
    kept = [c for c in found if c.section == "retention" and c.better]
    entries = []
    for group in dict.fromkeys(arm.group for arm in arms):
        members = [arm for arm in arms if arm.group == group and arm.name in scores]
        for y in goals:
            for x in kept:
                points = []
                for arm in members:
                    gained = section(scores[arm.name], "target").get(y.key)
                    lost = _lost(arm.name, arm.method == "base", x, scores, paired)
                    if arm.method != "floor" and gained and lost:
                        points.append({"arm": arm.name, "x": lost, "y": gained})
                if len(points) > 1:
                    floors = {
                        arm.name: entry["value"]
                        for arm in members
                        if arm.method == "floor"
                        and (entry := section(scores[arm.name], "target").get(y.key))
                    }
                    entries.append(
                        {
                            "group": group,
                            "target": y.key,
                            "retention": x.key,
                            "points": points,
                            "front": _front(points),
                            "floors": floors,
                        }
                    )
    return entries


def _is_goal(key: str) -> bool:
    return key in ("chrf++", "similarity") or key.startswith("judge_similarity")


def _lost(
    arm: str, is_base: bool, column: Column, scores: dict[str, Json], paired: dict[str, Json]
) -> Json | None:
    """What the arm lost of a metric against base; None where that cannot be said."""
    own = section(scores[arm], "retention").get(column.key)
    base = section(scores.get("base", {}), "retention").get(column.key)
    if column.key.startswith("kl_"):
        base = base or {"value": 0.0}  # the distance to itself
    if own is None or base is None:
        return None
    sign = -column.better
    if is_base:
        return {"value": 0.0, "low": None, "high": None}
    if "seeds" in own:
        starts = base.get("seeds", [0.0] * len(own["seeds"]))
        both = zip(own["seeds"], starts, strict=True)
        shifts = [None if a is None or b is None else sign * (a - b) for a, b in both]
        return None if all(shift is None for shift in shifts) else over_seeds(shifts)
    ends = paired.get(arm, {}).get(column.key)
    if ends is None:
        moved = Cell(own["value"], own["low"], own["high"]).shifted(-base["value"])
        ends = {"low": moved.low, "high": moved.high}
    low, high = (None if ends[k] is None else sign * ends[k] for k in ("low", "high"))
    if low is not None and high is not None:
        low, high = min(low, high), max(low, high)
    return {"value": sign * (own["value"] - base["value"]), "low": low, "high": high}


def _front(points: list[Json]) -> list[str]:
    """The arms that no other beats, from the least lost to the most."""
    at = {p["arm"]: (p["x"]["value"], p["y"]["value"]) for p in points}
    best = [
        arm
        for arm, (x, y) in at.items()
        if not any(a <= x and b >= y and (a, b) != (x, y) for a, b in at.values())
    ]
    return sorted(best, key=lambda arm: at[arm])


def _curves(arm: str, runs: Sequence[Run]) -> Json:
    series = [run.metrics[arm] for run in runs if arm in run.metrics]
    names = dict.fromkeys(name for one in series for name in one)
    return {name: _curve([one[name] for one in series if name in one]) for name in names}


def _curve(series: list[list[tuple[float, float]]]) -> Json:
    """Mean over seeds at each step, thinned; "sd" where several seeds have all the steps."""
    by_step: dict[float, list[float]] = {}
    for one in series:
        for step, value in one:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    values = [float(np.mean(by_step[step])) for step in steps]
    groups = np.array_split(np.arange(len(steps)), min(len(steps), MAX_POINTS))

    def thin(numbers: list[float]) -> list[float]:
        array = np.asarray(numbers, np.float64)
        return [float(array[group].mean()) for group in groups]

    curve = {"steps": thin(steps), "values": thin(values), "last": values[-1]}
    if len(series) > 1:
        spread = [float(np.std(by_step[s], ddof=1)) if len(by_step[s]) > 1 else 0.0 for s in steps]
        curve["sd"] = thin(spread)
    return curve


def _samples(run: Run) -> list[Json]:
    """Held-out rows of each group with every arm's answer, in the test set's order."""
    rows: dict[tuple[str, str, str, int], Json] = {}
    for arm in run.arms:
        samples = run.evaluations.get(arm.name, {}).get("samples")
        seen: dict[tuple[str, str], int] = {}
        for row in samples if isinstance(samples, list) else []:
            if not isinstance(row, dict):
                continue
            source, reference = str(row.get("source", "")), str(row.get("reference", ""))
            count = seen[source, reference] = seen.get((source, reference), -1) + 1
            entry = rows.setdefault(
                (arm.group, source, reference, count),
                {"group": arm.group, "source": source, "reference": reference, "answers": {}},
            )
            scores = {name: value for name, value in row.items() if is_number(value)}
            answer = {"completion": str(row.get("completion", "")), **scores}
            entry["answers"][arm.name] = answer
    return list(rows.values())


def _rollouts(rows: list[Json]) -> list[Json]:
    """What each arm wrote while it was trained, at a few steps from early to late."""
    groups: dict[str, dict[int, list[Json]]] = {}
    for row in rows:
        step = row.get("step")
        steps = groups.setdefault(str(row.get("stage", "")), {})
        steps.setdefault(step if isinstance(step, int) else 0, []).append(row)
    found = []
    for stage, steps in groups.items():
        keys = list(steps)
        places = np.linspace(0, len(keys) - 1, min(len(keys), MAX_ROLLOUT_STEPS)).round()
        for step in (keys[int(place)] for place in places):
            shown = steps[step][:MAX_ROLLOUTS]
            found.append({"stage": stage, "step": step, "count": len(steps[step]), "rows": shown})
    return found


def _tidy(value: Any) -> Any:
    """Python values that JSON can hold: 8 significant digits, null for what is not finite."""
    if isinstance(value, dict):
        return {str(key): _tidy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_tidy(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value
