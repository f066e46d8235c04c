"""Model folders <-> parameters: what a library user needs.

policy = load_decoder("FOLDER_OR_HUB_ID"); policy.generate(["prompt"])
save_decoder(policy, "FOLDER")
encoder = load_encoder("FOLDER_OR_HUB_ID"); encoder.embed(["text"])
"""

from __future__ import annotations

from grpo_jax.hub.decoder import Policy, load_decoder, save_decoder
from grpo_jax.hub.encoder import SentenceEncoder, load_encoder
from grpo_jax.hub.use import UniversalSentenceEncoder

__all__ = [
    "Policy",
    "SentenceEncoder",
    "UniversalSentenceEncoder",
    "load_decoder",
    "load_encoder",
    "save_decoder",
]
