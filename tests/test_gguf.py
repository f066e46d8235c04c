"""GGUF files become the Hugging Face folders they came from, or one clear error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from golden import make_hub
from safetensors.numpy import load_file

from grpo_jax import hub
from grpo_jax.hub.gguf import convert_gguf, uninterleave

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: i and i + H/2 become neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(file: Path, tensors: dict[str, np.ndarray], **metadata: object) -> None:
    """The golden llama as a GGUF file; the embedding is quantised, the rest is not."""
    import gguf

    values = {
        "block_count": make_hub.LAYERS, "context_length": 128,
        "embedding_length": make_hub.HIDDEN, "feed_forward_length": make_hub.FFN,
        "attention.head_count": make_hub.HEADS, "attention.head_count_kv": make_hub.KV_HEADS,
    }  # fmt: skip
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in values.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-3)
    writer.add_float32("llama.rope.freq_base", 50.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(metadata.get("pre", "smollm")))
    from grpo_jax.assets.tiny import _byte_chars

    merged = ["he", "ll"]
    tokens = ["<|endoftext|>", *_byte_chars(), *merged]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["h e", "l l"])
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE.replace("pad", "endoftext"))
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    heads = {"attn_q": make_hub.HEADS, "attn_k": make_hub.KV_HEADS}
    for name, tensor in tensors.items():
        short = name.removeprefix("model.").removesuffix(".weight")
        if short.startswith("layers."):
            _, i, part = short.split(".", 2)
            part = parts[part]
            tensor = interleave(tensor, heads[part]) if part in heads else tensor
            writer.add_tensor(f"blk.{i}.{part}.weight", tensor)
        elif short == "embed_tokens":
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quants.quantize(tensor, kind)
            writer.add_tensor("token_embd.weight", quantised, raw_dtype=kind)
        else:
            names = {"norm": "output_norm", "lm_head": "output", "odd": "odd"}
            writer.add_tensor(f"{names[short]}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_becomes_the_folder_it_came_from(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    write_gguf(tmp_path / "a.gguf", tensors)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    assert ours.keys() == tensors.keys()
    for name, tensor in ours.items():
        # Q8_0 keeps 127 steps to the largest value of a block of 32
        step = np.abs(tensors[name]).max() / 127 if "embed" in name else 0
        np.testing.assert_allclose(tensor, tensors[name], rtol=0, atol=step)
    policy = hub.load_decoder(tmp_path / "out")
    assert policy.config == hub.load_decoder(folders["llama"]).config
    assert policy.tokenizer.eos_ids == (0,)
    ids = policy.tokenizer.encode("hello 42")
    names = policy.tokenizer.decode([[i] for i in ids])
    assert names == ["he", "ll", "o", "", "4", "2"]  # digits one by one, merges applied
    assert policy.tokenizer.decode([ids]) == ["hello 42"]
    assert policy.tokenizer.encode_prompt("hi")[-1] == policy.tokenizer.encode(" ")[0]


def test_gguf_faults(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    file = tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, tensors, pre="llama-bpe")
    with pytest.raises(ValueError, match="pre-tokenizer 'llama-bpe'"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, {**tensors, "odd.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"unknown tensors \['odd.weight'\]"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, tensors)
    whole = file.read_bytes()
    for size in (0, 3, 200, len(whole) // 2, len(whole) - 4):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a complete GGUF file"):
            convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_uninterleave_by_hand() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four
    assert uninterleave(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    np.testing.assert_array_equal(uninterleave(interleave(rows, 2), 2), rows)
