"""GGUF -> a normal Hugging Face folder, for models of the llama architecture (Mistral included).

In: one .gguf file. Out: config.json, safetensors, tokenizer.json and its config,
generation_config.json, README.md. Quantised tensors are dequantised exactly, to float32, which does
not bring back what quantisation lost; F16 and BF16 tensors stay as they are. Written once; from
then on the folder loads like any other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from grpo_jax.hub.folder import atomic_folder
from grpo_jax.hub.gguf_header import check_fields, check_header, check_shapes
from grpo_jax.hub.gguf_tokenizer import end_ids, tokenizer_files
from grpo_jax.hub.tensors import INDEX, SINGLE
from grpo_jax.hub.writing import write_safetensors
from grpo_jax.text.strict import shown

log = logging.getLogger(__name__)

SHARD_BYTES = 2_000_000_000  # no more than one shard is in memory
QUANTISATIONS = (
    "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"
)  # fmt: skip
_PARTS = {
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
_READ = {
    "embedding_length", "feed_forward_length", "block_count", "context_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.value_length", "attention.layer_norm_rms_epsilon", "attention.sliding_window",
    "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear",
}  # fmt: skip
# Llama 3.1 and 3.2: the file has only the resulting factors, one a frequency.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def convert_gguf(file: Path, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the Hugging Face folder of a GGUF model.

    Args:
      file: the .gguf file; its architecture must be llama.
      folder: where to write; it appears complete or not at all.
      shard_bytes: the weights are split into files of at most about this size.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a readable GGUF file, or something in it that we cannot convert exactly.
    """
    from gguf import GGUFReader

    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such GGUF file")
    try:
        check_header(file)
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file}: not a complete GGUF file ({shown(str(error))}); delete it and fetch it again"
        ) from error
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(file, fields, stored)
    tokenizer = tokenizer_files(file, fields, config["max_position_embeddings"])
    names = _names(file, stored, config["num_hidden_layers"])
    check_shapes(file, stored, config)
    config["tie_word_embeddings"] = "output.weight" not in names
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: config[name] for name in special if config[name] is not None}
    kinds = sorted({tensor.tensor_type.name for tensor in reader.tensors})
    name = fields.get("general.name", file.stem)
    with atomic_folder(Path(folder)) as out:
        _write_json(out / "config.json", config)
        _write_json(out / "generation_config.json", generation)
        for filename, content in tokenizer.items():
            (out / filename).write_text(content, encoding="utf-8")
        _write_weights(out, stored, names, config, shard_bytes)
        (out / "README.md").write_text(
            f"# {name}\n\nConverted from `{file.name}`. The weights are dequantised "
            f"({', '.join(kinds)}), not the original ones.\n\n"
            f"Licence: {fields.get('general.license', 'see the source')}\n",
            encoding="utf-8",
        )


