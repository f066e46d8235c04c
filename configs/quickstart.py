"""Oromo to English on a laptop: real weights, real text, about 7 minutes on 2 CPU cores.

    bash launch/quickstart.sh
    python -m grpo_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

SmolLM2-135M-Instruct (dequantised from 4 bits) learns from LibreOffice's help pages; the reward is
the cosine under all-MiniLM-L6-v2. 5 GB of memory. A demonstration, not an experiment: LoRA on 800
short pairs, then 8 GRPO steps, which teach the new domain and not yet the new language. A plain
template spends the CPU's tokens on the text. What to expect stands in README.md; configs/om_en.py
is the experiment.
"""

from grpo_jax.config import Config


def get_config() -> Config:
    cfg = Config()
    cfg.seed = 0
    cfg.model.path = "asset:smollm2-135m-instruct"
    cfg.model.remat_policy = "dots"
    cfg.model.lora.rank = 32
    cfg.model.lora.alpha = 64.0
    cfg.encoder.path = "asset:all-minilm-l6-v2"
    cfg.encoder.judge = ("asset:use-multilingual-judge",)

    cfg.data.train = "asset:oromo-english"
    cfg.data.group_field = "group"
    cfg.data.chat = False
    cfg.data.prompt = "Oromo: {source}\nEnglish:"
    cfg.data.max_prompt_length = 32
    cfg.data.max_completion_length = 16

    cfg.sft.batch_size = 16
    cfg.sft.max_steps = 50
    cfg.sft.optimizer.learning_rate = 1e-3
    cfg.sft.optimizer.warmup_ratio = 0.1

    cfg.grpo.prompts_per_step = 8
    cfg.grpo.num_generations = 8
    cfg.grpo.max_steps = 8
    cfg.grpo.sampling.temperature = 0.8
    cfg.grpo.sampling.top_p = 0.9
    cfg.grpo.scale_rewards = "none"
    cfg.grpo.optimizer.learning_rate = 5e-5

    cfg.reward.length_weight = 0.25
    cfg.reward.repetition_weight = 0.25

    cfg.evaluation.max_rows = 64
    cfg.evaluation.retention = "asset:wordnet-english"
    cfg.evaluation.max_retention_rows = 32
    cfg.evaluation.max_retention_length = 64
    cfg.checkpoint.every = 30
    cfg.log.samples_every = 4
    return cfg
