"""GGUF -> a normal Hugging Face folder, for llama-architecture models with a SmolLM tokenizer.

In: one .gguf file. Out: config.json, model.safetensors (float32), tokenizer.json and its config,
generation_config.json, README.md. Quantised tensors are dequantised exactly, which does not bring
back what quantisation lost. Written once; from then on the folder loads like any other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.hub.folder import atomic_folder
from grpo_jax.hub.weights import write_safetensors

_SPECIAL = 3  # llama.cpp's token type CONTROL
_NORMAL = 1


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a GGUF model.

    Args:
      file: the .gguf file; its architecture must be llama.
      folder: where to write; it appears complete or not at all.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a readable GGUF file, or something in it that we cannot convert exactly.
    """
    from gguf import GGUFReader

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such GGUF file")
    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{file}: not a complete GGUF file ({error}); delete it and fetch it again"
        ) from error
    config = _config(file, fields)
    tokenizer = _tokenizer_files(file, fields)
    tensors = _tensors(file, reader, config)
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    special = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    kinds = sorted({t.tensor_type.name for t in reader.tensors})
    name = fields.get("general.name", file.stem)
    with atomic_folder(Path(folder)) as out:
        _write_json(out / "config.json", config)
        _write_json(out / "generation_config.json", special)
        for filename, content in tokenizer.items():
            (out / filename).write_text(content, encoding="utf-8")
        write_safetensors(out, tensors)
        (out / "README.md").write_text(
            f"# {name}\n\nConverted from `{file.name}`. The weights are dequantised "
            f"({', '.join(kinds)}), not the original ones.\n\n"
            f"Licence: {fields.get('general.license', 'see the source')}\n",
            encoding="utf-8",
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(file: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """config.json from the metadata."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{file}: architecture {architecture!r}; only 'llama' can be converted")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none" or fields.get("llama.expert_count", 0):
        raise ValueError(f"{file}: rotary scaling and experts cannot be converted")
    tokens = len(fields["tokenizer.ggml.tokens"])
    heads = fields["llama.attention.head_count"]
    head_dim = fields["llama.embedding_length"] // heads
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{file}: partial rotary embeddings cannot be converted")
    vocab_size = fields.get("llama.vocab_size", tokens)
    if vocab_size != tokens:
        raise ValueError(f"{file}: {tokens} tokens but a vocabulary of {vocab_size}")
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens,
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _short(fields.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "dtype": "float32",
    }


def _short(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _tensors(file: Path, reader: Any, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Dequantised float32 tensors under Hugging Face's names; every one is accounted for."""
    from gguf.quants import dequantize

    wanted = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in parts.items():
            wanted[f"blk.{i}.{theirs}.weight"] = f"model.layers.{i}.{ours}.weight"
    names = {tensor.name for tensor in reader.tensors}
    if "output.weight" in names:
        wanted["output.weight"] = "lm_head.weight"
    unknown, missing = sorted(names - set(wanted)), sorted(set(wanted) - names)
    if unknown or missing:
        raise ValueError(f"{file}: unknown tensors {unknown}, missing tensors {missing}")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        part = tensor.name.split(".")[-2]
        if part in heads:
            values = uninterleave(values, heads[part])
        tensors[wanted[tensor.name]] = values
    return tensors


def uninterleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Put the rotary pairs of q or k back from llama.cpp's order to Hugging Face's.

    llama.cpp rotates neighbouring dimensions (0, 1), (2, 3), ...; Hugging Face rotates dimension i
    with i + H/2, so within each head row 2i goes to i and row 2i + 1 to i + H/2.

    Args:
      weight: [N*H, D].
      num_heads: N.

    Returns:
      [N*H, D].
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def _tokenizer_files(file: Path, fields: dict[str, Any]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json: byte-level BPE after splitting off each digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(
            f"{file}: tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r}; only 'gpt2' with "
            "'smollm' can be converted: take the model's original safetensors folder instead"
        )
    tokens = fields["tokenizer.ggml.tokens"]
    types = fields["tokenizer.ggml.token_type"]
    if odd := sorted(set(types) - {_NORMAL, _SPECIAL}):
        raise ValueError(f"{file}: token types {odd} cannot be converted")
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{file}: the vocabulary names {len(tokens) - len(vocab)} tokens twice")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, key in names.items():
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[name] = tokens[index]
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }
