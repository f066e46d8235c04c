"""GRPO with semantic rewards: prompts -> rollout -> texts -> rewards -> advantages -> update.

One batch, read top to bottom, is `run_grpo`'s loop body. Deviations from the paper (arXiv
2605.14366), all configurable: beta and the KL estimator are not published, so the defaults are
0.01 and bias-corrected k3; the loss is token-normalised (dapo) as in TRL.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from grpo_jax.config import GRPO
from grpo_jax.data.batches import bucket, prompt_batch
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.progress import track
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.step import policy_variables
from grpo_jax.models.packing import tokens_of
from grpo_jax.rewards.scorer import within_group_stats
from grpo_jax.stages import learner as learning
from grpo_jax.stages.exhausted import phase
from grpo_jax.stages.generation import calibrated_tau, completion_ids, generate, merged
from grpo_jax.stages.guard import Guard
from grpo_jax.stages.programs import build_programs, train_batch, train_mask, updates_a_rollout
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.stages.weights import method_key
from grpo_jax.structs import Array, PromptBatch, Rewards, Rollout, TrainBatch
from grpo_jax.text.measures import is_odd

# What a step does until its clock is read once more; before the first reading, the loop begins.
PHASES = ("loading", "sampling", "scoring", "the update", "evaluation")
SHOWN = ("reward", "kl", "tokens_per_second")  # metrics beside the progress bar

_log = logging.getLogger(__name__)


def run_grpo(run: Run, arm: OpenArm) -> None:
    """Trains from the arm before by its rewards and saves the result."""
    cfg, rows, data, lora = arm.cfg.grpo, arm.corpus.train, arm.cfg.data, run.cfg.model.lora
    P, G, T = cfg.prompts_per_step, cfg.num_generations, data.max_completion_length
    updates = updates_a_rollout(cfg)
    total = learning.total_steps(len(rows), P, cfg.epochs, cfg.max_steps)
    learner = learning.open_learner(run, arm, total * updates, reference=cfg.beta > 0)
    state, frozen = learner.state, learner.frozen
    variables = policy_variables(state.params, frozen, lora)
    tau = learner.aux.get("tau")
    if tau is None:
        tau = calibrated_tau(run, arm, merged(variables))
    guard = Guard(arm.cfg.grpo, learner.aux)
    eos_ids = run.base.tokenizer.eos_ids
    gathered = mesh_lib.gathered(run.mesh)
    sample, reference_logps, update = build_programs(
        cfg, lora, run.model, learner.optimizer, T, eos_ids, gathered
    )
    key = method_key(run, arm.method)
    as_tokens = arm.scorer.reads_tokens(run.base.folder)
    _log.info("the reward reads completions as %s", "token ids" if as_tokens else "text")
    if updates == 1:
        _log.info("one update a rollout: policy_loss stays about 0, its gradient is what matters")
    steps = range(learner.step, learner.step if guard.stopped else total)
    clock: list[float] = []
    with (
        phase(lambda: PHASES[len(clock)], run.cfg),
        learner.stop,
        learner.checkpoints,
        track(arm.name, learner.step, total) as bar,
    ):
        for step in learning.profiled(run, arm, steps):
            clock[:] = [time.monotonic()]
            sample_key, *update_keys = jax.random.split(jax.random.fold_in(key, step), 1 + updates)
            mine, everyone = learning.batch_indices(len(rows), P, data.seed, step)
            prompts = prompt_batch(rows, mine, data.max_prompt_length, everyone)
            ids, lengths = mesh_lib.put_batch(run.mesh, (prompts.ids, prompts.lengths))
            variables = policy_variables(state.params, frozen, lora)
            rollout = sample(variables, ids, lengths, sample_key, num_generations=G)
            local = jax.tree.map(mesh_lib.fetch_local, rollout)
            clock.append(time.monotonic())

            tokens, longest = _sizes(cfg, prompts, local)
            batch = train_batch(cfg, ids, lengths, rollout, bucket(longest, T))
            if cfg.beta > 0:  # the device computes these while the host reads the texts
                slots = learning.slots(run, batch, tokens, cfg.gradient_accumulation_steps)
                ref_logps = reference_logps({"params": frozen}, batch, slots)
                batch = batch._replace(ref_logps=ref_logps)
            texts = run.base.tokenizer.decode(completion_ids(local))
            read = rollout if jax.process_count() == 1 else local
            rewards = arm.scorer.score(texts, prompts.rows, tau, read if as_tokens else None)
            batch = batch._replace(
                advantages=_advantages(run, arm, rewards), beta=guard.beta(rollout.ended.shape)
            )
            clock.append(time.monotonic())

            stats = []
            parts = cfg.gradient_accumulation_steps * cfg.num_minibatches
            slots = learning.slots(run, batch, tokens, parts)
            for minibatch, update_key in zip(_minibatches(cfg, batch), update_keys, strict=True):
                state, stat = update(state, frozen, minibatch, update_key, slots)
                stats.append(stat)
            stats = jax.device_get(stats)
            clock.append(time.monotonic())

            done, numbers = step + 1, everyone.tolist()
            aux = {"tau": tau, **guard.aux()}
            learning.check_finite(run, learner, arm, done, state, stats, batch, numbers, **aux)
            metrics = _collect(stats) | _rollout_stats(local, texts, rewards)
            metrics |= _times(clock, metrics["num_tokens"])
            made = step * updates - learner.nonfinite.updates
            metrics |= {"tau": tau, "learning_rate": float(learner.schedule(made))}
            guard.observe(done, metrics)
            variables = policy_variables(state.params, frozen, lora)
            score = _measure(run, arm, learner, guard, variables, tau, done, total, metrics)
            if guard.stopped or learning.due(done, run.cfg.log.samples_every, total):
                run.writer.samples(arm.name, done, _samples(run, prompts, texts, rewards))
            aux = {"tau": tau, **guard.aux()}
            learning.record(run, learner, arm, done, total, state, metrics, score, **aux)
            bar.update(**{name: metrics[name] for name in SHOWN if name in metrics})
            if guard.stopped:
                break
    run.workdir.note_arm(arm.name, learner.cost.spent(), done=True)


def _sizes(cfg: GRPO, prompts: PromptBatch, local: Rollout) -> tuple[np.ndarray, int]:
    """Of all processes' prompts, int [P]: tokens to train on, and the longest completion."""
    trained = np.asarray(train_mask(cfg, local)).sum((1, 2))
    facts = np.stack([tokens_of(prompts.lengths, trained), local.mask.sum(-1).max(-1)], axis=1)
    tokens, longest = distributed.gather(facts.astype(np.int32)).T
    return tokens, int(longest.max())


