"""Opening, logging and closing a training stage: what SFT and GRPO have in common.

A stage is a pure function of (config, seed, step), so its checkpoint holds the TrainState and a few
numbers, and a resumed stage computes exactly what the unbroken one would have.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from grpo_jax.config_arms import BASE
from grpo_jax.data.batches import take
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra import profile
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.infra.memory import peak_bytes
from grpo_jax.infra.signals import Deferred, Stopped
from grpo_jax.learn.optimizer import build_optimizer, build_schedule
from grpo_jax.learn.step import init_state
from grpo_jax.models.packing import slots_for
from grpo_jax.stages import weights
from grpo_jax.stages.exhausted import phase
from grpo_jax.stages.nonfinite import Nonfinite
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.structs import TrainBatch, TrainState


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
    nonfinite: Nonfinite
    stop: Deferred  # entered by the loop, so that a signal waits for the end of a step


def open_learner(run: Run, arm: OpenArm, optimizer_steps: int, reference: bool) -> Learner:
    """The arm's first state, or the one it was interrupted at.

    Args:
      reference: whether full fine-tuning needs a frozen copy of the weights it starts from.
    """
    with phase("loading", run.cfg, arm.method):
        return _open(run, arm, optimizer_steps, reference)


def _open(run: Run, arm: OpenArm, optimizer_steps: int, reference: bool) -> Learner:
    checkpoints = Checkpoints(run.workdir.checkpoints / arm.name, run.cfg.checkpoint.keep)
    optimizer = build_optimizer(arm.optimizer, optimizer_steps)
    fresh = checkpoints.latest() is None
    keeps = reference or run.cfg.model.lora.rank > 0
    start = weights.load_params(run, arm.start) if fresh or keeps else None
    frozen = weights.frozen_copy(start, run.model.dtype) if keeps and start is not None else None
    step = 0
    aux: dict[str, Any] = {}
    if fresh:
        assert start is not None
        state = first_state(run, arm, optimizer, start)
    else:
        del start
        state, aux = checkpoints.restore(weights.abstract_state(run, arm))
        step = int(aux["loop_step"])
    base = None
    if run.retention.live:
        base = frozen if arm.start == BASE else None
        if base is None:
            base = weights.frozen_copy(weights.load_params(run, BASE), run.model.dtype)
    cost = Cost(run.workdir.arm_cost(arm.name))
    run.workdir.rewind(arm.name, step + 1)
    run.workdir.note_arm(arm.name, cost.spent())
    schedule = build_schedule(arm.optimizer, optimizer_steps)
    nonfinite = Nonfinite(run, arm, aux)
    return Learner(
        state,
        frozen,
        base,
        step,
        aux,
        cost,
        checkpoints,
        optimizer,
        schedule,
        nonfinite,
        Deferred(),
    )


def first_state(run: Run, arm: OpenArm, optimizer: Any, start: dict) -> TrainState:
    """The state before an arm's first step.

    Args:
      start: the merged weights that the arm starts from; they are donated.
    """
    key = jax.random.fold_in(weights.method_key(run, arm.method), 2**31 - 1)

    def init(params: dict, given: dict | None) -> TrainState:
        trained = given or weights.fresh_trained(run, key, params)
        return init_state(trained, optimizer)

    shardings = jax.tree.map(lambda x: x.sharding, weights.abstract_state(run, arm))
    given = weights.start_adapter(run, arm)
    return jax.jit(init, out_shardings=shardings, donate_argnums=(0, 1))(start, given)


def profiled(run: Run, arm: OpenArm, steps: range) -> Iterator[int]:
    """The steps of an arm's loop, of which a few are traced if the config says so."""
    folder = run.workdir.profile / arm.name
    return profile.profiled(steps, run.cfg.log.profile_steps, arm.name, folder)


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

    Raises:
      Stopped: a signal came; the state is saved.
    """
    learner.cost.tokens += metrics["num_tokens"]
    if score is not None or due(step, run.cfg.log.every, total):
        run.writer.write(arm.name, step, metrics)
    if score is not None or due(step, run.cfg.checkpoint.every, total):
        _save(run, learner, arm, step, state, score, aux)
    if number := learner.stop.noted():
        _save(run, learner, arm, step, state, None, aux)
        learner.checkpoints.wait()
        raise Stopped(
            number,
            f"{signal.Signals(number).name}: stopped {arm.name} after step {step} of {total}, "
            f"which is saved in {run.workdir.path}; the same command goes on from there",
        )


def _save(
    run: Run,
    learner: Learner,
    arm: OpenArm,
    step: int,
    state: TrainState,
    score: float | None,
    aux: dict[str, Any],
) -> None:
    """Writes a step's checkpoint, unless it is there."""
    facts = {"loop_step": step, **learner.nonfinite.aux(), **aux}
    learner.checkpoints.save(step, state, facts, score)
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


def slots(run: Run, batch: TrainBatch, tokens: np.ndarray, parts: int) -> int | None:
    """How many slots to pack a batch into, on each device; None: it is computed with its padding.

    Args:
      tokens, parts: as in `models.packing.slots_for`, of all processes.
    """
    if not run.cfg.model.padding_free:
        return None
    _, G, T = batch.ids.shape
    places = batch.prompt_ids.shape[1] + G * T
    return slots_for(tokens, places, parts, mesh_lib.row_parts(run.mesh))


def check_finite(
    run: Run,
    learner: Learner,
    arm: OpenArm,
    step: int,
    state: TrainState,
    updates: list[dict[str, Any]],
    batch: TrainBatch,
    rows: list[int],
    **aux: Any,
) -> None:
    """Says and keeps what is to be known of a step that is not finite, and may stop the run.

    Args:
      step: of the loop, from 1; state: after it.
      updates: the stats of its updates, on the host.
      batch: what they were made from; rows: its training rows, of all processes.
      aux: as `record` had them for the step before.

    Raises:
      FloatingPointError: naming the step, the metrics and the batch's training rows. The state
        that the step began with is saved, if there is one: if none of its updates was made.
    """
    why = learner.nonfinite.judge(step, updates, batch, rows)
    if not why:
        return
    if step > 1 and all(stats["skipped"] for stats in updates):
        _save(run, learner, arm, step - 1, state, None, aux)
        learner.checkpoints.wait()
    raise FloatingPointError(why)
