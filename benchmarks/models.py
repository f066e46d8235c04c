"""The model folder that every program loads, and the encoder's texts. Runs beside grpo_jax only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.work import EOS, FIRST_WORD, PAD, Encoding, Shape, word

ROPE_THETA = 1_000_000  # Qwen3's own; Tunix's Qwen3 knows no other
NORM_EPS = 1e-6


def write_model(folder: Path, shape: Shape, dtype: str = "float32", seed: int = 0) -> None:
    """Writes a Hugging Face folder with random weights and a word tokenizer.

    Args:
      folder: made anew; must not exist.
      dtype: of the weights, float32 or bfloat16.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16

    def matrix(*size: int) -> Any:
        return (0.02 * draw.standard_normal(size, np.float32)).astype(kind)

    s = shape
    tensors = {
        "model.embed_tokens.weight": matrix(s.vocab, s.hidden),
        "model.norm.weight": np.ones(s.hidden, kind),
    }
    if not s.tied:
        tensors["lm_head.weight"] = matrix(s.vocab, s.hidden)
    for layer in range(s.layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": np.ones(s.hidden, kind),
            prefix + "post_attention_layernorm.weight": np.ones(s.hidden, kind),
            prefix + "self_attn.q_proj.weight": matrix(s.heads * s.head_dim, s.hidden),
            prefix + "self_attn.k_proj.weight": matrix(s.kv_heads * s.head_dim, s.hidden),
            prefix + "self_attn.v_proj.weight": matrix(s.kv_heads * s.head_dim, s.hidden),
            prefix + "self_attn.o_proj.weight": matrix(s.hidden, s.heads * s.head_dim),
            prefix + "mlp.gate_proj.weight": matrix(s.ffn, s.hidden),
            prefix + "mlp.up_proj.weight": matrix(s.ffn, s.hidden),
            prefix + "mlp.down_proj.weight": matrix(s.hidden, s.ffn),
        }
        if s.family == "qwen3":
            tensors[prefix + "self_attn.q_norm.weight"] = np.ones(s.head_dim, kind)
            tensors[prefix + "self_attn.k_norm.weight"] = np.ones(s.head_dim, kind)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", _config(s, dtype))
    _write(
        folder / "generation_config.json",
        {"do_sample": True, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write_tokenizer(folder, s.vocab)


def _config(s: Shape, dtype: str) -> dict[str, Any]:
    family = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}[s.family]
    return {
        "architectures": [family], "model_type": s.family, "vocab_size": s.vocab,
        "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim, "hidden_act": "silu", "max_position_embeddings": 4096,
        "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "attention_bias": False,
        "attention_dropout": 0.0, "tie_word_embeddings": s.tied, "initializer_range": 0.02,
        "use_cache": True, "eos_token_id": EOS, "pad_token_id": PAD, "torch_dtype": dtype,
    }  # fmt: skip


def _write_tokenizer(folder: Path, vocab: int) -> None:
    """A word a token, white space between them."""
    specials = ("<pad>", "<eos>", "<unk>")
    names = [*specials, *(word(i) for i in range(FIRST_WORD, vocab))]
    added = [
        {
            "id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True,
        }
        for i, name in enumerate(specials)
    ]  # fmt: skip
    _write(
        folder / "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None, "decoder": None,
            "model": {
                "type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)},
                "unk_token": "<unk>",
            },
        },
    )  # fmt: skip
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096,
            "pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>",
            "padding_side": "left", "clean_up_tokenization_spaces": False,
        },
    )  # fmt: skip


def encoder_texts(encoder: Path, work: Encoding, seed: int = 0) -> tuple[list[str], list[str]]:
    """Completions and, one a group, references, of known token counts.

    Args:
      encoder: the folder of a WordPiece encoder; texts are made of whole words of its vocabulary.

    Returns:
      `work.texts` texts and work.texts / work.generations references. Token counts, [CLS] and
      [SEP] included, follow a clipped gamma distribution with mean about work.mean_tokens.
    """
    vocab = json.loads((encoder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = sorted(w for w in vocab if w.isascii() and w.isalpha() and len(w) > 2)
    draw = np.random.default_rng(seed)
    references = work.texts // work.generations
    lengths = draw.gamma(6.0, work.mean_tokens / 6.0, work.texts + references)
    lengths = np.clip(np.round(lengths), work.min_tokens, work.max_tokens).astype(int) - 2
    texts = [" ".join(words[i] for i in draw.integers(0, len(words), n)) for n in lengths]
    return texts[: work.texts], texts[work.texts :]


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
