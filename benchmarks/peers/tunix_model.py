"""Loading the benchmark's Qwen3 folder into Tunix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax", "optax", "transformers")


def load(folder: str, dtype: str) -> tuple[Any, Any, Any, Any]:
    """(model, config, mesh, tokenizer) of a Hugging Face folder with a Qwen3 model."""
    import jax
    import jax.numpy as jnp
    from transformers import AutoTokenizer
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params

    c = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = qwen3.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        head_dim=c["head_dim"],
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=c["rope_theta"],
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = params.create_model_from_safe_tensors(folder, config, mesh, dtype=jnp.dtype(dtype))
    return model, config, mesh, AutoTokenizer.from_pretrained(folder)


def mean_logp(model: Any, ids: list[list[int]]) -> float:
    """Mean log-prob of the prompts' own tokens: equal models agree on it."""
    import jax
    import jax.numpy as jnp

    tokens = jnp.asarray(ids)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
    logits, _ = model(tokens, positions, None, jnp.broadcast_to(mask, (len(ids), *mask.shape)))
    logps = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return float(jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1).mean())
