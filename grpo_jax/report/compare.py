"""Paired comparisons: every two arms on the same rows, within a run and over the seeds of several.

In: runs. Out: {metric: difference, interval, p} of each pair. Target metrics are counted from the
samples of an evaluation; the others from the `rows` that an entry may carry: one number a passage
or question, or [sum, weight] of it, in the same order in every arm. And what a judge said of pairs.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.evals.metrics import Statistic, statistics
from grpo_jax.report.runs import Json, Run, section
from grpo_jax.report.table import is_number

BOOTSTRAP = 1000  # resamples behind a paired comparison, at least
PER_ARM = 100  # and so many for each arm of a group, for p-values that survive their correction

Key = tuple[str, str, int]  # source, reference, and the how-manieth row with both


class Drawn(NamedTuple):
    """One metric of one arm, and what it is in each resample of its rows."""

    rows: Any  # two arms are paired only where this is equal: the same rows were resampled
    value: float
    draws: np.ndarray  # float64 [resamples]


def resamples(groups: Mapping[str, str]) -> int:
    """How many resamples comparisons need among {arm: group}.

    The smallest p of B resamples is 2 / (B + 1), which Holm multiplies by the number of arms.
    """
    return max(BOOTSTRAP, PER_ARM * max(Counter(groups.values()).values(), default=0))


def draw(run: Run, count: int = BOOTSTRAP) -> dict[str, dict[str, Drawn]]:
    """Resample the rows of each arm of a run, with the same draws for all: {arm: {metric: Drawn}}.

    Arms of one group are scored on the samples that all of them have; `count` is the number of
    resamples.
    """
    found: dict[str, dict[str, Drawn]] = {name: {} for name in run.evaluations}
    groups: dict[str, dict[str, dict[Key, Json]]] = {}
    for arm in run.arms:
        samples = _by_text(run.evaluations.get(arm.name, {}).get("samples"))
        if samples:
            groups.setdefault(arm.group, {})[arm.name] = samples
    for group, members in groups.items():
        first = next(iter(members.values()))
        shared = [key for key in first if all(key in rows for rows in members.values())]
        if len(shared) < 2:
            continue
        names = _numbers([rows[key] for rows in members.values() for key in shared])
        for name, rows in members.items():
            counted = _statistics([rows[key] for key in shared], shared, names)
            found[name] |= _resample(counted, (group, len(shared)), count)
    for name, evaluation in run.evaluations.items():
        for part in ("target", "retention"):
            entries = section(evaluation, part)
            for metric, statistic in _from_rows(entries).items():
                if metric not in found[name]:
                    asked = section(entries, metric).get("asked")
                    measured = part, len(statistic.rows), asked
                    found[name] |= _resample({metric: statistic}, measured, count)
    return found


def compare(drawn: Sequence[dict[str, dict[str, Drawn]]], groups: Mapping[str, str]) -> list[Json]:
    """Each pair of arms, as far as both were measured on the same rows.

    Args:
      drawn: `draw` of one run, or of every seed.
      groups: {arm: group} in order; the first of a pair stands before the second in it.

    Returns:
      [{"first", "second", "metrics": {metric: {"difference", "low", "high", "p", "holm"}}}], the
      difference being second - first, with its 95% interval and the two-sided p-value that it has
      the other sign (Koehn 2004). "holm" is p corrected for the number of comparisons in a table:
      [all arms of second's group against first, all arms of first's group against second].
      Over several runs the difference is the mean over seeds, "seeds" lists it for each, "sd" is
      its standard deviation, and a resample draws seeds and rows, so that the interval holds both.
    """
    found = []
    for first, second in combinations(groups, 2):
        pairs: dict[str, list[tuple[Drawn, Drawn]]] = {}
        for run in drawn:
            ours, theirs = run.get(first, {}), run.get(second, {})
            for metric in ours:
                if metric in theirs and ours[metric].rows == theirs[metric].rows:
                    pairs.setdefault(metric, []).append((ours[metric], theirs[metric]))
        if pairs:
            metrics = {metric: _difference(both) for metric, both in pairs.items()}
            found.append({"first": first, "second": second, "metrics": metrics})
    _correct(found, groups)
    return found


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in their order (Holm 1979); at most 1."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p)[order] * (len(p) - np.arange(len(p)))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]


def _correct(pairs: list[Json], groups: Mapping[str, str]) -> None:
    """Write "holm" into the metrics of each pair."""
    families: dict[tuple[str, str, str], list[tuple[Json, int]]] = {}
    for pair in pairs:
        for metric, entry in pair["metrics"].items():
            entry["holm"] = [1.0, 1.0]
            for side, (one, other) in enumerate((("first", "second"), ("second", "first"))):
                family = pair[one], groups[pair[other]], metric
                families.setdefault(family, []).append((entry, side))
    for members in families.values():
        corrected = holm([entry["p"] for entry, _ in members])
        for (entry, side), p in zip(members, corrected, strict=True):
            entry["holm"][side] = p


def preferences(runs: Sequence[Run]) -> list[Json]:
    """What the judge of `evals.preference` said of each pair of arms; the form is summary's."""
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.preferences):
        own = [section(run.preferences, name) for run in runs]
        known = [one for one in own if is_number(one.get("judged"))]
        first, _, second = name.partition(":")
        if not known:
            continue
        entry: Json = {"first": first, "second": second, "model": _judge(runs)}
        for metric in ("win", "tie", "lose", "score"):
            scores = [section(section(one, "metrics"), metric) for one in own]
            entry[metric] = _score(scores)
        for count in ("judged", "disagreed", "malformed", "failed"):
            entry[count] = sum(int(one.get(count, 0)) for one in known)
        entry["consistency"] = 1 - entry["disagreed"] / max(entry["judged"], 1)
        both = [item.get("verdicts") for one in known for item in _items(one)]
        entry["favoured_first"] = both.count(["A", "A"])
        entry["favoured_second"] = both.count(["B", "B"])
        outcomes = Counter(item.get("outcome") for one in known for item in _items(one))
        # Texts are the same in every seed, so their verdicts are not independent.
        entry["p"] = sign_test(outcomes["win"], outcomes["lose"]) if len(runs) == 1 else None
        found.append(entry)
    corrected = holm([entry["p"] for entry in found if entry["p"] is not None])
    for entry in found:
        entry["holm"] = None if entry["p"] is None else corrected.pop(0)
    return found


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of as unequal a split when both are equally likely; ties are left out."""
    n, tail = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(tail + 1)) / 2**n)


def over_seeds(values: Sequence[float | None]) -> Json:
    """SCORE of several runs: mean and standard deviation; None where a run lacks the value."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known))
    sd = float(np.std(known, ddof=1)) if len(known) > 1 else None
    low, high = (None, None) if sd is None else (mean - sd, mean + sd)
    return {"value": mean, "low": low, "high": high, "sd": sd, "seeds": list(values)}


