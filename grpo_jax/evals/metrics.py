"""Scores of one arm on held-out text: texts in, metrics with 95% confidence intervals out.

Every metric is a function of sums over sentences (BLEU and chrF++ of n-gram counts, the others of a
numerator and a denominator). So a sentence is counted once, and a bootstrap resample is a matrix
product of resampling counts with those statistics: no text is scored twice.

chrf++, bleu and rouge_l run from 0 to 100, everything else from 0 to 1 (cosines from -1).
Rows without a reference are left out of the metrics that need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from grpo_jax.text.measures import is_empty, repeated_share, sanitise
from grpo_jax.text.scripts import units, written_without_spaces

COPIED = 0.8  # share of the hypothesis's units that also stand in the source


class Statistic(NamedTuple):
    """A metric before it is summed up."""

    rows: np.ndarray  # float64 [N, K], what each sentence contributes
    score: Callable[[np.ndarray], np.ndarray]  # sums [..., K] -> metric [...]


def statistics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    similarities: Mapping[str, np.ndarray],
    gate_mask: np.ndarray,
) -> dict[str, Statistic]:
    """Count each sentence once, for `bootstrap_intervals` and `paired_bootstrap`.

    Args:
      hypotheses, references, sources: N texts each; a reference may be ''.
      similarities: float [N] under each metric name, such as a cosine for every encoder.
      gate_mask: bool [N], True where the hypothesis is in the wanted language.

    Raises:
      ValueError: no rows, lengths that differ, or similarities that are not finite.
    """
    n = len(hypotheses)
    sizes = {"references": len(references), "sources": len(sources), "gate_mask": len(gate_mask)}
    sizes |= {name: len(values) for name, values in similarities.items()}
    wrong = {name: size for name, size in sizes.items() if size != n}
    if n == 0 or wrong:
        raise ValueError(f"evaluation: got {n} hypotheses and {wrong or 'nothing to score'}.")
    for name, values in similarities.items():
        if not np.isfinite(values).all():
            raise ValueError(f"evaluation: {name} holds values that are not finite.")

    hypotheses = [sanitise(text) for text in hypotheses]
    pieces = [units(text) for text in hypotheses]
    every = np.ones(n)
    found = _reference_statistics(hypotheses, [sanitise(text) for text in references], pieces)
    for name, values in similarities.items():
        found[name] = _mean(np.asarray(values, np.float64), every)
    found["language_consistency"] = _mean(np.asarray(gate_mask, np.float64), every)
    copied = [
        _overlap(piece, units(sanitise(source))) >= COPIED
        and _overlap(units(sanitise(reference)), units(sanitise(source))) < COPIED
        for piece, source, reference in zip(pieces, sources, references, strict=True)
    ]
    found["copy_rate"] = _mean(np.array(copied, np.float64), every)
    found["repeated_4grams"] = _mean(np.array([repeated_share(p) for p in pieces]), every)
    found["empty_rate"] = _mean(np.array([is_empty(h) for h in hypotheses], np.float64), every)
    return found


def translation_metrics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    sources: Sequence[str],
    similarities: Mapping[str, np.ndarray],
    gate_mask: np.ndarray,
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Score one arm: {metric: {"value", "low", "high"}} with 95% percentile intervals.

    chrf++ and bleu equal sacrebleu's corpus scores. BLEU's tokens are 13a's, or `units` where the
    references are written without spaces. rouge_l is rouge_score's mean F1 over the
    `units`. length_ratio is the corpus ratio in units. copy_rate is the share of hypotheses made of
    the source's units where the reference is not.

    Args:
      hypotheses, references, sources, similarities, gate_mask: see `statistics`.
      bootstrap: resamples; 0 gives intervals of width 0.
      seed: of the resampling.
    """
    found = statistics(hypotheses, references, sources, similarities, gate_mask)
    return bootstrap_intervals(found, bootstrap, seed)


def bootstrap_intervals(
    found: Mapping[str, Statistic], bootstrap: int, seed: int
) -> dict[str, dict[str, float]]:
    """Sum up statistics: {metric: {"value", "low", "high"}} (Koehn 2004, resampling sentences)."""
    counts = _resamples(found, bootstrap, seed)
    result = {}
    for name, (rows, score) in found.items():
        value = float(score(rows.sum(0)))
        low, high = (value, value)
        if bootstrap:
            low, high = (float(x) for x in np.percentile(score(counts @ rows), [2.5, 97.5]))
        result[name] = {"value": value, "low": low, "high": high}
    return result


