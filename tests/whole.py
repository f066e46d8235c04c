"""Whole runs on the tiny assets, in process: a folder for all, and runs that several tests read.

Compiling is nearly all of what such a run costs, so they keep compiled programs in a cache of the
test session, which starts empty, and take the settings that give few and equal programs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import tiny
from grpo_jax import main
from grpo_jax.config import Config


def short_config() -> Config:
    """The tiny configuration, three steps a stage, the whole model trained."""
    cfg = tiny.get_config()
    cfg.model.remat = False
    cfg.encoder.batch_size, cfg.encoder.max_length = 8, 16
    cfg.sft.max_steps = cfg.grpo.max_steps = 3
    cfg.sft.optimizer.schedule, cfg.sft.optimizer.warmup_ratio = "constant", 0.0
    cfg.evaluation.max_rows = cfg.evaluation.batch_size = 16
    cfg.evaluation.max_retention_rows = 16
    cfg.evaluation.max_retention_length = 32
    cfg.evaluation.bootstrap = 50
    cfg.checkpoint.every = cfg.log.samples_every = 1
    cfg.export.arms, cfg.export.dtype = ("sft", "grpo"), "float32"
    return cfg


def lora_config() -> Config:
    """What `short_config` is not: adapters, off-policy GSPO, every reward term, the best kept."""
    cfg = short_config()
    cfg.stages = ("sft", "grpo", "export")
    cfg.model.remat = True
    cfg.model.lora.rank, cfg.model.lora.alpha, cfg.model.lora.dropout = 4, 8.0, 0.1
    cfg.data.cold_start_rows = 100
    cfg.sft.gradient_accumulation_steps = cfg.sft.eval_every = 2
    cfg.sft.optimizer.schedule = "linear"
    cfg.grpo.num_iterations = cfg.grpo.num_minibatches = cfg.grpo.gradient_accumulation_steps = 2
    cfg.grpo.importance_sampling_level, cfg.grpo.epsilon = "sequence", 3e-4
    cfg.grpo.loss_type, cfg.grpo.advantage = "grpo", "gdpo"
    cfg.grpo.sampling.temperature, cfg.grpo.sampling.top_p = 0.8, 0.9
    cfg.grpo.optimizer.schedule = "linear"
    cfg.reward.anchor, cfg.reward.tau = "source", 0.1
    cfg.reward.length_weight = cfg.reward.repetition_weight = 0.25
    cfg.checkpoint.load_best_at_end = True
    return cfg


@contextmanager
def machine(base: Path, devices: int = 1) -> Iterator[pytest.MonkeyPatch]:
    """A machine of its own for runs: caches below `base`, and this many devices."""
    there = jax.devices()[:devices]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRPO_JAX_CACHE", str(base / "cache"))
        patch.setattr(jax, "devices", lambda: there)
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        try:
            yield patch
        finally:
            jax.config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()


@functools.cache
def finished(base: Path, name: str) -> Path:
    """The working directory of a run that was not interrupted, of `NAME_config`."""
    cfg = {"short": short_config, "lora": lora_config}[name]()
    with machine(base):
        main.train(cfg, str(base / name))
    return base / name