def _score(scores: list[Json]) -> Json:
    if len(scores) == 1:
        return {name: scores[0].get(name) for name in ("value", "low", "high")}
    return over_seeds([score.get("value") for score in scores])


def _judge(runs: Sequence[Run]) -> str:
    config = section(section(runs[0].config, "config"), "evaluation")
    return str(section(config, "preference").get("model", ""))


def _items(judged: Json) -> list[Json]:
    items = judged.get("items")
    return [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []


def _difference(pairs: list[tuple[Drawn, Drawn]]) -> Json:
    seeds = [b.value - a.value for a, b in pairs]
    draws = np.stack([b.draws - a.draws for a, b in pairs])
    if len(pairs) == 1:
        drawn = draws[0]
    else:
        picks = np.random.default_rng(0).integers(len(pairs), size=(draws.shape[1], len(pairs)))
        drawn = draws[picks, np.arange(draws.shape[1])[:, None]].mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    result: Json = {
        "difference": float(np.mean(seeds)),
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1))),
    }
    if len(pairs) > 1:
        result |= {"seeds": seeds, "sd": float(np.std(seeds, ddof=1))}
    return result


@functools.lru_cache(maxsize=2)
def _weights(n: int, count: int) -> np.ndarray:
    """How often each of n rows is drawn, float64 [count, n]: the same for all arms."""
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1.0 / n), size=count)
    weights = drawn.astype(np.float64)
    weights.flags.writeable = False
    return weights


