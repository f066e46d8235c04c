"""Smoke test of a new machine: everything at toy size, nothing downloaded.

    python -m grpo_jax.main --config=configs/tiny.py --workdir=runs/tiny

A random two-layer byte-level decoder learns an invented language by SFT and then by GRPO under a
random two-layer encoder; all of it is made in code. Two CPU cores, 1.5 minutes, 1.3 GB. Expect the
reward to rise from 1.0 in the first GRPO steps to 1.8, and the held-out similarity from 0.01 (base)
to 0.5 (SFT) and 0.7 (GRPO). On the way the policy first learns to leave out words that it does not
know, which a cosine rewards, and then the words.
"""

from grpo_jax.config import Config


def get_config() -> Config:
    cfg = Config()
    cfg.seed = 0
    cfg.model.path = "asset:tiny-decoder"
    cfg.encoder.path = "asset:tiny-encoder"

    cfg.data.train = "asset:synthetic-pairs"
    cfg.data.group_field = "group"
    cfg.data.prompt = "{source} = "
    cfg.data.chat = False
    cfg.data.max_prompt_length = 32
    cfg.data.max_completion_length = 32
    cfg.data.dev_fraction = 0.1
    cfg.data.test_fraction = 0.15

    cfg.sft.batch_size = 32
    cfg.sft.max_steps = 50
    cfg.sft.epochs = 50
    cfg.sft.optimizer.learning_rate = 5e-3
    cfg.sft.optimizer.warmup_ratio = 0.1

    cfg.grpo.prompts_per_step = 16
    cfg.grpo.num_generations = 8
    cfg.grpo.max_steps = 220
    cfg.grpo.epochs = 50
    cfg.grpo.beta = 0.04
    cfg.grpo.scale_rewards = "none"
    cfg.grpo.optimizer.learning_rate = 4e-4

    cfg.evaluation.max_rows = 64
    cfg.evaluation.retention = "asset:synthetic-retention"
    cfg.checkpoint.every = 50
    return cfg
