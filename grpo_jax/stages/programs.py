"""The jitted functions of a GRPO step, and the batch that goes from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from grpo_jax.config import GRPO, Lora
from grpo_jax.learn.objectives import Loss, build_grpo_loss
from grpo_jax.learn.step import build_logps, build_update
from grpo_jax.models.decoder import Decoder
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import Array, Rollout, TrainBatch, TrainState


class Programs(NamedTuple):
    """In the order of their calls; each compiles anew for each bucket of lengths, and of slots."""

    sample: Callable[..., Rollout]  # as build_sampler says
    reference_logps: Callable[..., Array]  # as build_logps says
    update: Callable[..., tuple[TrainState, dict[str, Array]]]  # as build_update says


def build_programs(
    cfg: GRPO,
    lora: Lora,
    model: Decoder,
    optimizer: optax.GradientTransformation,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    gathered: Callable[[dict], Any] | None = None,
) -> Programs:
    """The programs of a stage.

    Args:
      cfg: its grpo section; lora: rank 0 trains the whole model.
      max_completion_length: T, tokens.
      eos_ids, gathered: as for `build_sampler`.
    """
    temperature, micro_batches = cfg.sampling.temperature, cfg.gradient_accumulation_steps
    return Programs(
        build_sampler(model, cfg.sampling, max_completion_length, eos_ids, gathered, cfg.lanes),
        build_logps(model, temperature, micro_batches),
        build_update(
            model,
            optimizer,
            grpo_loss(cfg),
            lora,
            loss_type=cfg.loss_type,
            max_completion_length=max_completion_length,
            temperature=temperature,
            micro_batches=micro_batches,
        ),
    )


def updates_a_rollout(cfg: GRPO) -> int:
    """Optimizer steps that one rollout is used for."""
    return cfg.num_iterations * cfg.num_minibatches


def grpo_loss(cfg: GRPO) -> Loss:
    """The loss of a stage: on-policy where each rollout is used once."""
    return build_grpo_loss(cfg, on_policy=updates_a_rollout(cfg) == 1)


def train_mask(cfg: GRPO, rollout: Rollout) -> Array:
    """bool [P, G, T], the tokens that carry loss."""
    if cfg.mask_truncated_completions:
        return rollout.mask & rollout.ended[..., None]
    return rollout.mask


def train_batch(
    cfg: GRPO, prompt_ids: Array, prompt_lengths: Array, rollout: Rollout, length: int
) -> TrainBatch:
    """The rollout cut to `length`, which holds its longest completion; advantages still 0.

    Args:
      prompt_ids: int32 [P, S]; prompt_lengths: int32 [P].
    """
    return TrainBatch(
        prompt_ids=prompt_ids,
        prompt_lengths=prompt_lengths,
        ids=rollout.ids[..., :length],
        mask=train_mask(cfg, rollout)[..., :length],
        advantages=jnp.zeros(rollout.ended.shape, jnp.float32),
        old_logps=rollout.logps[..., :length],
    )
