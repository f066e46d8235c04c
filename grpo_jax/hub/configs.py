"""config.json <-> DecoderConfig and EncoderConfig, refusing whatever would compute differently.

A field is either read, required to have the one value we implement, known to change nothing, or
off (null, false, 0, empty). Anything else is an error: a model that loads must compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.hub.folder import read_json
from grpo_jax.models.decoder import DecoderConfig
from grpo_jax.models.encoder import EncoderConfig

DECODER_TYPES = ("llama", "qwen2", "qwen3")
ENCODER_TYPES = ("bert",)

# Bookkeeping, training-only settings and token ids: nothing that a forward pass depends on.
_NEUTRAL = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "bos_token_id", "classifier_dropout",
    "cls_token_id", "directionality", "dtype", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout_prob", "id2label", "initializer_range",
    "is_llama_config", "label2id", "mask_token_id", "max_window_layers", "model_type",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sep_token_id",
    "sliding_window", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


class _Fields:
    """The fields of a config.json, ticked off as they are read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = read_json(file)
        if not isinstance(self.values, dict):
            raise ValueError(f"{file}: not a JSON object")
        self.read = set(_NEUTRAL)
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(f"{name}: got {value!r}, wanted a positive integer")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            self.problems.append(f"{name}: got {value!r}, wanted a positive number")
            return 1.0
        return float(value)

    def require(self, name: str, wanted: Any) -> None:
        """The field, where present, must have the one value that we implement."""
        if (value := self.get(name, wanted)) != wanted:
            self.problems.append(f"{name}: got {value!r}, only {wanted!r} is implemented")

    def finish(self) -> None:
        unread = {k: v for k, v in self.values.items() if k not in self.read and v}
        unread = {k: v for k, v in unread.items() if not k.startswith("pooler_")}
        self.problems += [
            f"{k}: {v!r} is not a field we know; remove it if it changes nothing in the computation"
            for k, v in unread.items()
        ]
        if self.problems:
            raise ValueError(f"{self.file}: cannot be loaded:\n  " + "\n  ".join(self.problems))

    def kind(self, known: tuple[str, ...]) -> str:
        kind = self.get("model_type")
        if kind not in known:
            raise ValueError(
                f"{self.file}: model_type {kind!r} is not supported here; wanted one of "
                f"{', '.join(known)}"
            )
        return kind


def decoder_config(folder: Path) -> DecoderConfig:
    """Read a causal language model's config.json.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f = _Fields(folder / "config.json")
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


def _rope_theta(f: _Fields) -> float:
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


def encoder_config(folder: Path) -> EncoderConfig:
    """Read a BERT encoder's config.json.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f = _Fields(folder / "config.json")
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
