"""A configuration that trains, measures and exports in seconds, for the harnesses of faults."""

from __future__ import annotations

from configs import tiny
from grpo_jax.config import Config


def get_config() -> Config:
    """Four steps of SFT and of GRPO on the tiny assets, saved at every second one."""
    cfg = tiny.get_config()
    cfg.model.remat = False
    cfg.encoder.batch_size, cfg.encoder.max_length = 8, 16
    cfg.sft.batch_size, cfg.sft.max_steps = 8, 4
    cfg.grpo.prompts_per_step, cfg.grpo.num_generations, cfg.grpo.max_steps = 4, 4, 4
    cfg.grpo.eval_every = 2
    cfg.evaluation.max_rows = cfg.evaluation.batch_size = 8
    cfg.evaluation.max_retention_rows = 8
    cfg.evaluation.max_retention_length = 32
    cfg.evaluation.bootstrap = 20
    cfg.checkpoint.every = 2
    cfg.log.samples_every, cfg.log.samples = 2, 2
    cfg.export.arms, cfg.export.dtype = ("sft", "grpo"), "float32"
    return cfg
