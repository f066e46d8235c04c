"""Model folders that must be refused, each with one error that names everything wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import families, make_hub
from safetensors.numpy import load_file, save_file

from grpo_jax import hub
from grpo_jax.hub.decoder_config import decoder_config, export_json
from grpo_jax.models.decoder import DecoderConfig
from grpo_jax.models.rope import Rope


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_all_tensor_problems_are_listed_together(llama_folder: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.zeros(31, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int32)

    edit_tensors(llama_folder, damage)
    with pytest.raises(ValueError) as error:
        hub.load_decoder(llama_folder)
    for text in (
        "problems with the weights (4)",
        "unknown: model.layers.0.self_attn.q_proj.bias",
        "missing: model.layers.1.mlp.up_proj.weight",
        "misshapen: model.norm.weight is [31], the config asks for [32]",
        "lm_head.weight is I32",
    ):
        assert text in str(error.value)


def test_truncated_and_missing_weights(llama_folder: Path) -> None:
    file = llama_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: truncated or damaged.*fetch it again"):
        hub.load_decoder(llama_folder)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or damaged"):
        hub.load_decoder(llama_folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors"):
        hub.load_decoder(llama_folder)
    (llama_folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickles are never read: convert"):
        hub.load_decoder(llama_folder)


def test_a_copy_of_tied_embeddings_must_be_one(tmp_path: Path) -> None:
    make_hub.write_decoder(tmp_path, "qwen2")
    name = "model.embed_tokens.weight"
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[name].copy()}))
    assert "lm_head" not in hub.load_decoder(tmp_path).params
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t[name] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        hub.load_decoder(tmp_path)


NESTED = {"full_attention": {"rope_theta": 80.0}, "sliding_attention": {"rope_theta": 30.0}}
YARN = {"rope_type": "yarn", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported here; wanted one"),
        ("llama", {"rope_scaling": {"rope_type": "ntk", "factor": 8.0}}, "rope type ntk is not"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is None, wanted a positive"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": -1}}, "factor is -1, wanted"),
        ("llama", {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "high_freq_factor must be"),
        ("llama", {"rope_scaling": {**YARN, "finetuned": True}}, "'finetuned'.* mean nothing"),
        ("llama", {"rope_scaling": {**YARN, "truncate": "no"}}, "truncate is 'no', wanted true"),
        ("llama", {"rope_scaling": {"factor": 2.0}}, r"\['factor'\] mean nothing known to rope"),
        ("llama", {"rope_scaling": {"type": "default", "rope_type": "yarn"}}, "default and yarn"),
        ("llama", {"rope_scaling": [1]}, r"rope_scaling: got \[1\], wanted an object"),
        ("llama", {"rope_parameters": {"rope_theta": 60.0}}, r"\[50.0, 60.0\] contradict"),
        ("llama", {"rope_theta": "x"}, "rope_theta: got .*'x'.*, wanted a positive number"),
        ("linear", {"rope_parameters": {"rope_type": "linear", "factor": 5.0}}, "contradict each"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: got 0.5, only 1.0"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved: True is not a field we know"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: got 'gelu'; wanted silu or gelu_py"),
        ("llama", {"attention_bias": "yes"}, "attention_bias: got 'yes', wanted true or false"),
        ("llama", {"sliding_window": 64}, "sliding_window: not implemented for llama"),
        ("llama", {"max_window_layers": 2}, "max_window_layers: 2 is not a field we know"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not a"),
        ("llama", {"auto_map": {"AutoConfig": "x.Y"}}, "auto_map: .* is not a field we know"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantised weights cannot be trained"),
        ("llama", {"hidden_size": "32"}, "hidden_size: got '32', wanted a positive integer"),
        ("llama", {"num_key_value_heads": 4}, "4 does not divide 6 heads"),
        ("llama", {"head_dim": 7}, "head_dim: got 7, rotary embeddings want an even number"),
        ("mistral", {"attention_bias": True}, "attention_bias: got True, only False"),
        ("mistral", {"mlp_bias": True}, "mlp_bias: got True, only False"),
        ("mistral", {"sliding_window": 0}, "sliding_window: got 0, wanted a positive integer"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types: contradicts sliding"),
        ("qwen2", {"attention_bias": True}, "attention_bias: got True, only False"),
        ("qwen2", {"max_window_layers": "x"}, "max_window_layers: got 'x', wanted an integer"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types: got .*, wanted 3 of full_at"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, "layer_types: got .*, wanted 3 of"),
        ("qwen3", {"use_sliding_window": False}, "sliding_window: got None, wanted a positive"),
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers: got .*, wanted 4 times 1"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: got .*, wanted 4 times 1"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation: got 'gelu', only 'gelu_py"),
        ("gemma2", {"hidden_act": "gelu"}, "hidden_act: got 'gelu', only 'gelu_pytorch_tanh'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
        ("gemma2", {"sliding_window_size": 9}, "sliding_window_size: got 9, only 7"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "implementations of Gemma 3 differ"),
        ("gemma3_text", {"rope_scaling": YARN}, "rope type yarn is not implemented for this fam"),
        ("gemma3_text", {"rope_parameters": NESTED}, "contradict each other"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 80.0}}, "wanted an object with full_"),
        ("gemma3", {"text_config": None}, "text_config: missing"),
        ("gemma3", {"tie_word_embeddings": "x"}, "tie_word_embeddings: got 'x'"),
        ("gemma3", {"text_config": {"tie_word_embeddings": False}}, "text_config contradict"),
        ("gemma3", {"text_config": {"model_type": "gemma2"}}, "model_type: got 'gemma2', only"),
        ("gemma3", {"text_config": {"final_logit_softcapping": 30.0}}, "30.0, only None is"),
        ("gemma3", {"audio_config": {"a": 1}}, "audio_config: .* is not a field we know"),
        ("phi3", {"rope_scaling": {**YARN, "type": "yarn"}}, "rope type yarn is not implemented"),
        ("longrope", {"original_max_position_embeddings": 1.5,
                      "rope_parameters": {"rope_type": "longrope"}}, "got 1, wanted at least 2"),
        ("longrope", {"partial_rotary_factor": 0.25}, "wanted an even number of them"),
        ("longrope", {"rope_scaling": {"type": "su", "short_factor": [1, 2, 3],
                                       "long_factor": [1]}}, "long_factor must be 3 positive"),
        ("longrope", {"rope_parameters": {"original_max_position_embeddings": 9,
                                          "rope_type": "longrope"}}, r"\[9.0, 16.0\] contradict"),
    ],
)  # fmt: skip
def test_configs_that_compute_differently_are_refused(
    family: str, change: dict, message: str, tmp_path: Path
) -> None:
    config = families.family_json(family) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: (?s:.)*{message}"):
        decoder_config(tmp_path)


def test_all_problems_of_a_config_are_listed(tmp_path: Path) -> None:
    bad = {"mlp_bias": 1, "rope_scaling": YARN | {"x": 1}, "hidden_act": "relu", "head_dim": 3}
    (tmp_path / "config.json").write_text(json.dumps(families.family_json("llama") | bad))
    with pytest.raises(ValueError) as error:
        decoder_config(tmp_path)
    for name in ("mlp_bias", r"['x'] mean", "hidden_act", "head_dim"):
        assert name in str(error.value)


def decoder(
    tmp_path: Path, family: str, absent: tuple[str, ...] = (), **changes: object
) -> DecoderConfig:
    config = families.family_json(family) | changes
    config = {key: value for key, value in config.items() if key not in absent}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return decoder_config(tmp_path)


def test_absent_and_null_fields_mean_what_transformers_takes_them_for(tmp_path: Path) -> None:
    def window(family: str, absent: tuple[str, ...] = (), **changes: object) -> tuple:
        config = decoder(tmp_path, family, absent, **changes)
        return config.sliding_window, config.sliding_layers

    assert window("mistral", ("sliding_window",)) == (4096, ())
    assert window("mistral", sliding_window=None) == (0, ())
    assert window("phi3", ("sliding_window",)) == (0, ())
    assert window("qwen2", ("sliding_window",)) == (4096, (False, True, True))
    assert window("qwen2", max_window_layers=0) == (7, ())
    assert window("qwen2", use_sliding_window=False) == (0, ())
    assert window("qwen2", ("max_window_layers",)) == (0, ())  # from layer 28 on
    assert window("smollm3", use_sliding_window=False) == (0, ())
    assert window("smollm3", no_rope_layers=[1, 1, 0, 1]) == (7, (False, False, True, False))
    assert window("gemma2", ("sliding_window",)) == (4096, (True, False, True))
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    config = decoder(tmp_path, "gemma2", caps)
    assert [getattr(config, name) for name in caps] == [50.0, 30.0]
    config = decoder(tmp_path, "gemma2", **dict.fromkeys(caps))
    assert [getattr(config, name) for name in caps] == [0.0, 0.0]
    tied = {
        family: decoder(tmp_path, family, ("tie_word_embeddings",)).tie_word_embeddings
        for family in families.CASES
    }
    assert {family for family in tied if tied[family]} == {
        "smollm3", "gemma2", "gemma3", "gemma3_text",
    }  # fmt: skip
    heads = ("num_key_value_heads",)
    assert decoder(tmp_path, "llama", heads).num_kv_heads == 6
    assert decoder(tmp_path, "mistral", num_key_value_heads=None).num_kv_heads == 6
    assert decoder(tmp_path, "qwen3", ("head_dim",)).head_dim == 128
    assert decoder(tmp_path, "llama", head_dim=None).head_dim == 8
    assert decoder(tmp_path, "phi3", ("rms_norm_eps",)).rms_norm_eps == 1e-5


def test_ropes_are_resolved(tmp_path: Path) -> None:
    def rope(family: str, absent: tuple[str, ...] = (), **changes: object) -> Rope:
        return decoder(tmp_path, family, absent, **changes).rope

    old = ("rope_theta", "rope_scaling")
    assert rope("llama") == Rope(50.0)
    assert rope("llama", old, rope_parameters={"rope_theta": 5e5}) == Rope(5e5)
    assert rope("llama", rope_scaling={"type": "default"}) == Rope(50.0)
    assert rope("llama", old) == Rope(10000.0)
    assert rope("smollm3", old) == Rope(2e6)
    yarn = rope("llama", rope_scaling=YARN)  # the whole context, where nothing else is said
    assert (yarn.original_length, yarn.factor) == (128, 2.0)
    assert yarn.attention_factor == 0.1 * np.log(2.0) + 1.0
    yarn = rope("llama", rope_scaling=YARN | {"attention_factor": 0.5, "mscale": 2})
    assert yarn.attention_factor == 0.5
    mscale = 0.1 * np.log(4.0)
    assert rope("qwen3").attention_factor == (0.8 * mscale + 1) / (0.5 * mscale + 1)
    assert rope("llama", rope_scaling=LLAMA3, original_max_position_embeddings=32) == Rope(
        50.0, "llama3", 8.0, 32, 1.0, 4.0
    )
    longrope = rope("longrope")
    assert longrope.original_length == 16 and longrope.partial == 0.5
    assert longrope.attention_factor == np.sqrt(1 + np.log(64 / 16) / np.log(16))
    factors = {"short_factor": [1, 1, 1], "long_factor": [2, 2, 2]}
    scaling = {"type": "su", "factor": 1.0, **factors}  # the type's first name
    longrope = rope("longrope", ("original_max_position_embeddings",), rope_scaling=scaling)
    assert longrope.original_length == 4096 and longrope.attention_factor == 1.0
    assert export_json(tmp_path)["rope_scaling"]["type"] == "longrope"
    gemma = decoder(tmp_path, "gemma3_text", (*old, "rope_local_base_freq"))
    assert (gemma.rope, gemma.sliding_rope) == (Rope(1e6), Rope(10000.0))


def test_broken_json_and_wrong_paths(llama_folder: Path, tmp_path: Path) -> None:
    (llama_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not valid JSON"):
        hub.load_decoder(llama_folder)
    (llama_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: missing"):
        hub.load_decoder(llama_folder)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        hub.load_decoder(tmp_path / "nowhere" / "at" / "all")


def test_a_tokenizer_of_another_model_is_refused(llama_folder: Path) -> None:
    edit_json(llama_folder / "config.json", vocab_size=258)
    with pytest.raises(ValueError, match="ids up to 258, the embedding only 258 rows"):
        hub.load_decoder(llama_folder)
    (llama_folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        hub.load_decoder(llama_folder)
    (llama_folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        hub.load_decoder(llama_folder)
