"""A random tiny model of every decoder family and rope kind, as Hugging Face folders.

NumPy only: the tests write these folders, and make_families.py computes references from them.
Weights are scaled up and every constant is unusual, so that a mistake moves the numbers by far
more than the tolerance. Heads are wider than D / N where the family allows it; texts are longer
than the sliding window and than the length before the rope was stretched.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

VOCAB, HIDDEN, FFN, HEADS = 263, 48, 56, 6
LENGTHS, PROMPTS, NEW_TOKENS = (33, 21, 10), (13, 9, 6), 64
COLUMNS = slice(None, None, 4)  # of the logits, those that are stored
WINDOW, ORIGINAL = 7, 16
BASE = {
    "architectures": ["AnyForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": FFN, "num_hidden_layers": 3, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-3,
    "bos_token_id": 258, "eos_token_id": 256, "pad_token_id": 257, "torch_dtype": "float32",
}  # fmt: skip
_GEMMA = {
    "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 20,
    "sliding_window": WINDOW, "num_key_value_heads": 3,
}  # fmt: skip
_GEMMA3 = _GEMMA | {
    "num_hidden_layers": 4, "head_dim": 12, "model_type": "gemma3_text",
    "max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "rope_theta": 50.0, "head_dim": 12, "attention_bias": True,
        "mlp_bias": True, "hidden_act": "silu",
    },
    "llama3": {
        "model_type": "llama", "rope_theta": 100.0, "head_dim": 16, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
            "original_max_position_embeddings": 24,
        },
    },
    "linear": {
        "model_type": "llama", "num_key_value_heads": 6, "hidden_act": "gelu_pytorch_tanh",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "dynamic": {
        "model_type": "llama", "head_dim": 12, "max_position_embeddings": ORIGINAL,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 60.0},
    },
    "mistral": {
        "model_type": "mistral", "head_dim": 12, "num_key_value_heads": 3,
        "sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
    },
    "qwen2": {
        "model_type": "qwen2", "tie_word_embeddings": True, "use_sliding_window": True,
        "sliding_window": WINDOW, "max_window_layers": 1, "rope_theta": 60.0,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
        },
    },
    "qwen3": {
        "model_type": "qwen3", "head_dim": 12, "attention_bias": True, "use_sliding_window": True,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 60.0, "factor": 4.0, "beta_fast": 1.5,
            "beta_slow": 0.25, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False,
            "original_max_position_embeddings": ORIGINAL,
        },
    },
    "smollm3": {
        "model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2,
        "use_sliding_window": True, "sliding_window": WINDOW, "rope_theta": 90.0,
    },
    "gemma2": _GEMMA | {
        "model_type": "gemma2", "rope_theta": 80.0, "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 12.0,
    },
    "gemma3_text": _GEMMA3 | {
        "rope_theta": 80.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 3,
        "final_logit_softcapping": 9.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3": _GEMMA3 | {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 80.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    },
    "phi3": {
        "model_type": "phi3", "rope_theta": 60.0, "rope_scaling": None, "sliding_window": WINDOW,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "model_type": "phi3", "num_attention_heads": 4, "partial_rotary_factor": 0.5,
        "max_position_embeddings": 64, "original_max_position_embeddings": ORIGINAL,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0, 1.3, 1.7], "long_factor": [1.5, 3.0, 8.0],
        },
    },
}  # fmt: skip
STEPWISE = ("dynamic", "longrope")  # computed token by token
_VISION = {
    "hidden_size": 16, "image_size": 28, "intermediate_size": 24, "num_attention_heads": 2,
    "model_type": "siglip_vision_model", "num_hidden_layers": 1, "patch_size": 14,
    "vision_use_head": False,
}  # fmt: skip


def family_json(name: str) -> dict[str, Any]:
    """The config.json of a case; that of gemma3 has a model for images around it."""
    config = BASE | CASES[name]
    if name != "gemma3":
        return config
    outer = {key: config.pop(key) for key in ("eos_token_id", "torch_dtype")}
    del config["architectures"]
    return outer | {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": config, "vision_config": _VISION, "mm_tokens_per_image": 4,
        "boi_token_index": 259, "eoi_token_index": 260, "image_token_index": 261,
    }  # fmt: skip


def family_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the language model, as transformers has them."""
    c = BASE | CASES[name]
    kind, F = c["model_type"], FFN
    H = c.get("head_dim", HIDDEN // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * H, c["num_key_value_heads"] * H
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    linears = {"self_attn.o_proj": (HIDDEN, q), "mlp.down_proj": (HIDDEN, F)}
    if kind == "phi3":
        linears |= {"self_attn.qkv_proj": (q + 2 * kv, HIDDEN), "mlp.gate_up_proj": (2 * F, HIDDEN)}
    else:
        linears |= {f"self_attn.{p}_proj": (q if p == "q" else kv, HIDDEN) for p in "qkv"}
        linears |= {f"mlp.{p}_proj": (F, HIDDEN) for p in ("gate", "up")}
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    if kind.startswith("gemma"):
        norms |= {"pre_feedforward_layernorm": HIDDEN, "post_feedforward_layernorm": HIDDEN}
    if kind in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": H, "self_attn.k_norm": H}
    for i in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        for part, shape in linears.items():
            shapes[f"{prefix}{part}.weight"] = shape
            inward = part[-6:] in ("q_proj", "k_proj", "v_proj")
            attention = "attn" in part and (c.get("attention_bias") or kind == "qwen2" and inward)
            if attention or "mlp" in part and c.get("mlp_bias"):
                shapes[f"{prefix}{part}.bias"] = shape[:1]
        shapes |= {f"{prefix}{part}.weight": (width,) for part, width in norms.items()}
    shapes["model.norm.weight"] = (HIDDEN,)
    if not c.get("tie_word_embeddings", kind in ("smollm3", "gemma2", "gemma3_text")):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return shapes


def family_tensors(name: str) -> dict[str, np.ndarray]:
    """Random float32 weights: norms about 1, the rest large enough for signals to grow."""
    draw = np.random.default_rng(zlib.crc32(name.encode()))
    gemma = CASES[name]["model_type"].startswith("gemma")
    tensors = {}
    for key, shape in family_shapes(name).items():
        if gemma and "post_" in key:  # what a layer adds must outweigh the scaled embedding
            value = draw.uniform(1.0, 3.0, shape)
        elif "norm" in key:
            value = draw.uniform(0.5, 1.5, shape) - float(gemma)
        else:
            value = draw.normal(0, 0.5 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5, shape)
        tensors[key] = value.astype(np.float32)
    return tensors


def write_family(folder: Path, name: str) -> None:
    """The model folder of a case, with a tokenizer over bytes."""
    from safetensors.numpy import save_file

    from grpo_jax.assets import tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_decoder(folder)  # its tokenizer; config and weights are replaced
    (folder / "config.json").write_text(json.dumps(family_json(name)), encoding="utf-8")
    tensors = family_tensors(name)
    if name == "gemma3":  # as published: the language model among other parts
        tensors = {f"language_model.{key}": value for key, value in tensors.items()}
        seen = np.zeros((16, 3, 14, 14), np.float32)
        tensors["vision_tower.vision_model.embeddings.patch_embedding.weight"] = seen
        tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(16, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def family_rows() -> list[np.ndarray]:
    """Token ids of the texts whose logits are stored, of different lengths."""
    draw = np.random.default_rng(7)
    return [draw.integers(0, VOCAB, length) for length in LENGTHS]


def gradient_parts(name: str) -> dict[str, tuple[Any, ...]]:
    """Which part of which parameter's gradient is stored."""
    shapes = family_shapes(name)
    last = f"model.layers.{(BASE | CASES[name])['num_hidden_layers'] - 1}."
    wanted = [
        "model.norm.weight", "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight",
        "model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.mlp.up_proj.bias", f"{last}post_attention_layernorm.weight",
        f"{last}post_feedforward_layernorm.weight", f"{last}mlp.down_proj.weight",
    ]  # fmt: skip
    parts: dict[str, tuple[Any, ...]] = {
        key: tuple(slice(None, None, max(1, size // 8)) for size in shapes[key])
        for key in wanted
        if key in shapes
    }
    return parts | {"model.embed_tokens.weight": (family_rows()[0][:8],)}
