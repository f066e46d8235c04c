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

from grpo_jax.data.batches import in_order, sft_batch
from grpo_jax.data.corpus import Example
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.progress import track
from grpo_jax.learn.objectives import build_sft_loss
from grpo_jax.learn.step import build_logps, build_update, policy_variables
from grpo_jax.models.packing import tokens_of
from grpo_jax.stages import learner as learning
from grpo_jax.stages.exhausted import phase
from grpo_jax.stages.generation import merged
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.stages.weights import method_key
from grpo_jax.structs import Array, TrainBatch, TrainState


def run_sft(run: Run, arm: OpenArm) -> None:
    """Trains from the arm before on the cold-start rows and saves the result."""
    train_on(run, arm, [example for example in arm.corpus.cold_start if example.completion_ids])


def train_on(run: Run, arm: OpenArm, rows: list[Example]) -> None:
    """Trains from the arm before on these rows' completions and saves the result."""
    cfg, lora = arm.sft, run.cfg.model.lora
    total = learning.total_steps(len(rows), cfg.batch_size, cfg.epochs, cfg.max_steps)
    learner = learning.open_learner(run, arm, total, reference=False)
    state, frozen = learner.state, learner.frozen
    update = build_update(
        run.model,
        learner.optimizer,
        build_sft_loss(),
        lora,
        micro_batches=cfg.gradient_accumulation_steps,
    )
    logps = build_logps(run.model, 1.0)
    key = method_key(run, arm.method)
    with learner.stop, learner.checkpoints, track(arm.name, learner.step, total) as bar:
        for step in learning.profiled(run, arm, range(learner.step, total)):
            began = time.monotonic()
            mine, everyone = learning.batch_indices(
                len(rows), cfg.batch_size, arm.cfg.data.seed, step
            )
            batch = mesh_lib.put_batch(run.mesh, _batch(arm, rows, mine, everyone))
            tokens = _tokens(arm, rows, everyone)
            slots = learning.slots(run, batch, tokens, cfg.gradient_accumulation_steps)
            with phase("the update", run.cfg, arm.method):
                state, stats = update(state, frozen, batch, jax.random.fold_in(key, step), slots)
                metrics = {name: float(value) for name, value in stats.items()}
            learning.check_finite(
                run, learner, arm, step + 1, state, [metrics], batch, everyone.tolist()
            )
            seconds = time.monotonic() - began
            metrics |= {
                "learning_rate": float(learner.schedule(step - learner.nonfinite.updates)),
                "step_time": seconds,
                "tokens_per_second": metrics["num_tokens"] / seconds,
            }
            done, score = step + 1, None
            with phase("evaluation", run.cfg, arm.method):
                if learning.gauge_due(run, done, total):
                    assert learner.base is not None
                    policy = merged(policy_variables(state.params, frozen, lora))
                    metrics |= run.retention.gauge(learner.base, policy)
                if learning.due(done, cfg.eval_every, total):
                    score = -_dev_loss(run, arm, logps, state, frozen)
                    metrics["eval/loss"] = -score
            learning.record(run, learner, arm, done, total, state, metrics, score)
            bar.update(loss=metrics["loss"], tokens_per_second=metrics["tokens_per_second"])
    run.workdir.note_arm(arm.name, learner.cost.spent(), done=True)


def _batch(
    arm: OpenArm, rows: list[Example], indices: np.ndarray, everyone: np.ndarray | None = None
) -> TrainBatch:
    data = arm.cfg.data
    return sft_batch(rows, indices, data.max_prompt_length, data.max_completion_length, everyone)


def _tokens(arm: OpenArm, rows: list[Example], indices: np.ndarray) -> np.ndarray:
    """Tokens of each row to train on, int [P]."""
    prompts = np.array([len(rows[i].prompt_ids) for i in indices])
    completions = np.array([len(rows[i].completion_ids) for i in indices])
    return tokens_of(prompts, np.minimum(completions, arm.cfg.data.max_completion_length))


def _dev_loss(
    run: Run,
    arm: OpenArm,
    logps: Callable[..., Array],
    state: TrainState,
    frozen: dict | None,
) -> float:
    """Mean negative log-prob a token on the dev rows."""
    rows = [example for example in arm.corpus.dev if example.completion_ids]
    rows = rows[: run.cfg.evaluation.max_rows]
    variables = policy_variables(state.params, frozen, run.cfg.model.lora)
    loss, tokens = 0.0, 0
    for indices, count in in_order(len(rows), arm.sft.batch_size):
        batch = _batch(arm, rows, indices)
        slots = learning.slots(run, batch, _tokens(arm, rows, indices), 1)
        values = jnp.asarray(logps(variables, mesh_lib.put_same(run.mesh, batch), slots))
        mask = batch.mask[:count]
        loss -= float(mesh_lib.fetch(values)[:count].sum())
        tokens += int(mask.sum())
    return loss / tokens