def paired_bootstrap(
    first: Mapping[str, Statistic], second: Mapping[str, Statistic], bootstrap: int, seed: int
) -> dict[str, dict[str, float]]:
    """Compare two arms on the same sentences (Koehn 2004, "Statistical Significance Tests").

    Args:
      first, second: `statistics` of the arms over the same rows in the same order.
      bootstrap: resamples, at least 1; each draws the same sentences for both arms.
      seed: of the resampling.

    Returns:
      {metric: {"difference": second - first, "low", "high", "p"}}: a 95% interval, and the
      two-sided p-value that the difference has the other sign.
    """
    shared = [name for name in first if name in second]
    sizes = {len(arm[name].rows) for name in shared for arm in (first, second)}
    if len(sizes) != 1:
        raise ValueError(f"paired bootstrap: the arms need the same rows, got {sorted(sizes)}.")
    counts = _resamples(first, bootstrap, seed)
    result = {}
    for name in shared:
        (rows_a, score), (rows_b, _) = first[name], second[name]
        drawn = score(counts @ rows_b) - score(counts @ rows_a)
        low, high = np.percentile(drawn, [2.5, 97.5])
        tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
        result[name] = {
            "difference": float(score(rows_b.sum(0)) - score(rows_a.sum(0))),
            "low": float(low),
            "high": float(high),
            "p": float(min(1.0, 2 * (tail + 1) / (bootstrap + 1))),
        }
    return result


def _resamples(found: Mapping[str, Statistic], bootstrap: int, seed: int) -> np.ndarray:
    """How often each sentence is drawn in each resample: float64 [bootstrap, N]."""
    n = len(next(iter(found.values())).rows)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=bootstrap)
    return draws.astype(np.float64)


def _mean(values: np.ndarray, weights: np.ndarray) -> Statistic:
    """A weighted mean as a ratio of sums; 0 where nothing was counted."""

    def score(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1.0)

    return Statistic(np.stack([values, weights], axis=1), score)


def _reference_statistics(
    hypotheses: list[str], references: list[str], pieces: list[list[str]]
) -> dict[str, Statistic]:
    """The metrics that compare with a reference; empty when no row has one."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    has = [i for i, text in enumerate(references) if not is_empty(text)]
    if not has:
        return {}
    hyps, refs = [hypotheses[i] for i in has], [references[i] for i in has]

    def spread(counts: Sequence[Sequence[float]]) -> np.ndarray:
        rows = np.zeros((len(hypotheses), len(counts[0])))
        rows[has] = counts
        return rows

    chrf = CHRF(word_order=2)._extract_corpus_statistics(hyps, [refs])
    if written_without_spaces(refs):
        split_hyps, split_refs = ([" ".join(units(text)) for text in side] for side in (hyps, refs))
        bleu = BLEU(tokenize="none")._extract_corpus_statistics(split_hyps, [split_refs])
    else:
        bleu = BLEU(force=True)._extract_corpus_statistics(hyps, [refs])
    rouge = RougeScorer(["rougeL"], tokenizer=_Units())
    rouge_l = [
        [100 * rouge.score(ref, hyp)["rougeL"].fmeasure, 1.0]
        for hyp, ref in zip(hyps, refs, strict=True)
    ]
    lengths = [[len(pieces[i]), len(units(references[i]))] for i in has]
    ratio = _mean(np.zeros(0), np.zeros(0)).score
    return {
        "chrf++": Statistic(spread(chrf), _chrf),
        "bleu": Statistic(spread(bleu), _bleu),
        "rouge_l": Statistic(spread(rouge_l), ratio),
        "length_ratio": Statistic(spread(lengths), ratio),
    }


class _Units:
    """rouge_score's tokenizer protocol over our units, so that every script is split."""

    def tokenize(self, text: str) -> list[str]:
        return units(text)


def _overlap(piece: list[str], source: list[str]) -> float:
    """Share of the units of `piece` that stand in `source`; 0 for an empty piece."""
    there = set(source)
    return sum(unit in there for unit in piece) / len(piece) if piece else 0.0


def _bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 with exponential smoothing, as sacrebleu's default.

    Args:
      sums: [..., 10]: hypothesis length, reference length, 4 matched and 4 total n-gram counts.
    """
    hyp_len, ref_len = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2:6], sums[..., 6:10]
    # An order without a match counts as 1 / 2^k matches, k = 1, 2, ... over such orders.
    halvings = 0.5 ** np.cumsum(matched == 0, axis=-1)
    precision = np.where(matched > 0, matched, halvings) / np.where(total > 0, total, 1.0)
    brevity = np.exp(np.minimum(0.0, 1.0 - ref_len / np.where(hyp_len > 0, hyp_len, 1.0)))
    scorable = (matched.sum(-1) > 0) & (total > 0).all(-1)
    return np.where(scorable, 100.0 * brevity * np.exp(np.log(precision).mean(-1)), 0.0)


def _chrf(sums: np.ndarray) -> np.ndarray:
    """chrF++ (beta 2, 6 character and 2 word orders) without smoothing, as sacrebleu's default.

    Args:
      sums: [..., 24]: hypothesis, reference and matched count of each of the 8 orders.
    """
    hyp, ref, matched = (sums[..., i::3] for i in range(3))
    counted = (hyp > 0) & (ref > 0)
    orders = np.maximum(counted.sum(-1), 1)
    precision = np.where(counted, matched / np.where(hyp > 0, hyp, 1.0), 0.0).sum(-1) / orders
    recall = np.where(counted, matched / np.where(ref > 0, ref, 1.0), 0.0).sum(-1) / orders
    bottom = 4.0 * precision + recall
    return 100.0 * 5.0 * precision * recall / np.where(bottom > 0, bottom, 1.0)
