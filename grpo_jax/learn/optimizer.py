"""AdamW, its schedule and clipping, from optax."""

from __future__ import annotations

import jax
import optax

from grpo_jax.config import Optimizer

DECAYED = ("kernel", "embedding", "lora_a", "lora_b")  # norms and biases are left alone


def build_schedule(cfg: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then `cfg.schedule` down to 0."""
    warmup = round(cfg.warmup_ratio * steps)
    rest = max(steps - warmup, 1)
    after = {
        "constant": optax.constant_schedule(cfg.learning_rate),
        "linear": optax.linear_schedule(cfg.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(cfg.learning_rate, rest),
    }[cfg.schedule]
    if not warmup:
        return after
    ramp = optax.linear_schedule(0.0, cfg.learning_rate, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def build_optimizer(cfg: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (arXiv 1711.05101) over `steps` optimizer steps."""

    def decayed(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity()
    adamw = optax.adamw(
        build_schedule(cfg, steps),
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        mu_dtype=cfg.moment_dtype,
        weight_decay=cfg.weight_decay,
        mask=decayed,
    )
    return optax.chain(clip, adamw)
