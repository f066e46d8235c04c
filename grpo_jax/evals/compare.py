"""Paired comparisons: every two arms on the same rows, within a run and over the seeds of several.

In: runs. Out: {metric: difference, interval, p} of each pair. Target metrics are counted from the
samples of an evaluation; the others from the `rows` that an entry may carry: one number a passage
or question, or [sum, weight] of it, in the same order in every arm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.evals.metrics import Statistic, statistics
from grpo_jax.evals.runs import Json, Run, section
from grpo_jax.evals.table import is_number

BOOTSTRAP = 1000  # resamples behind a paired comparison

Key = tuple[str, str, int]  # source, reference, and the how-manieth row with both


class Drawn(NamedTuple):
    """One metric of one arm, and what it is in each resample of its rows."""

    rows: Any  # two arms are paired only where this is equal: the same rows were resampled
    value: float
    draws: np.ndarray  # float64 [BOOTSTRAP]


def draw(run: Run) -> dict[str, dict[str, Drawn]]:
    """Resample the rows of each arm of a run, with the same draws for all: {arm: {metric: Drawn}}.

    Arms of one group are scored on the samples that all of them have.
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
            found[name] |= _resample(counted, (group, len(shared)))
    for name, evaluation in run.evaluations.items():
        for part in ("target", "retention"):
            entries = section(evaluation, part)
            for metric, statistic in _from_rows(entries).items():
                if metric not in found[name]:
                    asked = section(entries, metric).get("asked")
                    measured = part, len(statistic.rows), asked
                    found[name] |= _resample({metric: statistic}, measured)
    return found


def compare(drawn: Sequence[dict[str, dict[str, Drawn]]], arms: Sequence[str]) -> list[Json]:
    """Each pair of arms, as far as both were measured on the same rows.

    Args:
      drawn: `draw` of one run, or of every seed.
      arms: their order; the first of a pair stands before the second in it.

    Returns:
      [{"first", "second", "metrics": {metric: {"difference", "low", "high", "p"}}}], the difference
      being second - first, with its 95% interval and the two-sided p-value that it has the other
      sign (Koehn 2004).
      Over several runs the difference is the mean over seeds, "seeds" lists it for each, "sd" is
      its standard deviation, and a resample draws seeds and rows, so that the interval holds both.
    """
    found = []
    for first, second in combinations(arms, 2):
        pairs: dict[str, list[tuple[Drawn, Drawn]]] = {}
        for run in drawn:
            ours, theirs = run.get(first, {}), run.get(second, {})
            for metric in ours:
                if metric in theirs and ours[metric].rows == theirs[metric].rows:
                    pairs.setdefault(metric, []).append((ours[metric], theirs[metric]))
        if pairs:
            metrics = {metric: _difference(both) for metric, both in pairs.items()}
            found.append({"first": first, "second": second, "metrics": metrics})
    return found


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


def _resample(counted: dict[str, Statistic], rows: Any) -> dict[str, Drawn]:
    """All metrics of one arm; the draws depend on the number of rows only."""
    n = len(next(iter(counted.values())).rows)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1.0 / n), size=BOOTSTRAP)
    weights = counts.astype(np.float64)
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