def _advantages(run: Run, arm: OpenArm, rewards: Rewards) -> Array:
    cfg = arm.cfg.grpo
    total, terms = mesh_lib.put_batch(run.mesh, (rewards.total, rewards.terms))
    return advantages(total, terms, cfg.advantage, cfg.scale_rewards, arm.scorer.weights)


def _minibatches(cfg: GRPO, batch: TrainBatch) -> Iterator[TrainBatch]:
    """The rollout's prompts in num_minibatches interleaved parts, num_iterations times."""
    parts = cfg.num_minibatches
    for _ in range(cfg.num_iterations):
        for part in range(parts):
            yield batch if parts == 1 else jax.tree.map(lambda x, i=part: x[i::parts], batch)


def _collect(updates: list[dict[str, Any]]) -> dict[str, float]:
    """One row of metrics from the stats of a rollout's updates, in TRL's names.

    Updates that were left out are counted, and say nothing else where others were made.
    """
    made = [stats for stats in updates if not stats["skipped"]] or updates
    columns = {name: [float(stats[name]) for stats in made] for name in updates[0]}
    row = {name: float(np.mean(values)) for name, values in columns.items()}
    row |= {k: sum(float(stats[k]) for stats in updates) for k in ("num_tokens", "skipped")}
    for name in ("low", "high", "region"):
        row[f"clip_ratio/{name}_mean"] = row.pop(f"clip_ratio/{name}")
    row["clip_ratio/low_min"] = min(columns["clip_ratio/low"])
    row["clip_ratio/high_max"] = max(columns["clip_ratio/high"])
    drift = "sampling/sampling_logp_difference/max"
    row[drift] = max(columns[drift])
    return row


