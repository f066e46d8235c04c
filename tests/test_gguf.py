"""GGUF files become the Hugging Face folders they came from, or one clear error."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from golden import make_hub
from safetensors.numpy import load_file

from grpo_jax import hub
from grpo_jax.assets.tiny import _byte_chars
from grpo_jax.hub.gguf import cached_gguf, convert_gguf, llama3_factors, main, uninterleave

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
GOLDEN = {
    "block_count": make_hub.LAYERS, "context_length": 128,
    "embedding_length": make_hub.HIDDEN, "feed_forward_length": make_hub.FFN,
    "attention.head_count": make_hub.HEADS, "attention.head_count_kv": make_hub.KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-3, "rope.freq_base": 50.0,
}  # fmt: skip
# One layer with rows of 256, as the K quantisations need them.
WIDE = {
    "block_count": 1, "context_length": 128, "embedding_length": 256, "feed_forward_length": 32,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 8,
    "attention.value_length": 8, "attention.layer_norm_rms_epsilon": 1e-5,
}  # fmt: skip
SMOLLM = {
    "model": "gpt2", "pre": "smollm", "eos_token_id": 0, "merges": ["h e", "l l"],
    "tokens": ["<|endoftext|>", *_byte_chars(), "he", "ll"], "token_type": [3] + [1] * 258,
}  # fmt: skip


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of q and k rows: i and i + H/2 become neighbours."""
    halves = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_gguf(
    file: Path,
    tensors: dict[str, Any],
    values: dict[str, Any] = GOLDEN,
    tokenizer: dict[str, Any] = SMOLLM,
) -> None:
    """A GGUF file; a tensor is an array or (raw blocks, their kind)."""
    writer = gguf.GGUFWriter(file, "llama")
    fields = {f"llama.{k}": v for k, v in values.items()}
    fields |= {f"tokenizer.ggml.{k}": v for k, v in tokenizer.items()}
    for key, value in fields.items():
        adders = {
            bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
            str: writer.add_string, list: writer.add_array,
        }  # fmt: skip
        adders[type(value)](key, value)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def golden(folder: Path) -> dict[str, Any]:
    """The golden llama's tensors under llama.cpp's names; the embedding is quantised."""
    heads = {"attn_q": make_hub.HEADS, "attn_k": make_hub.KV_HEADS}
    found: dict[str, Any] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        short = name.removeprefix("model.").removesuffix(".weight")
        if short.startswith("layers."):
            _, i, part = short.split(".", 2)
            part = PARTS[part]
            tensor = interleave(tensor, heads[part]) if part in heads else tensor
            found[f"blk.{i}.{part}.weight"] = tensor
        elif short == "embed_tokens":
            found["token_embd.weight"] = gguf.quants.quantize(tensor, Kind.Q8_0), Kind.Q8_0
        else:
            found[{"norm": "output_norm", "lm_head": "output"}[short] + ".weight"] = tensor
    return found


def half(block: bytes, at: int) -> np.float32:
    return np.frombuffer(block, np.float16, 1, at)[0].astype(np.float32)


