"""Model folders <-> parameters: what a library user needs.

policy = load_decoder("FOLDER_OR_HUB_ID"); policy.generate(["prompt"])
save_decoder(policy, "FOLDER")
adapter = load_adapter(policy, "FOLDER_OR_HUB_ID"); save_adapter(policy, adapter, "FOLDER")
encoder = load_encoder("FOLDER_OR_HUB_ID"); encoder.embed(["text"])
print(describe("FOLDER_OR_HUB_ID", [("source", "target"), ...]))
"""

from __future__ import annotations

from grpo_jax.hub.adapter import Adapter, load_adapter, save_adapter
from grpo_jax.hub.decoder import Policy, load_decoder, open_decoder, save_decoder
from grpo_jax.hub.describe import Description, describe
from grpo_jax.hub.encoder import SentenceEncoder, load_encoder
from grpo_jax.hub.use import UniversalSentenceEncoder

__all__ = [
    "Adapter",
    "Description",
    "Policy",
    "SentenceEncoder",
    "UniversalSentenceEncoder",
    "describe",
    "load_adapter",
    "load_decoder",
    "load_encoder",
    "open_decoder",
    "save_adapter",
    "save_decoder",
]
