"""Every file of configs/ loads, validates, says how to launch it, and fits its model."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import grpo_jax
from grpo_jax.config import Config
from grpo_jax.config_check import validate
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import batch_logps, init_state, policy_variables
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.models.rope import Rope
from grpo_jax.structs import TrainBatch

FOLDER = Path(grpo_jax.__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.py"))

# Architectures as the models' own config.json files have them, and their numbers of parameters.
SMOLLM2 = DecoderConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, rope=Rope(100000.0), rms_norm_eps=1e-5, tie_word_embeddings=True,
    max_position_embeddings=8192,
)  # fmt: skip
QWEN3_4B = DecoderConfig(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32,
    num_kv_heads=8, head_dim=128, rope=Rope(1e6), qk_norm=True, tie_word_embeddings=True,
    max_position_embeddings=40960,
)  # fmt: skip
TINY = DecoderConfig(
    vocab_size=259, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
    max_position_embeddings=512,
)  # fmt: skip
MODELS = {
    "asset:tiny-decoder": (TINY, 131_776),
    "asset:smollm2-135m-instruct": (SMOLLM2, 134_515_008),
    "Qwen/Qwen3-4B": (QWEN3_4B, 4_022_468_096),
}


def load(file: Path) -> Config:
    return runpy.run_path(str(file))["get_config"]()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_valid_and_says_how_to_launch_it(file: Path) -> None:
    validate(load(file))
    text = runpy.run_path(str(file))["__doc__"]
    assert re.search(rf"-m grpo_jax\.main --config=configs/{file.name} --workdir=runs/\w+", text)
    assert re.search(r"\b(CPU|GPU)", text) and re.search(r"\b(time|minutes?|hours?)\b", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_model_of_the_config_at_full_size(file: Path) -> None:
    """Shapes of parameters, adapter, optimizer state and log-probs; nothing is computed."""
    cfg = load(file)
    config, count = MODELS[cfg.model.path]
    dropout = cfg.model.lora.dropout if cfg.model.lora.rank else 0.0
    model = Decoder(config, jnp.dtype(cfg.model.dtype), remat=cfg.model.remat, lora_dropout=dropout)
    P = cfg.grpo.prompts_per_step // cfg.grpo.gradient_accumulation_steps
    G, S, T = cfg.grpo.num_generations, cfg.data.max_prompt_length, cfg.data.max_completion_length
    assert config.max_position_embeddings >= S + T

    def step(key: jax.Array) -> tuple:
        prompts, lengths = jnp.zeros((P, S), jnp.int32), jnp.ones(P, jnp.int32)
        params = model.init(key, prompts[:1], lengths[:1])["params"]
        params = jax.tree.map(lambda x: x.astype(cfg.model.param_dtype), params)
        rank = cfg.model.lora.rank
        trained = lora.init(key, params, cfg.model.lora) if rank else params
        state = init_state(trained, build_optimizer(cfg.grpo.optimizer, 10))
        ids = jnp.zeros((P, G, T), jnp.int32)
        batch = TrainBatch(prompts, lengths, ids, ids == 0, jnp.zeros((P, G)))
        variables = policy_variables(state.params, params, cfg.model.lora)
        temperature = cfg.grpo.sampling.temperature
        rngs = {"dropout": key} if dropout else None
        return params, state, batch_logps(model, variables, batch, temperature, rngs)

    params, state, (logps, entropy) = jax.eval_shape(step, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == count
    assert logps.shape == entropy.shape == (P, G, T) and logps.dtype == jnp.float32
    first = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    trained = jax.tree.leaves(state.params)
    assert sum(x.size for x in first) == 2 * sum(x.size for x in trained)
    if rank := cfg.model.lora.rank:
        D, F, N = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
        K = config.num_kv_heads * config.head_dim
        wide = 2 * (D + N) + 2 * (D + K) + 3 * (D + F)  # q, o; k, v; gate, up, down
        assert sum(x.size for x in trained) == config.num_layers * rank * wide
