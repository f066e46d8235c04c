"""Greedy completions of held-out rows, for calibration, dev scores and evaluation."""

from __future__ import annotations

import logging
from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.config import Config
from grpo_jax.data.batches import in_order, prompt_batch
from grpo_jax.data.corpus import Example
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models import lora
from grpo_jax.rewards.calibrate import calibrate_tau
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.structs import Rollout

_log = logging.getLogger(__name__)


class Generated(NamedTuple):
    texts: list[str]
    ids: list[list[int]]  # as sampled, the EOS included
    ended: np.ndarray  # bool [N], False where the limit cut the completion off


def merged(variables: dict) -> dict:
    """The parameters of the policy, an adapter merged."""
    if "lora" in variables:
        return jax.jit(lora.merge)(variables["params"], variables["lora"])
    return variables["params"]


def generate(run: Run, cfg: Config, params: dict, examples: list[Example]) -> Generated:
    """One greedy completion an example, in their order; all processes get all of them.

    Args:
      cfg: its data section says how long prompts and completions may be.
      params: merged, so that one compiled sampler serves every arm.
    """
    sample = run.greedy[cfg.data.max_completion_length]
    ids: list[list[int]] = []
    ended: list[bool] = []
    for indices, count in in_order(len(examples), run.cfg.evaluation.batch_size):
        prompts = prompt_batch(examples, indices, cfg.data.max_prompt_length)
        on_mesh = mesh_lib.put_same(run.mesh, (prompts.ids, prompts.lengths))
        rollout = sample({"params": params}, *on_mesh, jax.random.key(0), num_generations=1)
        tokens, mask, stopped = (
            mesh_lib.fetch(x) for x in (rollout.ids, rollout.mask, rollout.ended)
        )
        ids += [tokens[row, 0][mask[row, 0]].tolist() for row in range(count)]
        ended += stopped[:count, 0].tolist()
    return Generated(run.base.tokenizer.decode(ids), ids, np.asarray(ended))


def calibrated_tau(run: Run, arm: OpenArm, params: dict) -> float:
    """tau as configured, or from the cold-start model's greedy completions of the dev rows."""
    cfg = arm.cfg.reward
    if cfg.tau is not None:
        return cfg.tau
    examples = arm.corpus.dev[: run.cfg.evaluation.max_rows]
    texts = generate(run, arm.cfg, params, examples).texts
    rows = [example.row for example in examples]
    tau = calibrate_tau(arm.scorer.similarity_to_anchor(texts, rows), cfg.tau_quantile)
    _log.info("tau = %.4f, quantile %g of %d dev similarities", tau, cfg.tau_quantile, len(texts))
    return tau


def completion_ids(rollout: Rollout) -> list[list[int]]:
    """Token ids of each completion, P * G lists, from arrays on the host."""
    T = rollout.ids.shape[-1]
    pairs = zip(rollout.ids.reshape(-1, T), rollout.mask.reshape(-1, T), strict=True)
    return [ids[mask].tolist() for ids, mask in pairs]
