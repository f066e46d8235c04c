"""config.json <-> DecoderConfig: the families of causal language models that we implement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.hub.fields import Fields
from grpo_jax.models.decoder import DecoderConfig

DECODER_TYPES = ("llama", "qwen2", "qwen3")


def decoder_config(folder: Path) -> DecoderConfig:
    """Read a causal language model's config.json.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f = Fields(folder / "config.json")
    kind = f.kind(DECODER_TYPES)
    hidden, heads = f.integer("hidden_size"), f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", heads)
    head_dim = f.integer("head_dim", 128 if kind == "qwen3" else max(1, hidden // heads))
    if heads % kv_heads:
        f.problems.append(f"num_key_value_heads: {kv_heads} does not divide {heads} heads")
    if head_dim % 2:
        f.problems.append(f"head_dim: got {head_dim}, rotary embeddings want an even number")
    f.require("hidden_act", "silu")
    f.require("attention_bias", False)  # Qwen2 has its q, k, v biases without saying so here
    f.require("mlp_bias", False)
    f.require("use_sliding_window", False)
    layers = f.integer("num_hidden_layers")
    f.require("layer_types", ["full_attention"] * layers)
    if kind == "llama" and f.get("sliding_window") is not None:
        f.problems.append("sliding_window: not implemented")
    config = DecoderConfig(
        vocab_size=f.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(f),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(f.get("tie_word_embeddings", False)),
        attention_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        max_position_embeddings=f.integer("max_position_embeddings", 2048),
    )
    f.finish()
    return config


def _rope_theta(f: Fields) -> float:
    """theta of `rope_theta` (transformers 4) or `rope_parameters` (5); no scaling of any kind."""
    found = []
    if f.get("rope_theta") is not None:
        found.append(f.number("rope_theta", 10000.0))
    for name in ("rope_scaling", "rope_parameters"):
        given = f.get(name, {})
        if not isinstance(given, dict):
            f.problems.append(f"{name}: got {given!r}, wanted an object")
            continue
        given = dict(given)
        kinds = {given.pop("rope_type", "default"), given.pop("type", "default")}
        theta = given.pop("rope_theta", None)
        if given.get("partial_rotary_factor") == 1.0:
            del given["partial_rotary_factor"]
        if kinds != {"default"} or given:
            f.problems.append(f"{name}: {f.get(name)!r}; only the default type is implemented")
        elif theta is not None:
            found.append(float(theta))
    if len(set(found)) > 1:
        f.problems.append(f"rope_theta: {sorted(set(found))} contradict each other")
    return found[0] if found else 10000.0


def decoder_json(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that makes transformers and vLLM build the same model.

    rope_theta is written in both the old and the new place, so that every version finds it.

    Raises:
      ValueError: a combination of switches that no supported family has.
    """
    if config.attention_bias and config.qk_norm:
        raise ValueError("attention_bias with qk_norm: no supported family has both")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.attention_bias else "llama"
    width = config.num_heads * config.head_dim
    if kind == "llama" and config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size {config.hidden_size} is no multiple of num_heads {config.num_heads}"
        )
    if kind == "qwen2" and width != config.hidden_size:
        raise ValueError(f"qwen2 wants num_heads * head_dim = hidden_size, got {width}")
    names = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    return {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
    }
