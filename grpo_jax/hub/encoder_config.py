"""config.json -> EncoderConfig: the families of sentence encoders that we implement."""

from __future__ import annotations

from pathlib import Path

from grpo_jax.hub.fields import Fields
from grpo_jax.models.encoder import EncoderConfig

ENCODER_TYPES = ("bert",)


def encoder_config(folder: Path) -> EncoderConfig:
    """Read a BERT encoder's config.json.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f = Fields(folder / "config.json")
    f.kind(ENCODER_TYPES)
    f.require("hidden_act", "gelu")
    f.require("position_embedding_type", "absolute")
    f.require("is_decoder", False)
    f.require("add_cross_attention", False)
    f.get("tie_word_embeddings")  # concerns a head that an encoder does not have
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if hidden % heads:
        f.problems.append(f"hidden_size: {hidden} is no multiple of {heads} heads")
    config = EncoderConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers"),
        num_heads=heads,
        max_position_embeddings=f.integer("max_position_embeddings", 512),
        type_vocab_size=f.integer("type_vocab_size", 2),
        layer_norm_eps=f.number("layer_norm_eps", 1e-12),
    )
    f.finish()
    return config