def _rollout_stats(local: Rollout, texts: list[str], rewards: Rewards) -> dict[str, float]:
    """Of all processes' completions: each has its own, the rollout's arrays on the host."""
    odd = np.array([*map(is_odd, texts)])
    written = (local.mask.sum(-1), local.ended, odd, np.asarray(rewards.unread))
    everyones, *facts = jax.tree.map(distributed.gather, (rewards, *written))
    return within_group_stats(everyones) | _completion_stats(*facts)


def _completion_stats(
    lengths: np.ndarray, ended: np.ndarray, odd: np.ndarray, unread: np.ndarray
) -> dict[str, float]:
    """Tokens int [P, G]; bool [P, G], but odd [P * G]."""
    lengths, ended = lengths.reshape(-1), ended.reshape(-1)
    out = {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1.0 - ended.mean(),
        "completions/odd_ratio": odd.mean(),
        "completions/unread_ratio": unread.mean(),
    }
    if ended.any():
        out |= {
            "completions/mean_terminated_length": lengths[ended].mean(),
            "completions/min_terminated_length": lengths[ended].min(),
            "completions/max_terminated_length": lengths[ended].max(),
        }
    return {name: float(value) for name, value in out.items()}


def _times(clock: list[float], tokens: float) -> dict[str, float]:
    seconds = clock[-1] - clock[0]
    phases = dict(zip(("sample", "score", "update"), np.diff(clock).tolist(), strict=True))
    out = {f"time/{name}": value for name, value in phases.items()}
    return out | {"step_time": seconds, "tokens_per_second": tokens / seconds}


def _measure(
    run: Run,
    arm: OpenArm,
    learner: learning.Learner,
    guard: Guard,
    variables: dict,
    tau: float,
    done: int,
    total: int,
    metrics: dict[str, float],
) -> float | None:
    """Forgetting and the dev reward after a step, where they are due, into `metrics`.

    Returns:
      The score of the step's checkpoint, or None where dev was not looked at.
    """
    last = done == total or bool(guard.stopped)
    judged = last or learning.due(done, arm.cfg.grpo.eval_every, total)
    gauged = learning.gauge_due(run, done, total) or (last and bool(run.retention.live))
    if guard.budget:  # it needs both
        judged = gauged = judged or gauged
    if not (judged or gauged):
        return None
    policy = merged(variables)
    if gauged:
        assert learner.base is not None
        metrics |= run.retention.gauge(learner.base, policy)
    if not judged:
        return None
    examples = arm.corpus.dev[: run.cfg.evaluation.max_rows]
    texts = generate(run, arm.cfg, policy, examples).texts
    rows = [example.row for example in examples]
    metrics["eval/reward"] = float(np.mean(arm.scorer.score(texts, rows, tau).total))
    return guard.score(done, metrics)


def _samples(
    run: Run, prompts: PromptBatch, texts: list[str], rewards: Rewards
) -> list[dict[str, Any]]:
    """The first prompts' groups as rows of samples.jsonl."""
    G = len(texts) // len(prompts.rows)
    host = jax.device_get(rewards)
    rows = []
    for p, row in enumerate(prompts.rows[: run.cfg.log.samples]):
        for g in range(G):
            terms = {f"rewards/{name}": float(term[p, g]) for name, term in host.terms.items()}
            rows.append(
                {
                    "prompt": row.source,
                    "completion": texts[p * G + g],
                    "reference": row.target,
                    "reward": float(host.total[p, g]),
                    "similarity": float(host.similarity[p, g]),
                    **terms,
                }
            )
    return rows
