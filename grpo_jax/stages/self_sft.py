"""SFT on the start model's own samples, the best of each group: GRPO's cheap and strong baseline.

The model samples a group of completions for each training prompt, the run's reward scores them, and
SFT learns the best (rejection sampling; RAFT, arXiv 2304.06767). The data are the policy's own,
which is what much of GRPO's retention is put down to (arXiv 2510.18874), without an advantage, a
reference or a second round.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
import numpy as np

from grpo_jax.data.batches import in_order, prompt_batch
from grpo_jax.data.corpus import Example
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.files import read_json, write_json
from grpo_jax.infra.progress import track
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.stages.exhausted import phase
from grpo_jax.stages.generation import calibrated_tau, completion_ids
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.stages.sft import train_on
from grpo_jax.stages.weights import load_params, method_key

_log = logging.getLogger(__name__)


def run_self_sft(run: Run, arm: OpenArm) -> None:
    """Samples, keeps the best, trains on them; the samples are drawn once and kept in the workdir.

    Raises:
      ValueError: no completion has a reward above self_sft.min_reward.
    """
    path = run.workdir.path / "self_sft" / f"{arm.name}.json"
    kept = read_json(path)
    if kept is None:
        kept = _sample(run, arm)
        if distributed.is_main():
            write_json(path, kept)
        distributed.barrier(f"{arm.name} has sampled")
        run.workdir.note_arm(arm.name, {name: kept[name] for name in ("tokens", "seconds")})
    rows = arm.corpus.train
    examples = [Example(rows[i].row, rows[i].prompt_ids, ids) for i, ids in kept["completions"]]
    train_on(run, arm, examples)


def _sample(run: Run, arm: OpenArm) -> dict[str, Any]:
    """{"completions": [[training row, token ids]], "tokens", "seconds", "tau", "prompts"}."""
    began = time.monotonic()
    cfg, data, sampling = arm.cfg.self_sft, arm.cfg.data, arm.cfg.grpo.sampling
    rows = arm.corpus.train[: cfg.prompts or None]
    params = load_params(run, arm.start)
    tau = calibrated_tau(run, arm, params)
    sample = build_sampler(
        run.model,
        sampling,
        data.max_completion_length,
        run.base.tokenizer.eos_ids,
        mesh_lib.gathered(run.mesh),
    )
    key = method_key(run, arm.method)
    kept: list[list[Any]] = []
    tokens, steps = 0, -(-len(rows) // cfg.prompts_per_step)
    with track(f"{arm.name}: sampling", 0, steps) as bar:
        for step, (indices, count) in enumerate(in_order(len(rows), cfg.prompts_per_step)):
            prompts = prompt_batch(rows, indices, data.max_prompt_length)
            on_mesh = mesh_lib.put_same(run.mesh, (prompts.ids, prompts.lengths))
            with phase("sampling", run.cfg, arm.method):
                rollout = sample(
                    {"params": params},
                    *on_mesh,
                    jax.random.fold_in(key, step),
                    num_generations=cfg.num_generations,
                )
                rollout = jax.tree.map(mesh_lib.fetch, rollout)
            ids = completion_ids(rollout)
            texts = run.base.tokenizer.decode(ids)
            with phase("scoring", run.cfg, arm.method):
                rewards = np.asarray(arm.scorer.score(texts, prompts.rows, tau).total)
            rewards = np.where(rollout.ended, rewards, 0.0)  # an answer cut off teaches no end
            for p in range(count):
                group = range(p * cfg.num_generations, (p + 1) * cfg.num_generations)
                best = _best([ids[i] for i in group], rewards[p], cfg.keep, cfg.min_reward)
                kept += [[int(indices[p]), found] for found in best]
            tokens += int(rollout.mask[:count].sum())
            bar.update(kept=float(len(kept)))
    _log.info("%s: kept %d completions of %d prompts", arm.name, len(kept), len(rows))
    if not kept:
        raise ValueError(
            f"self_sft.min_reward: none of the completions of {len(rows)} prompts has a reward "
            f"above {cfg.min_reward}; lower it, or lengthen the cold start"
        )
    seconds = time.monotonic() - began
    return {
        "completions": kept, "prompts": len(rows), "tau": tau, "tokens": tokens, "seconds": seconds,
    }  # fmt: skip


def _best(group: list[list[int]], rewards: np.ndarray, keep: int, above: float) -> list[list[int]]:
    """The `keep` best different completions of a group whose reward lies above `above`."""
    found: list[list[int]] = []
    for i in np.argsort(-rewards, kind="stable"):
        if len(found) < keep and rewards[i] > above and group[i] not in found:
            found.append(group[i])
    return found
