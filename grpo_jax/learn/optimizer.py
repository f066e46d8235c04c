"""AdamW, its schedule and clipping, from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import Optimizer
from grpo_jax.structs import Array

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


def build_optimizer(cfg: Optimizer, steps: int) -> optax.GradientTransformationExtraArgs:
    """Clip by global norm, then AdamW (arXiv 1711.05101) over `steps` optimizer steps.

    Returns:
      The optimizer. `update(grads, state, params, fine=...)` takes one argument more than optax's:
      bool [], and where it is False the new state is the old one, bit for bit.
    """

    def decayed(params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, params)

    clip = optax.clip_by_global_norm(cfg.max_grad_norm) if cfg.max_grad_norm else optax.identity()
    adamw = optax.chain(
        _scale_by_adam(cfg),
        optax.add_decayed_weights(cfg.weight_decay, decayed),
        _guarded(optax.scale_by_learning_rate(build_schedule(cfg, steps))),
    )
    return optax.chain(clip, adamw)


def _guarded(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`inner`, whose state only changes where a step is fine."""

    def update(grads: Any, state: Any, params: Any = None, *, fine: Array, **_: Any) -> Any:
        updates, new = inner.update(grads, state, params)
        return updates, jax.tree.map(lambda x, before: jnp.where(fine, x, before), new, state)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _scale_by_adam(cfg: Optimizer) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_adam, but moments are written first and the direction is read from them.

    Otherwise the direction needs the moments of before, and XLA on CPU keeps a copy of both.
    """
    adam = _guarded(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moment_dtype))

    def update(grads: Any, state: Any, params: Any = None, *, fine: Array, **_: Any) -> Any:
        _, state = adam.update(grads, state, fine=fine)
        mu, nu = jax.lax.optimization_barrier((state.mu, state.nu))
        first = optax.tree.bias_correction(mu, cfg.b1, state.count)
        second = optax.tree.bias_correction(nu, cfg.b2, state.count)
        direction = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + cfg.eps), first, second)
        return direction, state._replace(mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(adam.init, update)
