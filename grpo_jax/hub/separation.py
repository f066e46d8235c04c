"""Do an encoder's vectors tell matched texts from mismatched ones? AUC, P@1 and their intervals."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

RESAMPLES = 200  # behind the 95% intervals
_PIECE = re.compile(r"[^\s\u0f0b]+[\s\u0f0b]*")  # a word, or a Tibetan syllable, and what follows


@dataclasses.dataclass(frozen=True)
class Separation:
    """Cosines of N matched pairs against all N (N - 1) mismatched ones; 95% intervals over rows."""

    pairs: int
    matched: float  # mean cosine
    mismatched: float
    auc: float  # Mann-Whitney: share of (matched, mismatched) where the matched pair is closer
    auc_interval: tuple[float, float]
    forward: float  # P@1: the share of left texts whose closest right text is their own
    forward_interval: tuple[float, float]
    backward: float  # P@1 from right to left
    backward_interval: tuple[float, float]


def thin(text: str) -> str:
    """The text without every third word, Tibetan syllable or, where nothing is spaced, character.

    `thin("a b c d e")` is `"a c d "`.
    """
    pieces = _PIECE.findall(text)
    if len(pieces) < 3:
        pieces = list(text)
    return "".join(piece for i, piece in enumerate(pieces) if i % 3 != 1)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows [N, D] scaled to length 1, in float64; a row of zeros stays."""
    vectors = np.asarray(vectors, np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def separation(left: np.ndarray, right: np.ndarray, seed: int = 0) -> Separation:
    """How well cosines tell row i with row i from row i with row j.

    Ties count half in the AUC and against the pair in P@1. The intervals resample rows, so that a
    text is in or out with all its pairs.

    Args:
      left, right: float [N, D], rows of unit length, N at least 2.
      seed: of the resamples.

    Raises:
      ValueError: shapes that differ, or vectors that are not finite.
    """
    if left.shape != right.shape or left.ndim != 2 or len(left) < 2:
        raise ValueError(f"left and right: got {left.shape} and {right.shape}, wanted equal [N, D]")
    cosines = np.round(left @ right.T, 7)  # equal texts must tie, whatever the rounding
    if not np.isfinite(cosines).all():
        raise ValueError("the encoder gave vectors that are not finite; check its weights")
    count = len(cosines)
    own = np.diagonal(cosines)
    off = ~np.eye(count, dtype=bool)
    i, j = np.nonzero(off)
    order = np.argsort(cosines[off], kind="stable")
    i, j, others = i[order], j[order], cosines[off][order]
    below, upto = np.searchsorted(others, own, "left"), np.searchsorted(others, own, "right")

    def auc(weight: np.ndarray) -> float:
        mass = np.concatenate([[0.0], np.cumsum(weight[i] * weight[j])])
        return float(weight @ (mass[below] + mass[upto]) / (2 * weight.sum() * mass[-1]))

    rivals = np.where(off, cosines, -np.inf)
    forward, backward = own > rivals.max(1), own > rivals.max(0)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)
    draws = draws[(draws > 0).sum(1) > 1]  # one row alone has no mismatched pair

    def interval(values: np.ndarray | list[float]) -> tuple[float, float]:
        low, high = np.quantile(values, (0.025, 0.975))
        return float(low), float(high)

    return Separation(
        pairs=count,
        matched=float(own.mean()),
        mismatched=float(others.mean()),
        auc=auc(np.ones(count)),
        auc_interval=interval([auc(weight) for weight in draws]),
        forward=float(forward.mean()),
        forward_interval=interval(draws @ forward / count),
        backward=float(backward.mean()),
        backward_interval=interval(draws @ backward / count),
    )


def lines(found: Separation) -> list[str]:
    """A Separation in three lines."""

    def shown(value: float, ends: tuple[float, float]) -> str:
        return f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"

    return [
        f"mean cosine   {found.matched:.3f} matched, {found.mismatched:.3f} mismatched",
        f"AUC           {shown(found.auc, found.auc_interval)}",
        f"P@1           {shown(found.forward, found.forward_interval)} forward, "
        f"{shown(found.backward, found.backward_interval)} backward, chance {1 / found.pairs:.3f}",
    ]
