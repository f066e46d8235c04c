"""config.json -> the configuration of a sentence encoder, of every family that we implement."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from grpo_jax.hub.decoder_config import DECODER_TYPES, MAX_LAYERS, decoder_config
from grpo_jax.hub.fields import Fields
from grpo_jax.hub.folder import read_object
from grpo_jax.models.decoder import DecoderConfig
from grpo_jax.models.encoder import EncoderConfig
from grpo_jax.text.strict import shown

# model_type -> the name in logs. Decoder types are embedders that attend causally, such as
# Qwen3-Embedding.
ENCODER_TYPES = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-RoBERTa",
    "mpnet": "MPNet",
}


def family_config(folder: Path) -> tuple[str, EncoderConfig | DecoderConfig]:
    """The model_type of a folder and the configuration of its transformer.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    file = folder / "config.json"
    config = read_object(file)
    kind = config.get("model_type")
    if kind not in DECODER_TYPES:
        return str(kind), encoder_config(folder)
    if config.get("is_causal") is False:
        raise ValueError(
            f"{file}: cannot be loaded: is_causal = false; {kind} embedders are implemented with "
            "causal attention only"
        )
    # An embedder has no output matrix, whether or not it was once tied.
    return kind, dataclasses.replace(decoder_config(folder), tie_word_embeddings=True)


def encoder_config(folder: Path) -> EncoderConfig:
    """Read the config.json of a bidirectional encoder.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f = Fields(folder / "config.json")
    kind = f.kind((*ENCODER_TYPES, *DECODER_TYPES))
    f.require("hidden_act", "gelu")
    f.require("position_embedding_type", "absolute")
    f.require("is_decoder", False)
    f.require("add_cross_attention", False)
    # A head that an encoder does not have, and what is returned beside the hidden states.
    f.neutral(("tie_word_embeddings", "output_past", "output_attentions", "output_hidden_states"))
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    if hidden % heads:
        f.problems.append(f"hidden_size: {hidden} is no multiple of {heads} heads")
    buckets = 0
    if kind == "mpnet":
        f.require("relative_attention_num_buckets", 32)  # transformers computes with 32 whatever
        buckets = 32
    config = EncoderConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=f.integer("num_hidden_layers", most=MAX_LAYERS),
        num_heads=heads,
        max_position_embeddings=f.integer("max_position_embeddings", 512),
        type_vocab_size=0 if kind == "mpnet" else f.integer("type_vocab_size", 2),
        layer_norm_eps=f.number("layer_norm_eps", 1e-12),
        padding_idx=_padding_idx(f, kind),
        relative_attention_num_buckets=buckets,
    )
    if config.max_length < 1:
        f.problems.append(f"max_position_embeddings: {config.max_position_embeddings} is too few")
    f.finish()
    return config


def _padding_idx(f: Fields, kind: str) -> int | None:
    """The id behind which positions start: pad_token_id for RoBERTa, always 1 for MPNet."""
    if kind == "bert":
        return None
    if kind == "mpnet":
        return 1
    value = f.get("pad_token_id", 1)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        f.problems.append(f"pad_token_id: got {shown(value)}, wanted a token id")
        return 1
    return value
