"""The alignment tax, Dzongkha (Tibetan script) to English: the arms of configs/tax_om_en.py.

    python -m grpo_jax.main --config=configs/tax_dz_en.py --workdir=runs/tax_dz_en

SmolLM2 spends 129 tokens on the median Dzongkha sentence (a token is hardly a letter), so prompts
are long, and half of the pairs fit. One 80 GB GPU; estimated, not measured: twice the time of
tax_om_en.py, 10 hours in all. No packaged encoder can read Dzongkha; the English side, which
rewards and judges look at, they can.
"""

from configs import tax_om_en
from grpo_jax.config import Config


def get_config() -> Config:
    cfg = tax_om_en.get_config()
    cfg.data.train = "asset:dzongkha-english"
    cfg.data.prompt = "Translate from Dzongkha to English: {source}"
    cfg.data.max_prompt_length = 256
    cfg.data.cold_start_rows = 3000
    cfg.grpo.gradient_accumulation_steps = 2
    cfg.evaluation.batch_size = 128
    cfg.evaluation.out_of_domain = ("asset:udhr-dz",)
    headlines = {
        "data.train": "asset:dzongkha-headlines",
        "data.prompt": "Give this Dzongkha text a short English title: {source}",
        "data.max_prompt_length": 448,
    }
    for arm in cfg.arms:
        if arm.group == "transfer":
            arm.overrides |= headlines
    return cfg
