"""Name tables: where each Hugging Face tensor goes among our parameters.

Our parameter paths keep Hugging Face's words, so a table is a rule: `kernel` is a transposed
`weight`, `scale` and `embedding` are a `weight`, and `layers` is unstacked under its own prefix.
Shapes come from the model itself (eval_shape, which costs no memory).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.hub.weights import Slot
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.models.encoder import Encoder, EncoderConfig

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def decoder_table(config: DecoderConfig) -> dict[str, Slot]:
    """Tensor name of LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM -> slot."""
    return _table(_shapes(Decoder(config)), "model.layers", "model.", outside=("lm_head",))


def decoder_ignored(config: DecoderConfig) -> set[str]:
    """Tensors that old checkpoints carry and that follow from the config: rotary tables."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)}


def encoder_table(config: EncoderConfig) -> dict[str, Slot]:
    """Tensor name of BertModel -> slot."""
    return _table(_shapes(Encoder(config)), "encoder.layer", "")


def encoder_ignored() -> set[str]:
    """Position numbers, the pooler and the pre-training heads: sentence encoders use none."""
    parts = ("decoder", "transform.dense", "transform.LayerNorm")
    heads = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return {
        "embeddings.position_ids",
        "pooler.dense.weight",
        "pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
        "cls.predictions.bias",
        *(f"cls.predictions.{name}" for name in heads),
    }


def _shapes(model: Decoder | Encoder) -> dict:
    """The parameter tree of a model, as shapes."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(model.init, key, ids, lengths)["params"]


def _table(
    shapes: dict, layers: str, prefix: str, outside: tuple[str, ...] = ()
) -> dict[str, Slot]:
    """Walk the tree; `layers` names the stacked part, `prefix` the rest except `outside`."""
    table = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = tuple(key.key for key in keys)
        transpose = path[-1] == "kernel"
        words = ".".join((*path[:-1], _LEAVES[path[-1]]))
        if path[0] == "layers":
            shape = leaf.shape[1:][::-1] if transpose else leaf.shape[1:]
            for i in range(leaf.shape[0]):
                name = f"{layers}.{i}.{words.removeprefix('layers.')}"
                table[name] = Slot(path, i, transpose, shape)
        else:
            shape = leaf.shape[::-1] if transpose else leaf.shape
            name = words if path[0] in outside else prefix + words
            table[name] = Slot(path, None, transpose, shape)
    return table
