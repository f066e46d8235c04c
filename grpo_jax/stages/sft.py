"""Supervised fine-tuning: the cold start, the baseline arm, and the recovery after GRPO.

In: rows with references. Out: the stage's last checkpoint. Loss on completion tokens only, the mean
over all tokens of a batch; batches, update step and checkpoints are GRPO's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import SFT
from grpo_jax.data.batches import in_order, sft_batch
from grpo_jax.data.corpus import Example
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.progress import track
from grpo_jax.learn.objectives import build_sft_loss
from grpo_jax.learn.step import build_logps, build_update, policy_variables
from grpo_jax.stages import learner as learning
from grpo_jax.stages.run import Run, stage_key
from grpo_jax.structs import Array, TrainBatch, TrainState


def run_sft(run: Run, stage: str, cfg: SFT) -> None:
    """Trains from the arm before `stage` on the cold-start rows and saves the result."""
    rows = [example for example in run.corpus.cold_start if example.completion_ids]
    total = learning.total_steps(len(rows), cfg.batch_size, cfg.epochs, cfg.max_steps)
    learner = learning.open_learner(run, stage, cfg.optimizer, total, reference=False)
    state, frozen = learner.state, learner.frozen
    lora = run.cfg.model.lora
    update = build_update(
        run.model,
        learner.optimizer,
        build_sft_loss(),
        lora,
        micro_batches=cfg.gradient_accumulation_steps,
    )
    logps = build_logps(run.model, 1.0)
    key = stage_key(run, stage)
    with learner.checkpoints, track(stage, learner.step, total) as bar:
        for step in range(learner.step, total):
            began = time.monotonic()
            mine, everyone = learning.batch_indices(
                len(rows), cfg.batch_size, run.cfg.data.seed, step
            )
            batch = mesh_lib.put_batch(run.mesh, _batch(run, rows, mine, everyone))
            state, stats = update(state, frozen, batch, jax.random.fold_in(key, step))
            metrics = {name: float(value) for name, value in stats.items()}
            learning.check_finite(stage, step + 1, metrics, everyone.tolist())
            seconds = time.monotonic() - began
            metrics |= {
                "learning_rate": float(learner.schedule(step)),
                "step_time": seconds,
                "tokens_per_second": metrics["num_tokens"] / seconds,
            }
            done, score = step + 1, None
            if learning.due(done, cfg.eval_every, total):
                score = -_dev_loss(run, logps, state, frozen, cfg.batch_size)
                metrics["eval/loss"] = -score
            learning.record(run, learner, stage, done, total, state, metrics, score)
            bar.update(loss=metrics["loss"], tokens_per_second=metrics["tokens_per_second"])


def _batch(
    run: Run, rows: list[Example], indices: np.ndarray, everyone: np.ndarray | None = None
) -> TrainBatch:
    data = run.cfg.data
    return sft_batch(rows, indices, data.max_prompt_length, data.max_completion_length, everyone)


def _dev_loss(
    run: Run,
    logps: Callable[[dict, TrainBatch], Array],
    state: TrainState,
    frozen: dict | None,
    batch_size: int,
) -> float:
    """Mean negative log-prob a token on the dev rows."""
    rows = [example for example in run.corpus.dev if example.completion_ids]
    rows = rows[: run.cfg.evaluation.max_rows]
    variables = policy_variables(state.params, frozen, run.cfg.model.lora)
    loss, tokens = 0.0, 0
    for indices, count in in_order(len(rows), batch_size):
        batch = _batch(run, rows, indices)
        values = jnp.asarray(logps(variables, mesh_lib.put_same(run.mesh, batch)))
        mask = batch.mask[:count]
        loss -= float(np.where(mask, mesh_lib.fetch(values)[:count], 0.0).sum())
        tokens += int(mask.sum())
    return loss / tokens
