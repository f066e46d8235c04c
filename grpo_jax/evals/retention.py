"""What the model kept: likelihood of general text, and drift from the base model.

The forward KL(base || policy) is taken exactly, over the whole vocabulary at every position; on the
new task's prompts it predicts forgetting (RL's Razor, arXiv 2509.04259).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.learn.logps import forward_kl, token_logps
from grpo_jax.models.decoder import Decoder, head
from grpo_jax.structs import Array, TrainBatch


def build_retention(model: Decoder) -> Callable[[dict, dict, TrainBatch], tuple[Array, Array]]:
    """The jitted function retention(base_params, params, batch).

    Returns:
      nll float32 [P, G, T] of the batch's tokens under `params`, and KL(base || policy) float32
      [P, G, T] at their positions; both in nats and 0 where masked.
    """

    def retention(base_params: dict, params: dict, batch: TrainBatch) -> tuple[Array, Array]:
        def hidden(params: dict) -> Any:
            arguments = (batch.prompt_ids, batch.prompt_lengths, batch.ids)
            return model.apply({"params": params}, *arguments, method="predict")

        ours, theirs = hidden(params), hidden(base_params)
        cap = model.config.final_logit_softcapping
        logps, _ = token_logps(ours, head(params), batch.ids, batch.mask, 1.0, cap, model.rows)
        kl = forward_kl(theirs, head(base_params), ours, head(params), batch.mask, cap, model.rows)
        return -logps, kl

    return jax.jit(retention)


def summarise(nll: np.ndarray, kl: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Scores of general text from per-passage sums.

    Args:
      nll, kl: float [N], sums over a passage's tokens.
      lengths: int [N], tokens of each passage.

    Returns:
      nll_mean (a token), nll_p90 (the 90th percentile of the passages' means), kl (a token).
    """
    return {
        "nll_mean": float(nll.sum() / lengths.sum()),
        "nll_p90": float(np.quantile(nll / lengths, 0.9)),
        "kl": float(kl.sum() / lengths.sum()),
    }
