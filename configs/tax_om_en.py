"""The alignment tax, Oromo to English: what semantic GRPO costs against what SFT costs.

    python -m grpo_jax.main --config=configs/tax_om_en.py --workdir=runs/tax_om_en

One cold start of SmolLM2-135M-Instruct, then SFT at four learning rates, self-SFT, semantic GRPO
with its ablations and its negative control, SG-SRL with recovery, interpolated weights, and each of
them fine-tuned on 1,000 headlines (`grpo_jax.experiments`). One 80 GB GPU; estimated, not measured:
25 minutes for each of the seven GRPO arms, 5 for each of the others, 5 hours in all. Machines that
share the folder can divide the arms: first --config.only=cold, then elsewhere
--config.only="('grpo','grpo-beta-0')" and so on. On the page, look for arms that lie left of SFT's
front at the same judge similarity; grpo-shuffled must not lie above cold.
"""

from configs import om_en
from grpo_jax.config import Config
from grpo_jax.experiments import tax_arms


def get_config() -> Config:
    cfg = om_en.get_config()
    cfg.seed = 0
    cfg.stages = ("evaluate",)
    cfg.encoder.judge = ("asset:use-multilingual-judge", "asset:multilingual-e5-small-judge")
    cfg.sft.epochs = 3
    cfg.grpo.eval_every = 100
    cfg.forgetting.every = 25
    cfg.self_sft.prompts_per_step = 64
    cfg.self_sft.num_generations = 8
    cfg.self_sft.sft.epochs = 2
    cfg.self_sft.sft.optimizer.learning_rate = 3e-5

    cfg.evaluation.out_of_domain = ("asset:udhr-om",)
    cfg.evaluation.tasks = ("multiple_choice:asset:wordnet-choices", "format")
    cfg.arms = tax_arms(
        (1e-5, 3e-5, 1e-4, 3e-4),
        sft={"sft.epochs": 2},
        recover={"sft.max_steps": 50, "sft.optimizer.learning_rate": 1e-5},
        transfer={
            "data.train": "asset:oromo-headlines",
            "data.prompt": "Give this Oromo text a short English title: {source}",
            "data.max_prompt_length": 256,
            "data.max_completion_length": 32,
            "data.cold_start_rows": 0,
            "data.max_rows": 1000,
            "sft.epochs": 2,
            "sft.optimizer.learning_rate": 3e-5,
        },
    )
    return cfg
