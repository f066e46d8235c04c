"""Model folders that must be refused, each with one error that names everything wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from golden import make_hub
from safetensors.numpy import load_file, save_file

from grpo_jax import hub
from grpo_jax.hub.decoder_config import decoder_config, decoder_json
from grpo_jax.hub.names import decoder_table


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: .*llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling: .*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 50.0}}, "rope_parameters: "),
        ({"rope_parameters": {"rope_theta": 60.0}}, r"rope_theta: \[50.0, 60.0\] contradict"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved: True is not a field we know"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu', only 'silu'"),
        ({"attention_bias": True}, "attention_bias: got True"),
        ({"sliding_window": 64}, "sliding_window: not implemented"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not a field"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": "32"}, "hidden_size: got '32', wanted a positive integer"),
        ({"num_key_value_heads": 3}, "3 does not divide 4 heads"),
    ],
)
def test_configs_that_compute_differently_are_refused(
    change: dict, message: str, llama_folder: Path
) -> None:
    edit_json(llama_folder / "config.json", **change)
    with pytest.raises(ValueError, match=message):
        hub.load_decoder(llama_folder)


def test_rope_theta_old_and_new_place(llama_folder: Path) -> None:
    file = llama_folder / "config.json"
    assert decoder_config(llama_folder).rope_theta == 50.0
    edit_json(file, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert decoder_config(llama_folder).rope_theta == 5e5
    edit_json(file, rope_theta=5e5, rope_scaling={"type": "default"})
    assert decoder_config(llama_folder).rope_theta == 5e5
    edit_json(file, rope_theta=None, rope_parameters=None)
    assert decoder_config(llama_folder).rope_theta == 10000.0  # transformers' default


def test_published_configs_are_read(tmp_path: Path) -> None:
    """The config.json of Qwen3-4B as published."""
    make_hub.write_json(
        tmp_path / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
            "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36,
            "model_type": "qwen3", "num_attention_heads": 32, "num_hidden_layers": 36,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
            "use_sliding_window": False, "vocab_size": 151936,
        },
    )  # fmt: skip
    config = decoder_config(tmp_path)
    assert config.qk_norm and config.tie_word_embeddings and config.rope_theta == 1e6
    assert len(decoder_table(config)) == 36 * 11 + 2  # the model at full size, as shapes
    assert decoder_json(config)["model_type"] == "qwen3"


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