def scale_min(scales: bytes, j: int) -> tuple[int, int]:
    """Two of the sixteen 6-bit numbers that Q4_K and Q5_K pack into twelve bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low, high = scales[j + 4] & 15, scales[j + 4] >> 4
    return low | (scales[j - 4] >> 6) << 4, high | (scales[j] >> 6) << 4


def straight(kind: Kind, b: bytes) -> list[np.float32]:
    """One block's values, number by number as ggml's documentation of the formats has them."""
    f = np.float32
    if kind == Kind.Q8_0:
        return [half(b, 0) * f(q) for q in np.frombuffer(b, np.int8, 32, 2)]
    if kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        five, shifted = kind in (Kind.Q5_0, Kind.Q5_1), kind in (Kind.Q4_1, Kind.Q5_1)
        at = 4 if shifted else 2
        high = struct.unpack_from("<I", b, at)[0] if five else 0
        qs = b[at + 4 * five :]
        low = [q & 15 for q in qs] + [q >> 4 for q in qs]
        full = [q | (high >> j & 1) << 4 for j, q in enumerate(low)]
        if shifted:
            return [half(b, 0) * f(q) + half(b, 2) for q in full]
        return [half(b, 0) * f(q - (16 if five else 8)) for q in full]
    out = []
    if kind in (Kind.Q4_K, Kind.Q5_K):
        d, dmin, scales = half(b, 0), half(b, 2), b[4:16]
        high_bits, qs = (b[16:48], b[48:]) if kind == Kind.Q5_K else (bytes(32), b[16:])
        for j in range(8):
            scale, least = scale_min(scales, j)
            for k in range(32):
                q = qs[32 * (j // 2) + k] >> 4 * (j % 2) & 15
                q += (high_bits[k] >> j & 1) * 16
                out.append(d * f(scale) * f(q) - dmin * f(least))
        return out
    assert kind == Kind.Q6_K
    low, high, scales, d = b[:128], b[128:192], np.frombuffer(b, np.int8, 16, 192), half(b, 208)
    for i in range(256):
        n, quarter, k = i // 128, i % 128 // 32, i % 32
        q = low[64 * n + 32 * (quarter % 2) + k] >> 4 * (quarter // 2) & 15
        q |= (high[32 * n + k] >> 2 * quarter & 3) << 4
        out.append(d * f(scales[i // 16]) * f(q - 32))
    return out


HALVES = {Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}


def blocks(kind: Kind, rows: int, columns: int) -> tuple[np.ndarray, Kind]:
    """Random raw blocks uint8 [rows, bytes] with sensible scales."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows * columns // size, width), np.uint8)
    for at in HALVES.get(kind, (208,) if kind == Kind.Q6_K else (0,)):
        scale = rng.uniform(-0.1, 0.1, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(rows, -1), kind


def wide() -> dict[str, Any]:
    """A model that has every quantisation in one of its matrices."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(256, 256)).astype(np.float32)
    return {
        "token_embd.weight": blocks(Kind.Q6_K, 259, 256),
        "output.weight": blocks(Kind.Q8_0, 259, 256),
        "output_norm.weight": floats[0],
        "blk.0.attn_norm.weight": floats[1],
        "blk.0.ffn_norm.weight": floats[2].astype(np.float16),
        "blk.0.attn_q.weight": blocks(Kind.Q4_K, 16, 256),
        "blk.0.attn_k.weight": blocks(Kind.Q5_K, 8, 256),
        "blk.0.attn_v.weight": blocks(Kind.Q4_0, 8, 256),
        "blk.0.attn_output.weight": (gguf.quants.quantize(floats[:, :16], Kind.BF16), Kind.BF16),
        "blk.0.ffn_gate.weight": blocks(Kind.Q4_1, 32, 256),
        "blk.0.ffn_up.weight": blocks(Kind.Q5_0, 32, 256),
        "blk.0.ffn_down.weight": blocks(Kind.Q5_1, 256, 32),
    }


def test_gguf_becomes_the_folder_it_came_from(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["llama"] / "model.safetensors")
    write_gguf(tmp_path / "a.gguf", golden(folders["llama"]))
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


def test_every_quantisation(tmp_path: Path) -> None:
    """Blocks decoded number by number, and shards, which change nothing."""
    tensors = wide()
    write_gguf(tmp_path / "a.gguf", tensors, WIDE)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "whole")
    convert_gguf(tmp_path / "a.gguf", tmp_path / "cut", shard_bytes=50_000)
    ours = load_file(tmp_path / "whole/model.safetensors")
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    shards = {file: load_file(tmp_path / "cut" / file) for file in index["weight_map"].values()}
    assert len(shards) > 2 and index["weight_map"].keys() == ours.keys()
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(shards[file][name], ours[name])
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
    seen = set()
    for ours_part, part in PARTS.items():
        tensor, got = tensors[f"blk.0.{part}.weight"], ours[f"model.layers.0.{ours_part}.weight"]
        if not isinstance(tensor, tuple):
            assert got.dtype == tensor.dtype
            np.testing.assert_array_equal(got, tensor)
            continue
        raw, kind = tensor
        if kind == Kind.BF16:
            assert got.dtype.name == "bfloat16"
            np.testing.assert_array_equal(got.view(np.uint16), raw.view(np.uint16))
            continue
        seen.add(kind)
        width = gguf.GGML_QUANT_SIZES[kind][1]
        cut = (raw.tobytes()[i : i + width] for i in range(0, raw.size, width))
        values = np.array([straight(kind, block) for block in cut]).reshape(got.shape)
        if part in ("attn_q", "attn_k"):
            values = uninterleave(values, {"attn_q": 2, "attn_k": 1}[part])
        np.testing.assert_allclose(got, values, rtol=1e-6, atol=1e-6, err_msg=kind.name)
    assert {k.name for k in seen} == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K"}
    for name, part in {"embed_tokens": "token_embd", "lm_head": "output"}.items():
        raw, kind = tensors[f"{part}.weight"]
        width = gguf.GGML_QUANT_SIZES[kind][1]
        cut = (raw[:20].tobytes()[i : i + width] for i in range(0, raw[:20].size, width))
        values = np.array([straight(kind, block) for block in cut]).reshape(20, 256)
        got = next(v for k, v in ours.items() if k.endswith(f"{name}.weight"))
        np.testing.assert_allclose(got[:20], values, rtol=1e-6, atol=1e-6, err_msg=kind.name)
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert (config["head_dim"], config["tie_word_embeddings"]) == (8, False)


def test_rotary_scaling_of_gguf(tmp_path: Path) -> None:
    def convert(file: str, extra: dict[str, Any], factors: np.ndarray | None = None) -> Any:
        tensors = wide() if factors is None else wide() | {"rope_freqs.weight": factors}
        write_gguf(tmp_path / file, tensors, WIDE | extra)
        convert_gguf(tmp_path / file, tmp_path / "out")
        return json.loads((tmp_path / "out/config.json").read_text())

    theta = {"rope.freq_base": 500000.0}
    frequencies = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    # As the published rule has it: long waves slow down eightfold, short ones do not, between both
    # it is a mean, weighted by how many turns the original 8192 positions make.
    slowed = []
    for frequency in frequencies:
        turns = 8192 * frequency / (2 * np.pi)
        share = (turns - 1) / 3
        mean = (1 - share) * frequency / 8 + share * frequency
        slowed.append(frequency / 8 if turns < 1 else frequency if turns > 4 else mean)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    factors = (frequencies / slowed).astype(np.float32)
    np.testing.assert_allclose(llama3_factors(64, 500000.0, scaling), factors, rtol=1e-6)
    for factor in (8.0, 32.0):
        wanted = scaling | {"factor": factor}
        four = llama3_factors(8, 500000.0, wanted).astype(np.float32)
        assert convert("a.gguf", theta, four)["rope_scaling"] == wanted
    assert "rope_scaling" not in convert("a.gguf", theta, np.ones(4, np.float32))
    with pytest.raises(ValueError, match="not what Llama 3.1 and 3.2 have"):
        convert("a.gguf", theta, np.array([1, 1, 2, 8], np.float32))
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    assert convert("b.gguf", linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.5}
    with pytest.raises(ValueError, match="yarn without llama.rope.scaling.original"):
        convert("b.gguf", yarn)
    got = convert("b.gguf", yarn | {"rope.scaling.original_context_length": 64})["rope_scaling"]
    assert got == {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 64}
    for odd in ({"rope.scaling.attn_factor": 0.5}, {"expert_count": 8}, {"logit_scale": 2.0}):
        with pytest.raises(ValueError, match=f"cannot be converted: .*{next(iter(odd))}"):
            convert("c.gguf", odd)
    config = convert("c.gguf", {"attention.sliding_window": 64})
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 64)


def test_a_gguf_path_is_converted_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.gguf"
    write_gguf(file, golden(folders["llama"]))
    folder = cached_gguf(file)
    written = (folder / "config.json").stat().st_mtime_ns
    assert cached_gguf(file) == folder and folder.name.startswith("a-")
    assert (folder / "config.json").stat().st_mtime_ns == written
    os.utime(file, ns=(0, 0))  # another file by the same name
    assert cached_gguf(file) != folder


def test_the_gguf_command(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gguf(tmp_path / "a.gguf", golden(folders["llama"]))
    assert main([str(tmp_path / "a.gguf"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/config.json").is_file()
    assert main([str(tmp_path / "b.gguf"), str(tmp_path / "out")]) == 1
    assert "no such GGUF file" in capsys.readouterr().err
    assert main([]) == 2


def test_gguf_faults(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = golden(folders["llama"])
    file = tmp_path / "a.gguf"
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, tensors, tokenizer=SMOLLM | {"pre": "tekken"})
    with pytest.raises(ValueError, match="pre-tokenizer 'tekken'; only 'llama', and 'gpt2' with"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, tensors, tokenizer=SMOLLM | {"add_bos_token": True})
    with pytest.raises(ValueError, match="adds a bos_token to each text but does not name one"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, {**tensors, "odd.weight": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match=r"unknown tensors \['odd.weight'\]"):
        convert_gguf(file, tmp_path / "out")
    write_gguf(file, wide() | {"blk.0.ffn_gate.weight": blocks(Kind.Q2_K, 32, 256)}, WIDE)
    with pytest.raises(ValueError, match="quantised as Q2_K; only F32, F16.*take another"):
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
