"""Greedy completions of held-out rows, for calibration, dev scores and evaluation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from grpo_jax.data.batches import in_order, prompt_batch
from grpo_jax.data.corpus import Example
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models import lora
from grpo_jax.stages.run import Run


class Generated(NamedTuple):
    texts: list[str]
    ids: list[list[int]]  # as sampled, the EOS included
    ended: np.ndarray  # bool [N], False where the limit cut the completion off


def generate(run: Run, variables: dict, examples: list[Example]) -> Generated:
    """One greedy completion an example, in their order; all processes get all of them.

    Adapters are merged first, so that one compiled sampler serves every arm.
    """
    if "lora" in variables:
        variables = {"params": jax.jit(lora.merge)(variables["params"], variables["lora"])}
    ids: list[list[int]] = []
    ended: list[bool] = []
    for indices, count in in_order(len(examples), run.cfg.evaluation.batch_size):
        prompts = prompt_batch(examples, indices, run.cfg.data.max_prompt_length)
        on_mesh = mesh_lib.put_same(run.mesh, (prompts.ids, prompts.lengths))
        rollout = run.greedy(variables, *on_mesh, jax.random.key(0), num_generations=1)
        tokens, mask, stopped = (
            mesh_lib.fetch(x) for x in (rollout.ids, rollout.mask, rollout.ended)
        )
        ids += [tokens[row, 0][mask[row, 0]].tolist() for row in range(count)]
        ended += stopped[:count, 0].tolist()
    return Generated(run.base.tokenizer.decode(ids), ids, np.asarray(ended))
