"""config.json -> DecoderConfig: the families of causal language models that we implement.

The defaults are those of each family's own configuration class in transformers: published files
leave out what equals them. A field that is null and one that is absent may mean different things.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.hub.fields import Fields
from grpo_jax.hub.folder import read_object
from grpo_jax.hub.rope_config import (
    RopeSpec,
    both_forms,
    both_layer_forms,
    read_layer_ropes,
    read_rope,
)
from grpo_jax.models.decoder import DecoderConfig
from grpo_jax.text.strict import shown

DECODER_TYPES = (
    "llama", "smollm3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "phi3",
)  # fmt: skip
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Far beyond any model; what is larger is a mistake or an attempt to fill the memory.
MAX_LAYERS, MAX_HEAD_DIM = 4096, 1 << 16


class _Family(NamedTuple):
    """What a family assumes where its config.json says nothing, and which fields it reads."""

    rope: RopeSpec = RopeSpec()
    eps: float = 1e-6
    tied: bool = False
    context: int = 2048  # max_position_embeddings
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    kv_heads: int | None = None  # None: as many as query heads
    bias: bool | None = False  # of q, k, v, o: True, False, or None for what attention_bias says
    mlp_bias: bool = False  # whether the field is read
    neutral: tuple[str, ...] = ()  # fields without meaning in this family


_FAMILIES = {
    "llama": _Family(bias=None, mlp_bias=True),
    "smollm3": _Family(
        RopeSpec(theta=2e6), tied=True, context=32768, kv_heads=4, bias=None, mlp_bias=True,
        neutral=("max_window_layers",),
    ),
    "mistral": _Family(context=131072, kv_heads=8),
    "qwen2": _Family(context=32768, kv_heads=32, bias=True),
    "qwen3": _Family(context=32768, kv_heads=32, head_dim=128, bias=None),
    "gemma2": _Family(tied=True, context=8192, kv_heads=4, head_dim=256, bias=None),
    "gemma3_text": _Family(
        RopeSpec(theta=1e6, kinds=("default", "linear")), tied=True, context=131072, kv_heads=4,
        head_dim=256, bias=None,
    ),
    "phi3": _Family(
        RopeSpec(kinds=("default", "longrope"), partial=True, original=4096), eps=1e-5,
        context=4096, neutral=("auto_map", "embd_pdrop", "resid_pdrop"),
    ),
}  # fmt: skip
# The sizes that published Gemma 3 files leave out.
_GEMMA3_SIZES = {
    "vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8,
}  # fmt: skip
_GEMMA3_LOCAL = RopeSpec(theta=10000.0, kinds=("default",))
_VISION = (
    "vision_config", "boi_token_index", "eoi_token_index", "image_token_index",
    "mm_tokens_per_image",
)  # fmt: skip


def decoder_config(folder: Path) -> DecoderConfig:
    """Read a causal language model's config.json.

    Of a model with images (Gemma 3 from 4B on) this is the language model.

    Raises:
      FileNotFoundError: no config.json.
      ValueError: an unsupported family, or fields that we would compute differently, all listed.
    """
    f, kind = _open(folder)
    family = _FAMILIES[kind]
    f.neutral(family.neutral)
    f.require("is_causal", True)
    sizes = _GEMMA3_SIZES if kind == "gemma3_text" else {}

    def size(name: str) -> int:
        return f.integer(name, sizes.get(name))

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    num_layers = f.integer("num_hidden_layers", sizes.get("num_hidden_layers"), MAX_LAYERS)
    kv_heads = _kv_heads(f, family, heads)
    default_dim = min(family.head_dim or max(1, hidden // heads), MAX_HEAD_DIM)
    head_dim = f.integer("head_dim", default_dim, MAX_HEAD_DIM)
    if head_dim % 2:
        f.problems.append(f"head_dim: got {head_dim}, rotary embeddings want an even number")
    context = f.integer("max_position_embeddings", family.context)
    values: dict[str, Any] = {
        "vocab_size": size("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": size("intermediate_size"),
        "num_layers": num_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": f.number("rms_norm_eps", family.eps),
        "tie_word_embeddings": f.flag("tie_word_embeddings", family.tied),
        "max_position_embeddings": context,
        "qk_norm": kind in ("qwen3", "gemma3_text"),
        "fused_projections": kind == "phi3",
    }
    values |= _biases(f, kind, family)
    values |= _gemma(f, kind, hidden) if kind.startswith("gemma") else _activation(f)
    if kind == "smollm3":
        values["rope_layers"] = _rope_layers(f, num_layers)
    values |= _windows(f, kind, num_layers, values.get("rope_layers", ()))
    if all(values.get("rope_layers", ())):
        values["rope_layers"] = ()
    if kind == "gemma3_text":
        full, sliding = read_layer_ropes(f, family.rope, _GEMMA3_LOCAL, head_dim, context)
        values |= {"rope": full, "sliding_rope": sliding}
    else:
        values["rope"] = read_rope(f, family.rope, head_dim, context)
    f.finish()
    return DecoderConfig(**values)


def _open(folder: Path) -> tuple[Fields, str]:
    """The fields of the language model and its model_type."""
    file = folder / "config.json"
    f = Fields(file)
    kind = f.kind(DECODER_TYPES)
    if kind != "gemma3":
        return f, kind
    f.neutral(_VISION)
    text = Fields(file, f.get("text_config", {}))
    text.require("model_type", "gemma3_text")
    text.require("final_logit_softcapping", None)  # not read where images are
    tied = f.flag("tie_word_embeddings", True)
    if not text.values:
        f.problems.append("text_config: missing; wanted the language model's config")
    if text.flag("tie_word_embeddings", tied) != tied:
        f.problems.append("tie_word_embeddings: the file and its text_config contradict each other")
    f.finish()
    return text, "gemma3_text"


def _kv_heads(f: Fields, family: _Family, heads: int) -> int:
    """Heads of keys and values; null means as many as queries have."""
    default = heads if family.kv_heads is None else family.kv_heads
    f.optional("num_key_value_heads")
    null = "num_key_value_heads" in f.values and f.values["num_key_value_heads"] is None
    kv_heads = f.integer("num_key_value_heads", heads if null else default)
    if heads % kv_heads:
        f.problems.append(f"num_key_value_heads: {kv_heads} does not divide {heads} heads")
    return kv_heads


def _biases(f: Fields, kind: str, family: _Family) -> dict[str, bool]:
    if family.bias is None:
        qkv = output = f.flag("attention_bias", False)
    else:
        f.require("attention_bias", False)  # Qwen2 has its q, k, v biases without saying so here
        qkv, output = family.bias, False
    if family.mlp_bias:
        return {"qkv_bias": qkv, "output_bias": output, "mlp_bias": f.flag("mlp_bias", False)}
    f.require("mlp_bias", False)
    return {"qkv_bias": qkv, "output_bias": output}


def _activation(f: Fields) -> dict[str, str]:
    act = f.get("hidden_act", "silu")
    if act not in ("silu", "gelu_pytorch_tanh"):
        f.problems.append(f"hidden_act: got {shown(act)}; wanted silu or gelu_pytorch_tanh")
    return {"hidden_act": act}


def _gemma(f: Fields, kind: str, hidden: int) -> dict[str, Any]:
    """What only Gemma 2 and 3 have."""
    f.require("hidden_activation", "gelu_pytorch_tanh")
    f.require("hidden_act", "gelu_pytorch_tanh")  # nothing reads it, but it must not contradict
    f.require("use_bidirectional_attention", False)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    for name, default in caps.items():
        given = f.optional(name, default if kind == "gemma2" else None)
        caps[name] = 0.0 if given is None else f.number(name, default)
    if kind == "gemma3_text" and caps["attn_logit_softcapping"]:
        f.problems.append(
            "attn_logit_softcapping: implementations of Gemma 3 differ in whether they read it; "
            "wanted null"
        )
    return caps | {
        "hidden_act": "gelu_pytorch_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": hidden**0.5,
        "attention_scale": f.number("query_pre_attn_scalar", 256) ** -0.5,
    }


def _rope_layers(f: Fields, layers: int) -> tuple[bool, ...]:
    """SmolLM3: which layers rotate; by default every fourth does not."""
    interval = f.integer("no_rope_layer_interval", 4)
    given = f.get("no_rope_layers")
    if given is None:
        return tuple((i + 1) % interval != 0 for i in range(layers))
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        got = shown(given)
        f.problems.append(f"no_rope_layers: got {got}, wanted {layers} times 1 (rotates) or 0")
        return ()
    return tuple(bool(rotates) for rotates in given[:layers])


def _windows(
    f: Fields, kind: str, layers: int, rope_layers: tuple[bool, ...]
) -> dict[str, int | tuple[bool, ...]]:
    """Which layers have a sliding window, and how long it is."""
    if kind.startswith("gemma"):
        window: int | None = f.integer("sliding_window", 4096)
        f.require("sliding_window_size", window)
        pattern = _pattern(f) if kind == "gemma3_text" else 2
        default = [(i + 1) % pattern != 0 for i in range(layers)]
    elif kind in ("mistral", "phi3"):
        window = f.optional("sliding_window", 4096 if kind == "mistral" else None)
        default = [window is not None] * layers
    elif kind == "llama":
        window, default = f.get("sliding_window"), [False] * layers
        if window is not None:
            f.problems.append("sliding_window: not implemented for llama")
    else:
        used = f.flag("use_sliding_window", False)
        window = f.optional("sliding_window", None if kind == "smollm3" else 4096)
        window = window if used else None
        if kind == "smollm3":  # the layers that do not rotate
            default = [window is not None and not rotates for rotates in rope_layers]
        else:
            first = f.get("max_window_layers", 28)
            if not isinstance(first, int):
                f.problems.append(f"max_window_layers: got {shown(first)}, wanted an integer")
                first = layers
            default = [window is not None and i >= first for i in range(layers)]
    sliding = _layer_types(f, layers, default)
    if kind in ("llama", "mistral", "phi3") and sliding != default:
        f.problems.append("layer_types: contradicts sliding_window, which all layers of llama, "
                          "mistral and phi3 share")  # fmt: skip
    if not any(sliding):
        return {}
    if not isinstance(window, int) or isinstance(window, bool) or not 1 <= window < 2**31:
        f.problems.append(f"sliding_window: got {shown(window)}, wanted a positive integer")
        return {}
    return {"sliding_window": window, "sliding_layers": () if all(sliding) else tuple(sliding)}


def _pattern(f: Fields) -> int:
    """Gemma 3: every how many layers one sees everything; newer files have layer_types instead."""
    if f.get("layer_types") is not None:
        f.neutral(["sliding_window_pattern", "_sliding_window_pattern"])
        return 6
    return f.integer("sliding_window_pattern", 6)


def _layer_types(f: Fields, layers: int, default: list[bool]) -> list[bool]:
    """Per layer, whether it has the window."""
    types = f.get("layer_types")
    if types is None:
        return default
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(t not in (_SLIDING, _FULL) for t in types)
    ):
        got = shown(types)
        f.problems.append(f"layer_types: got {got}, wanted {layers} of {_FULL} and {_SLIDING}")
        return default
    return [name == _SLIDING for name in types]


def export_json(folder: Path) -> dict[str, Any]:
    """The config.json to write beside trained weights: the folder's own.

    The rope stands in it in the older and in the newer form, so that every version of transformers
    and vLLM finds it. Of a model with images only the language model is left.

    Raises:
      FileNotFoundError, ValueError: as decoder_config.
    """
    config = decoder_config(folder)
    values = read_object(folder / "config.json")
    if values["model_type"] == "gemma3":
        kept = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")
        outer = {name: values[name] for name in kept if name in values}
        values = outer | values["text_config"] | {"model_type": "gemma3_text"}
        values["architectures"] = ["Gemma3ForCausalLM"]
        values["tie_word_embeddings"] = config.tie_word_embeddings
    if config.sliding_rope is not None:
        return both_layer_forms(values, config.rope, config.sliding_rope)
    return both_forms(values, config.rope)