def _resample(counted: dict[str, Statistic], rows: Any, count: int) -> dict[str, Drawn]:
    """All metrics of one arm; the draws depend on the number of rows only."""
    weights = _weights(len(next(iter(counted.values())).rows), count)
    return {
        metric: Drawn(
            rows,
            float(statistic.score(statistic.rows.sum(0))),
            np.asarray(statistic.score(weights @ statistic.rows)),
        )
        for metric, statistic in counted.items()
    }


def _by_text(samples: Any) -> dict[Key, Json]:
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in samples if isinstance(samples, list) else []:
        if isinstance(row, dict):
            text = str(row.get("source", "")), str(row.get("reference", ""))
            found[(*text, seen[text])] = row
            seen[text] += 1
    return found


def _numbers(rows: list[Json]) -> list[str]:
    """Names of the scores that every sample has."""
    return [name for name in rows[0] if all(is_number(row.get(name)) for row in rows)]


def _statistics(rows: list[Json], keys: list[Key], names: list[str]) -> dict[str, Statistic]:
    found = statistics(
        hypotheses=[str(row.get("completion", "")) for row in rows],
        references=[reference for _, reference, _ in keys],
        sources=[source for source, _, _ in keys],
        similarities={name: np.array([float(row[name]) for row in rows]) for name in names},
        gate_mask=np.array([bool(row.get("language_consistency")) for row in rows]),
    )
    if not all("language_consistency" in row for row in rows):  # older samples do not say
        found.pop("language_consistency", None)
    return found


def _from_rows(entries: Json) -> dict[str, Statistic]:
    """Metrics whose entries carry one number, or [sum, weight], for each passage or question."""
    found = {}
    for metric, entry in entries.items():
        rows = entry.get("rows") if isinstance(entry, dict) else None
        if not isinstance(rows, list) or len(rows) < 2:
            continue
        try:
            table = np.asarray(rows, np.float64)
        except (ValueError, TypeError):
            raise ValueError(f"evaluation: the rows of {metric} are not numbers.") from None
        if table.ndim == 1:
            table = np.stack([table, np.ones(len(table))], axis=1)
        if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table).all():
            raise ValueError(
                f"evaluation: rows of {metric}: wanted numbers or [sum, weight], all finite, got "
                f"shape {table.shape}."
            )
        found[metric] = Statistic(table, _ratio)
        if metric == "nll_mean" and "nll_p90" in entries:
            found["nll_p90"] = _quantile(table[:, 0] / np.maximum(table[:, 1], 1e-9), 0.9)
    return found


def _ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1.0)


def _quantile(values: np.ndarray, share: float) -> Statistic:
    """A quantile (linear interpolation, as numpy's) as a function of how often each row is drawn.

    The rows are the identity, so that their weighted sum is the counts themselves.
    """
    order = np.argsort(values, kind="stable")
    place = share * (len(values) - 1)
    below = int(np.floor(place))
    above = min(below + 1, len(values) - 1)

    def score(counts: np.ndarray) -> np.ndarray:
        cumulative = np.cumsum(counts[..., order], axis=-1)

        def at(rank: int) -> np.ndarray:
            return values[order][np.argmax(cumulative > rank + 0.5, axis=-1)]

        return at(below) + (place - below) * (at(above) - at(below))

    return Statistic(np.eye(len(values)), score)
