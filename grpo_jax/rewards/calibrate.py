"""tau from the cold-start model: dev similarities in, the threshold of the semantic reward out."""

from __future__ import annotations

import numpy as np

HIGHEST_TAU = 0.95  # above this (s - tau) / (1 - tau) would mostly amplify the metric's noise


def calibrate_tau(similarities: np.ndarray, quantile: float) -> float:
    """Take a quantile of the cold-start model's similarities on dev, kept within [0, 0.95].

    arXiv 2605.14366 sets tau to "the minimal semantic adequacy level from the cold-start phase".

    Args:
      similarities: float [N], of each dev completion with its anchor: what
        `Scorer.similarity_to_anchor` returns.
      quantile: in [0, 1].

    Raises:
      ValueError: no similarities, one that is not finite, or a quantile out of range.
    """
    values = np.asarray(similarities, np.float64).ravel()
    if not 0.0 <= quantile <= 1.0:
        raise ValueError(f"reward.tau_quantile: got {quantile}, wanted a number in [0, 1].")
    if values.size == 0:
        raise ValueError(
            "tau cannot be calibrated: the dev set is empty. Give data.dev, raise "
            "data.dev_fraction, or set reward.tau yourself."
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"tau cannot be calibrated: {np.sum(~np.isfinite(values))} of {values.size} dev "
            "similarities are not finite. Check the encoder's weights, or set reward.tau yourself."
        )
    return float(np.clip(np.quantile(values, quantile), 0.0, HIGHEST_TAU))
