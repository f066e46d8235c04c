"""configs/tax_tiny.py in seconds: a cold start that knows half, most arms two steps."""

from __future__ import annotations

import dataclasses

from configs import tax_tiny
from grpo_jax.config import Arm, Config

LEARNING = ("grpo", "grpo-shuffled")  # arms that train long enough to be told apart


def get_config() -> Config:
    """Every arm of the experiment, and one that is held by a budget."""
    cfg = tax_tiny.get_config()
    cfg.model.remat = cfg.model.padding_free = False  # programs fewer and faster to compile
    cfg.encoder.batch_size, cfg.encoder.max_length = 8, 16
    cfg.sft.optimizer.schedule = "constant"
    cfg.grpo.max_steps = 2
    cfg.evaluation.max_rows = cfg.evaluation.batch_size = 32
    cfg.evaluation.max_retention_rows = cfg.forgetting.rows = 16
    cfg.evaluation.max_retention_length = 32
    cfg.evaluation.bootstrap = 50
    cfg.forgetting.every = 2
    long = {"grpo.max_steps": 40, "reward.tau": 0.1}
    held = {"grpo.max_steps": 20, "grpo.forgetting_budget": 1e-3}
    arms = [
        dataclasses.replace(arm, overrides=arm.overrides | long) if arm.name in LEARNING else arm
        for arm in cfg.arms
    ]
    cfg.arms = (*arms, Arm("held", "grpo", "cold", overrides=held))
    return cfg