def cached_gguf(file: Path) -> Path:
    """The converted folder of a .gguf file, made in the user's cache the first time.

    A file that has changed (by size or time of change) is converted anew, beside the old one.

    Raises:
      FileNotFoundError, ValueError: see `convert_gguf`.
    """
    from grpo_jax.assets import cache_folder

    file = file.expanduser().resolve()
    status = file.stat()
    key = f"{file}\n{status.st_size}\n{status.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
    if not (folder / "config.json").is_file():
        log.info("converting %s to %s, once", file, folder)
        convert_gguf(file, folder)
    return folder


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(file: Path, fields: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """config.json from the metadata; metadata that would change the computation is refused."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"{file}: architecture {shown(architecture)}; only 'llama' can be converted"
        )
    check_fields(file, fields)
    given = {k.removeprefix("llama."): v for k, v in fields.items() if k.startswith("llama.")}
    if odd := {k: v for k, v in given.items() if k not in _READ and v}:
        raise ValueError(f"{file}: metadata that cannot be converted: {shown(odd)}")
    tokens = len(fields["tokenizer.ggml.tokens"])
    heads = given["attention.head_count"]
    head_dim = given.get("attention.key_length", given["embedding_length"] // heads)
    if given.get("attention.value_length", head_dim) != head_dim:
        raise ValueError(f"{file}: heads whose keys and values differ in width")
    if given.get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{file}: partial rotary embeddings cannot be converted")
    vocab_size = given.get("vocab_size", tokens)
    if vocab_size != tokens:
        raise ValueError(f"{file}: {tokens} tokens but a vocabulary of {vocab_size}")
    if not (ends := end_ids(fields)):
        raise ValueError(f"{file}: no end-of-sequence token (tokenizer.ggml.eos_token_id)")
    theta = _short(given.get("rope.freq_base", 10000.0))
    factors = stored.get("rope_freqs.weight")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens,
        "hidden_size": given["embedding_length"],
        "intermediate_size": given["feed_forward_length"],
        "num_hidden_layers": given["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": given.get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": given["context_length"],
        "rms_norm_eps": _short(given["attention.layer_norm_rms_epsilon"]),
        "rope_theta": theta,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", ends[0]),
        "dtype": "float32",
    }
    scaling = _rope_scaling(file, given)
    if factors is not None:
        scaling = _llama3_scaling(file, np.asarray(factors.data, np.float64), theta, scaling)
    if scaling:
        config["rope_scaling"] = scaling
    if window := given.get("attention.sliding_window"):
        del config["attention_bias"], config["mlp_bias"]  # Mistral has no such fields
        config |= {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": window,
        }
    return config


def _rope_scaling(file: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The rope_scaling of config.json; {} without scaling."""
    kind = given.get("rope.scaling.type")
    factor = given.get("rope.scaling.factor", 0.0) or given.get("rope.scale_linear", 0.0)
    if kind is None:  # before the type had a key of its own
        kind = "linear" if factor not in (0.0, 1.0) else "none"
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn") or factor <= 0:
        raise ValueError(
            f"{file}: rotary scaling {shown(kind)} with factor {factor}; only 'linear' and 'yarn' "
            "with a factor can be converted"
        )
    scaling = {"rope_type": kind, "factor": _short(factor)}
    if original := given.get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    if kind == "yarn" and not original:
        raise ValueError(f"{file}: yarn without llama.rope.scaling.original_context_length")
    return scaling


def _llama3_scaling(
    file: Path, factors: np.ndarray, theta: float, given: dict[str, Any]
) -> dict[str, Any]:
    """The llama3 rope_scaling whose factors, float [H/2], the file holds; {} if all are 1."""
    if given:
        raise ValueError(f"{file}: rope_freqs.weight beside rotary scaling {given}")
    if np.all(factors == 1.0):
        return {}
    scaling = {"rope_type": "llama3", "factor": _short(factors.max()), **_LLAMA3}
    if np.allclose(llama3_factors(2 * len(factors), theta, scaling), factors, rtol=1e-5, atol=0):
        return scaling
    raise ValueError(
        f"{file}: rope_freqs.weight is not what Llama 3.1 and 3.2 have "
        f"(theta {theta}, {scaling}): take the model's original safetensors folder instead"
    )


def llama3_factors(head_dim: int, theta: float, scaling: dict[str, Any]) -> np.ndarray:
    """By what llama3 scaling divides each frequency: float64 [head_dim / 2], from 1 to `factor`."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    ratio = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((ratio - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling["factor"] + smooth)


def _short(value: float) -> float:
    """The shortest decimal of a float32: 9.999999747378752e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _names(file: Path, stored: dict[str, Any], layers: int) -> dict[str, str]:
    """GGUF's tensor names -> Hugging Face's; every tensor is accounted for."""
    wanted = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    for i in range(layers):
        for theirs, ours in _PARTS.items():
            wanted[f"blk.{i}.{theirs}.weight"] = f"model.layers.{i}.{ours}.weight"
    if "output.weight" in stored:
        wanted["output.weight"] = "lm_head.weight"
    names = set(stored) - {"rope_freqs.weight"}
    unknown, missing = sorted(names - set(wanted)), sorted(set(wanted) - names)
    if unknown or missing:
        raise ValueError(
            f"{file}: unknown tensors {shown(unknown)}, missing tensors {shown(missing)}"
        )
    odd = {stored[name].tensor_type.name for name in wanted} - set(QUANTISATIONS)
    if odd:
        raise ValueError(
            f"{file}: quantised as {', '.join(sorted(odd))}; only {', '.join(QUANTISATIONS)} can "
            "be converted: take another quantisation of the model"
        )
    return wanted


def _write_weights(
    folder: Path, stored: dict[str, Any], names: dict[str, str], config: dict[str, Any], limit: int
) -> None:
    """Write the tensors shard by shard, so that memory holds one shard."""
    shards = list(_shards(stored, names, limit))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = {names[name]: _dequantised(stored[name], config) for name in shard}
        write_safetensors(folder, values, shard_bytes=sys.maxsize, name=file)
        weight_map |= dict.fromkeys(values, file)
        del values
    if len(shards) > 1:
        size = sum(_bytes(stored[name]) for name in names)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _shards(stored: dict[str, Any], names: dict[str, str], limit: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name in names:
        if shard and size + _bytes(stored[name]) > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += _bytes(stored[name])
    yield shard


def _bytes(tensor: Any) -> int:
    return int(tensor.n_elements) * (2 if tensor.tensor_type.name in ("F16", "BF16") else 4)


def _dequantised(tensor: Any, config: dict[str, Any]) -> np.ndarray:
    """float32, or as stored where that is F16 or BF16; q and k rows in Hugging Face's order."""
    from gguf.quants import dequantize

    kept = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(tensor.tensor_type.name, np.float32)
    weight = np.asarray(dequantize(tensor.data, tensor.tensor_type)).astype(kept)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    part = tensor.name.split(".")[-2]
    return uninterleave(weight, heads[part]) if part in heads else weight


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


def main(arguments: list[str]) -> int:
    """`python -m grpo_jax.hub.gguf FILE FOLDER`: convert once; returns the exit status."""
    if len(arguments) != 2:
        print("usage: python -m grpo_jax.hub.gguf FILE.gguf FOLDER", file=sys.stderr)
        return 2
    try:
        convert_gguf(Path(arguments[0]), Path(arguments[1]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(arguments[1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
