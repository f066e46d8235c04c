"""Name tables: where each Hugging Face tensor goes among our parameters.

Our parameter paths keep Hugging Face's words, so a table is a rule: `kernel` is a transposed
`weight`, `scale` and `embedding` are a `weight`, and `layers` is unstacked under its own prefix.
Shapes come from the model itself (eval_shape, which costs no memory).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from grpo_jax.hub.weights import Slot
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.models.encoder import Encoder, EncoderConfig

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


def decoder_table(config: DecoderConfig) -> dict[str, Slot]:
    """Tensor name of the family's class in transformers (LlamaForCausalLM, ...) -> slot."""
    return _table(_shapes(Decoder(config)), "model.layers", "model.", outside=("lm_head",))


def decoder_ignored(config: DecoderConfig) -> set[str]:
    """Tensors that old checkpoints carry and that follow from the config: rotary tables."""
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)}


def encoder_table(kind: str, config: EncoderConfig | DecoderConfig) -> dict[str, Slot]:
    """Tensor name of BertModel, RobertaModel, XLMRobertaModel, MPNetModel, Qwen3Model -> slot.

    Names are without the prefix that a whole pre-training model puts before them.

    Args:
      kind: the model_type.
      config: what hub.encoder_config read.
    """
    if isinstance(config, DecoderConfig):
        return {name.removeprefix("model."): slot for name, slot in decoder_table(config).items()}
    table = _table(_shapes(Encoder(config)), "encoder.layer", "")
    return {_mpnet(name): slot for name, slot in table.items()} if kind == "mpnet" else table


def encoder_prefix(kind: str) -> str:
    """What a whole pre-training model puts before the names of its encoder."""
    return {"bert": "bert.", "mpnet": "mpnet."}.get(
        kind, "roberta." if kind.endswith("roberta") else "model."
    )


def encoder_ignored(kind: str, config: EncoderConfig | DecoderConfig) -> set[str]:
    """Position numbers, the pooler and the pre-training heads: sentence encoders use none."""
    if isinstance(config, DecoderConfig):
        return {name.removeprefix("model.") for name in decoder_ignored(config)} | {
            "lm_head.weight"
        }
    parts = {
        "bert": [f"cls.predictions.{part}" for part in ("transform.dense", "transform.LayerNorm")]
        + ["cls.predictions.decoder", "cls.predictions", "cls.seq_relationship"]
    }.get(kind, ["lm_head", "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"])
    numbers = {"embeddings.position_ids", "embeddings.token_type_ids"}
    return numbers | {
        f"{p}.{leaf}" for p in (*parts, "pooler.dense") for leaf in ("weight", "bias")
    }


def current_norms(name: str) -> str:
    """Today's name of a layer norm's tensor, which checkpoints of TensorFlow's days call gamma."""
    if name.endswith("LayerNorm.gamma"):
        return name.removesuffix("gamma") + "weight"
    return name.removesuffix("beta") + "bias" if name.endswith("LayerNorm.beta") else name


def _mpnet(name: str) -> str:
    """MPNet's word for a tensor of BERT's."""
    for ours, theirs in (
        ("attention.self.query", "attention.attn.q"),
        ("attention.self.key", "attention.attn.k"),
        ("attention.self.value", "attention.attn.v"),
        ("attention.output.dense", "attention.attn.o"),
        ("attention.output.LayerNorm", "attention.LayerNorm"),
        ("relative_attention_bias", "encoder.relative_attention_bias"),
    ):
        name = name.replace(ours, theirs)
    return name


@functools.lru_cache(maxsize=4)
def _shapes(model: Decoder | Encoder) -> dict:
    """The parameter tree of a model, as shapes, which nobody changes."""
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
