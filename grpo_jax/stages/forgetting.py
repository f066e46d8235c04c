"""What a model forgets: likelihood and drift from base on general text, at the end and while it
trains.

Evaluation takes the first passages of `evaluation.retention`, the live gauge of a training stage
the ones behind them, so that what training was steered by is not what it is judged on.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from grpo_jax import assets
from grpo_jax.config import Config
from grpo_jax.data.batches import in_order, sft_batch
from grpo_jax.data.corpus import Example
from grpo_jax.evals.retention import build_retention, summarise
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models.decoder import Decoder
from grpo_jax.structs import Row

_NOTHING = Row("", "", "")


@dataclasses.dataclass(frozen=True)
class Retention:
    """Passages of general text, and the jitted function that compares two models on rows."""

    cfg: Config
    mesh: jax.sharding.Mesh
    passages: list[Example]  # that arms are measured on
    live: list[Example]  # that the gauge of a training stage looks at
    drift: Any  # `build_retention`'s function

    def general(self, base: dict, params: dict) -> dict[str, Any]:
        """NLL and forward KL(base || params) of the passages; {} where there are none.

        A measure is {"value": ..., "rows": [[sum, tokens], ...]}, a row a passage, so that arms can
        be compared in pairs.
        """
        if not self.passages:
            return {}
        nll, kl, lengths = self._sums(base, params, self.passages, 1, self._limit)
        scores = summarise(nll, kl, lengths)
        return {
            "nll_mean": {"value": scores["nll_mean"], "rows": _rows(nll, lengths)},
            "nll_p90": scores["nll_p90"],  # its interval comes from nll_mean's rows
            "kl_general": {"value": scores["kl"], "rows": _rows(kl, lengths)},
        }

    def task(self, base: dict, params: dict, answers: list[Example], cfg: Config) -> dict[str, Any]:
        """Forward KL(base || params) along the base's own answers to a task's prompts."""
        data = cfg.data
        nll, kl, lengths = self._sums(
            base, params, answers, data.max_prompt_length, data.max_completion_length
        )
        value = summarise(nll, kl, lengths)["kl"]
        return {"kl_task": {"value": value, "rows": _rows(kl, lengths)}}

    def gauge(self, base: dict, params: dict) -> dict[str, float]:
        """The live metrics forgetting/kl and forgetting/nll, nats a token."""
        nll, kl, lengths = self._sums(base, params, self.live, 1, self._limit)
        scores = summarise(nll, kl, lengths)
        return {"forgetting/kl": scores["kl"], "forgetting/nll": scores["nll_mean"]}

    @property
    def _limit(self) -> int:
        return self.cfg.evaluation.max_retention_length

    def _sums(
        self, base: dict, params: dict, examples: list[Example], prompts: int, limit: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """NLL and KL summed over each example's completion, and its length: float64 [N] each."""
        parts = []
        for indices, count in in_order(len(examples), self.cfg.evaluation.batch_size):
            batch = sft_batch(examples, indices, prompts, limit)
            values = self.drift(base, params, mesh_lib.put_same(self.mesh, batch))
            columns = [*map(mesh_lib.fetch, values), batch.mask]
            parts.append([np.float64(x).sum((1, 2))[:count] for x in columns])
        nll, kl, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
        return nll, kl, lengths


def open_retention(
    cfg: Config, model: Decoder, mesh: jax.sharding.Mesh, tokenizer: Any
) -> Retention:
    """Reads the passages of `evaluation.retention`, one a line, cut to the limit.

    Raises:
      ValueError: the file cannot be read, or has too few passages.
    """
    passages: list[Example] = []
    live: list[Example] = []
    if cfg.evaluation.retention:
        wanted = cfg.evaluation.max_retention_rows
        every = _read_passages(cfg, tokenizer)
        passages = every[:wanted]
        if cfg.forgetting.every:
            live = every[wanted : wanted + cfg.forgetting.rows]
            if not live:
                raise ValueError(
                    f"forgetting.every: evaluation.retention has {len(every)} passages, and "
                    f"evaluation takes them all; lower max_retention_rows = {wanted}, or give more"
                )
    return Retention(cfg, mesh, passages, live, build_retention(model))


def _read_passages(cfg: Config, tokenizer: Any) -> list[Example]:
    """All passages of two tokens or more; those of one token say nothing."""
    path = assets.resolve(cfg.evaluation.retention)
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"evaluation.retention: cannot read {path}: {error}; give a UTF-8 text file with one "
            "passage a line, or '' to measure no retention on general text"
        ) from error
    most = cfg.evaluation.max_retention_rows + cfg.forgetting.rows * bool(cfg.forgetting.every)
    ids = (tokenizer.encode(line)[: cfg.evaluation.max_retention_length] for line in lines[:most])
    found = [Example(_NOTHING, tokens[:1], tokens[1:]) for tokens in ids if len(tokens) > 1]
    if not found:
        raise ValueError(f"evaluation.retention: {path} holds no passage of two tokens or more")
    return found


def _rows(sums: np.ndarray, lengths: np.ndarray) -> list[list[float]]:
    return np.stack([sums, lengths], axis=1).tolist()
