"""The alignment-tax experiment at toy size: every arm in minutes, nothing downloaded.

    python -m grpo_jax.main --config=configs/tax_tiny.py --workdir=runs/tax_tiny

The invented language and the random models of configs/tiny.py, and every arm of
`grpo_jax.experiments`. Two CPU cores, 6 minutes. It shows that the experiment runs and what its
page looks like; a random model has nothing to forget, so its tax means little.
"""

from configs import tiny
from grpo_jax.config import Config
from grpo_jax.experiments import tax_arms


def get_config() -> Config:
    cfg = tiny.get_config()
    cfg.stages = ("evaluate",)
    cfg.data.cold_start_rows = 100
    cfg.sft.max_steps = 30
    cfg.sft.optimizer.warmup_ratio = 0.0
    cfg.grpo.max_steps = 220
    cfg.forgetting.every = 20
    cfg.forgetting.rows = 16
    cfg.evaluation.max_retention_rows = 48
    cfg.self_sft.sft.max_steps = 20
    cfg.self_sft.sft.optimizer.learning_rate = 1e-3
    cfg.checkpoint.every = 1000
    cfg.checkpoint.keep = 1
    cfg.arms = tax_arms(
        (5e-4, 5e-3),
        sft={"sft.max_steps": 40},
        recover={"sft.max_steps": 10, "sft.optimizer.learning_rate": 1e-3},
        transfer={
            "data.prompt": "{source} > ",
            "data.cold_start_rows": 0,
            "data.max_rows": 64,
            "sft.max_steps": 10,
            "sft.optimizer.learning_rate": 1e-3,
        },
        transfer_from=("base", "cold", "grpo"),
    )
    return cfg
