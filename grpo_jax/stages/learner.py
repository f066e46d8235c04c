"""Opening, logging and closing a training stage: what SFT and GRPO have in common.

A stage is a pure function of (config, seed, step), so its checkpoint holds the TrainState and a few
numbers, and a resumed stage computes exactly what the unbroken one would have.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.config_arms import BASE
from grpo_jax.data.batches import take
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.infra.memory import peak_bytes
from grpo_jax.learn.optimizer import build_optimizer, build_schedule
from grpo_jax.learn.step import init_state
from grpo_jax.stages import weights
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.structs import TrainState


class Cost:
    """What an arm's training has taken, with all that was lost to interruptions."""

    def __init__(self, earlier: dict[str, Any]):
        self.tokens: float = earlier.get("tokens", 0)
        self._seconds = earlier.get("seconds", 0.0) - time.monotonic()
        self._peak = earlier.get("peak_bytes", 0)

    def spent(self) -> dict[str, Any]:
        """tokens of completions trained on or sampled; seconds; bytes at the highest moment."""
        peak = max(self._peak, peak_bytes())
        seconds = self._seconds + time.monotonic()
        return {"tokens": int(self.tokens), "seconds": seconds, "peak_bytes": peak}


class Learner(NamedTuple):
    """An arm's training state and what it is saved with."""

    state: TrainState
    frozen: dict | None
    base: dict | None  # the base's weights, where the live gauge needs them
    step: int  # steps of the arm's loop that are done
    aux: dict[str, Any]  # the few numbers that go with the state
    cost: Cost
    checkpoints: Checkpoints
    optimizer: Any
    schedule: Any  # optimizer step -> learning rate


def open_learner(run: Run, arm: OpenArm, optimizer_steps: int, reference: bool) -> Learner:
    """The arm's first state, or the one it was interrupted at.

    Args:
      reference: whether full fine-tuning needs a frozen copy of the weights it starts from.
    """
    checkpoints = Checkpoints(run.workdir.checkpoints / arm.name, run.cfg.checkpoint.keep)
    optimizer = build_optimizer(arm.optimizer, optimizer_steps)
    fresh = checkpoints.latest() is None
    keeps = reference or run.cfg.model.lora.rank > 0
    start = weights.load_params(run, arm.start) if fresh or keeps else None
    frozen = weights.frozen_copy(run, start) if keeps and start is not None else None
    step = 0
    aux: dict[str, Any] = {}
    abstract = weights.abstract_state(run, arm)
    if fresh:
        key = jax.random.fold_in(weights.method_key(run, arm.method), 2**31 - 1)

        def init(params: dict, given: dict | None) -> TrainState:
            trained = given or weights.fresh_trained(run, key, params)
            return init_state(trained, optimizer)

        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        given = weights.start_adapter(run, arm)
        state = jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))(start, given)
    else:
        del start
        state, aux = checkpoints.restore(abstract)
        step = int(aux["loop_step"])
    base = None
    if run.retention.live:
        same = arm.start == BASE and frozen is not None
        base = frozen if same else weights.frozen_copy(run, weights.load_params(run, BASE))
    cost = Cost(run.workdir.arm_cost(arm.name))
    run.workdir.rewind(arm.name, step + 1)
    run.workdir.note_arm(arm.name, cost.spent())
    schedule = build_schedule(arm.optimizer, optimizer_steps)
    return Learner(state, frozen, base, step, aux, cost, checkpoints, optimizer, schedule)


def record(
    run: Run,
    learner: Learner,
    arm: OpenArm,
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
    learner.cost.tokens += metrics["num_tokens"]
    if score is not None or due(step, run.cfg.log.every, total):
        run.writer.write(arm.name, step, metrics)
    if score is not None or due(step, run.cfg.checkpoint.every, total):
        learner.checkpoints.save(step, state, {"loop_step": step, **aux}, score)
        run.workdir.note_arm(arm.name, learner.cost.spent())


def gauge_due(run: Run, step: int, total: int) -> bool:
    """Whether forgetting is to be measured after `step` steps."""
    return bool(run.retention.live) and due(step, run.cfg.forgetting.every, total)


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
