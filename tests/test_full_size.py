"""Published models at full size, as shapes: their numbers of parameters come out exactly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from grpo_jax.hub.decoder_config import decoder_config, export_json
from grpo_jax.hub.names import decoder_table
from grpo_jax.models.decoder import DecoderConfig
from grpo_jax.models.rope import Rope

# Their config.json, and what torch counts on its meta device (golden/make_families.py --sizes).
MODELS = json.loads((Path(__file__).parent / "golden/full_size.json").read_text())
GEMMA_4B = "google/gemma-3-4b-it"


def read(folder: Path, name: str) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(MODELS[name]["config"]))
    return decoder_config(folder)


@pytest.mark.parametrize("name", MODELS)
def test_number_of_parameters(name: str, tmp_path: Path) -> None:
    table = decoder_table(read(tmp_path, name))
    count = sum(math.prod(slot.shape) for slot in table.values())
    assert count == MODELS[name]["parameters"]


def test_gemma_3_fills_in_what_its_file_leaves_out(tmp_path: Path) -> None:
    config = read(tmp_path, GEMMA_4B)
    assert config == DecoderConfig(
        vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_layers=34, num_heads=8,
        num_kv_heads=4, head_dim=256, rope=Rope(1e6, "linear", 8.0), sliding_rope=Rope(10000.0),
        sliding_window=1024, sliding_layers=tuple(i % 6 != 5 for i in range(34)), norm_offset=1.0,
        tie_word_embeddings=True, qk_norm=True, hidden_act="gelu_pytorch_tanh", post_norms=True,
        embedding_scale=2560**0.5, attention_scale=1 / 16, max_position_embeddings=131072,
    )  # fmt: skip
    written = export_json(tmp_path)
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert written["model_type"] == "gemma3_text" and "vision_config" not in written
    assert written["eos_token_id"] == [1, 106]
    assert written["rope_theta"] == 1e6 and written["rope_local_base_freq"] == 10000.0


def test_what_is_special_about_each(tmp_path: Path) -> None:
    """Switches that the number of parameters does not show."""
    llama = read(tmp_path, "meta-llama/Llama-3.2-1B").rope
    assert llama == Rope(5e5, "llama3", 32.0, 8192, 1.0, 4.0)
    smollm = read(tmp_path, "HuggingFaceTB/SmolLM3-3B")
    assert smollm.rope_layers == (True, True, True, False) * 9 and not smollm.sliding_window
    for name in ("mistralai/Mistral-7B-v0.3", "Qwen/Qwen2.5-7B", "Qwen/Qwen3-4B"):
        assert not read(tmp_path, name).sliding_window
    assert read(tmp_path, "microsoft/Phi-3-mini-4k-instruct").sliding_window == 2047
    gemma = read(tmp_path, "google/gemma-2-9b")
    assert (gemma.attn_logit_softcapping, gemma.final_logit_softcapping) == (50.0, 30.0)
    assert gemma.sliding_layers == (True, False) * 21 and gemma.sliding_rope is None
    assert read(tmp_path, "google/gemma-3-27b-it").attention_scale == 168**-0.5
