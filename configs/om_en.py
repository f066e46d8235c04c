"""Oromo to English, the whole experiment: SmolLM2-135M-Instruct on one 80 GB GPU.

    python -m grpo_jax.main --config=configs/om_en.py --workdir=runs/om_en

Cold start on 5,000 pairs, GRPO on the rest (group 8, temperature 0.8, top-p 0.9), full fine-tuning
with float32 master weights and bfloat16 compute. Estimated, not measured: 10 minutes of SFT and 20
of GRPO on one H100. What to look for: SFT above the translation-memory floor that the table prints,
GRPO above SFT, and under the judge too. On a smaller card raise gradient_accumulation_steps, which
changes nothing but memory.
"""

from grpo_jax.config import Config


def get_config() -> Config:
    cfg = Config()
    cfg.model.path = "asset:smollm2-135m-instruct"
    cfg.model.dtype = "bfloat16"
    cfg.model.remat_policy = "dots"
    cfg.encoder.path = "asset:all-minilm-l6-v2"
    cfg.encoder.judge = ("asset:use-multilingual-judge",)
    cfg.encoder.batch_size = 512

    cfg.data.train = "asset:oromo-english"
    cfg.data.group_field = "group"
    cfg.data.prompt = "Translate from Oromo to English: {source}"
    cfg.data.cold_start_rows = 5000
    cfg.data.max_prompt_length = 128
    cfg.data.max_completion_length = 48

    cfg.sft.batch_size = 32
    cfg.sft.epochs = 5
    cfg.sft.eval_every = 100
    cfg.sft.optimizer.learning_rate = 1e-4
    cfg.sft.optimizer.warmup_ratio = 0.05

    cfg.grpo.prompts_per_step = 64
    cfg.grpo.num_generations = 8
    cfg.grpo.max_steps = 300
    cfg.grpo.epochs = 4
    cfg.grpo.sampling.temperature = 0.8
    cfg.grpo.sampling.top_p = 0.9
    cfg.grpo.beta = 0.01
    cfg.grpo.scale_rewards = "none"
    cfg.grpo.eval_every = 50
    cfg.grpo.optimizer.learning_rate = 5e-6
    cfg.grpo.optimizer.warmup_ratio = 0.05

    cfg.reward.length_weight = 0.25
    cfg.reward.repetition_weight = 0.25
    cfg.reward.max_length_ratio = 1.5

    cfg.evaluation.max_rows = 512
    cfg.evaluation.batch_size = 256
    cfg.evaluation.retention = "asset:wordnet-english"
    cfg.evaluation.max_retention_rows = 512
    cfg.checkpoint.every = 100
    return cfg
