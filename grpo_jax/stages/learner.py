"""Opening, logging and closing a training stage: what SFT and GRPO have in common.

A stage is a pure function of (config, seed, step), so its checkpoint holds the TrainState and a few
numbers, and a resumed stage computes exactly what the unbroken one would have.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.config import Optimizer
from grpo_jax.data.batches import take
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.learn.optimizer import build_optimizer, build_schedule
from grpo_jax.learn.step import init_state
from grpo_jax.stages import run as run_lib
from grpo_jax.stages.run import Run
from grpo_jax.structs import TrainState


class Learner(NamedTuple):
    """A stage's training state and what it is saved with."""

    state: TrainState
    frozen: dict | None
    step: int  # steps of the stage's loop that are done
    aux: dict[str, Any]  # the few numbers that go with the state
    checkpoints: Checkpoints
    optimizer: Any
    schedule: Any  # optimizer step -> learning rate


def open_learner(
    run: Run, stage: str, cfg: Optimizer, optimizer_steps: int, reference: bool
) -> Learner:
    """The stage's first state, or the one it was interrupted at.

    Args:
      reference: whether full fine-tuning needs a frozen copy of the weights it starts from.
    """
    checkpoints = Checkpoints(run.workdir.checkpoints / stage, run.cfg.checkpoint.keep)
    optimizer = build_optimizer(cfg, optimizer_steps)
    fresh = checkpoints.latest() is None
    keeps = reference or run.cfg.model.lora.rank > 0
    start = run_lib.load_params(run, run.before(stage)) if fresh or keeps else None
    frozen = run_lib.frozen_copy(run, start) if keeps and start is not None else None
    step = 0
    aux: dict[str, Any] = {}
    abstract = run_lib.abstract_state(run, stage)
    if fresh:
        key = jax.random.fold_in(run_lib.stage_key(run, stage), 2**31 - 1)

        def init(params: dict, given: dict | None) -> TrainState:
            trained = given or run_lib.fresh_trained(run, key, params)
            return init_state(trained, optimizer)

        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        given = run_lib.start_adapter(run, stage)
        state = jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))(start, given)
    else:
        del start
        state, aux = checkpoints.restore(abstract)
        step = int(aux["loop_step"])
    run.workdir.rewind(stage, step + 1)
    schedule = build_schedule(cfg, optimizer_steps)
    return Learner(state, frozen, step, aux, checkpoints, optimizer, schedule)


def record(
    run: Run,
    learner: Learner,
    stage: str,
    step: int,
    total: int,
    state: TrainState,
    metrics: dict[str, float],
    score: float | None,
    **aux: Any,
) -> None:
    """Writes the metrics and the state after `step` steps of the loop, each if it is due.

    Args:
      score: on dev, higher is better; a step that has one is always written.
      aux: numbers that a resumed loop needs beside the state.
    """
    if score is not None or due(step, run.cfg.log.every, total):
        run.writer.write(stage, step, metrics)
    if score is not None or due(step, run.cfg.checkpoint.every, total):
        learner.checkpoints.save(step, state, {"loop_step": step, **aux}, score)


def due(step: int, every: int, total: int) -> bool:
    """Whether something done `every` steps (0: only at the end) is due after `step` steps."""
    return step == total or (every > 0 and step % every == 0)


def total_steps(rows: int, batch_size: int, epochs: float, max_steps: int) -> int:
    """Steps that `epochs` passes take, at least one; `max_steps` > 0 bounds them."""
    steps = max(1, round(epochs * rows / batch_size))
    return min(steps, max_steps) if max_steps else steps


def batch_indices(
    rows: int, batch_size: int, seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of a step's batch: this process's part, and the whole."""
    everyone = take(rows, batch_size, seed, step)
    here, processes = jax.process_index(), jax.process_count()
    return take(rows, batch_size, seed, step, here, processes), everyone


def check_finite(stage: str, step: int, stats: dict[str, float], rows: list[int]) -> None:
    """Stops the run before a non-finite update is ever saved.

    Raises:
      FloatingPointError: naming the step, the metrics and the batch's training rows.
    """
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(stats[name])]
    if bad:
        raise FloatingPointError(
            f"{stage}, step {step}: {' and '.join(bad)} not finite, training rows {rows}; the last "
            "checkpoint is intact. Lower the learning rate, set max_grad_norm, use float32, or "
            "look at these rows; the same command resumes"
        )
