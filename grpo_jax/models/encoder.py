"""The frozen sentence encoder's transformer: the BERT family in Flax Linen.

One module, switched by its configuration: BERT (arXiv 1810.04805), RoBERTa and XLM-R (1907.11692,
1911.02116), which count positions from behind the padding's id, and MPNet (2004.09297), which adds
a relative position bias that all layers share.

In: token ids padded on the right, with their lengths. Out: the last layer's hidden states; pooling
and what follows it belong to hub.encoder, as the model's folder says. Parameters are a nested dict
whose paths keep Hugging Face's words, with the leaves of `layers` stacked [L, ...] for the scan.
No dropout: the encoder is never trained.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grpo_jax.models.layers import MASKED, Array, Embed, Linear

MAX_DISTANCE = 128  # tokens; farther ones share MPNet's last bucket


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture, as read from a model folder's config.json (hub)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2  # 0: no type embeddings (MPNet)
    layer_norm_eps: float = 1e-12
    padding_idx: int | None = None  # positions start at padding_idx + 1; None: at 0 (BERT)
    relative_attention_num_buckets: int = 0  # of the bias on the scores; 0: none

    @property
    def max_length(self) -> int:
        """The most tokens that a text can have: those that have a position."""
        return self.max_position_embeddings - (
            0 if self.padding_idx is None else self.padding_idx + 1
        )


class LayerNorm(nn.Module):
    """Layer norm (arXiv 1607.06450), computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def position_ids(ids: Array, padding_idx: int | None) -> Array:
    """Rows of the position table: int32 [B, S].

    With padding_idx p the tokens of [a, b, <pad>, c] stand at p + 1, p + 2, p, p + 3, as fairseq
    has it: a padding token that a text happens to contain has no position of its own.

    Args:
      ids: int32 [B, S], padded on the right with any id.
      padding_idx: None counts every token, from 0.
    """
    if padding_idx is None:
        return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    real = (ids != padding_idx).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real + padding_idx


def relative_buckets(length: int, num_buckets: int) -> np.ndarray:
    """Bucket of the distance from query t to key s, as in T5 (arXiv 1910.10683): int32 [T, T].

    Half the buckets are for keys behind the query. Of each half, the first half are one distance
    each, the others grow logarithmically up to MAX_DISTANCE.
    """
    behind = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    half, exact = num_buckets // 2, num_buckets // 4
    distance = np.abs(behind)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(np.log(MAX_DISTANCE / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return np.where(distance < exact, distance, far).astype(np.int32) + half * (behind > 0)


class Embeddings(nn.Module):
    """Word + position + type embeddings; a single text is all of type 0."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        c = self.config

        def embed(size: int, name: str) -> Embed:
            return Embed(size, c.hidden_size, jnp.float32, name=name)

        x = embed(c.vocab_size, "word_embeddings")(ids)
        positions = position_ids(ids, c.padding_idx)
        x = x + embed(c.max_position_embeddings, "position_embeddings")(positions)
        if c.type_vocab_size:
            x = x + embed(c.type_vocab_size, "token_type_embeddings")(jnp.zeros((), jnp.int32))
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(x).astype(self.dtype)


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention without its output projection."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        c = self.config
        head_dim = c.hidden_size // c.num_heads

        def heads(name: str) -> Array:
            y = Linear(c.hidden_size, True, self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], c.num_heads, head_dim)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * head_dim**-0.5 + bias, axis=-1).astype(self.dtype)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v).reshape(x.shape)


class Output(nn.Module):
    """Projection, residual, norm: the end of both halves of a layer."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        x = Linear(self.config.hidden_size, True, self.dtype, name="dense")(x)
        return LayerNorm(self.config.layer_norm_eps, name="LayerNorm")(x + residual)


class Attention(nn.Module):
    """Self-attention with its output half."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        out = SelfAttention(self.config, self.dtype, name="self")(x, bias)
        return Output(self.config, self.dtype, name="output")(out, x)


class Intermediate(nn.Module):
    """The widening half of the feed-forward block; the gelu is the exact one (erf)."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Linear(self.config.intermediate_size, True, self.dtype, name="dense")(x)
        return jax.nn.gelu(x, approximate=False)


class EncoderLayer(nn.Module):
    """Post-norm attention and feed-forward."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> tuple[Array, None]:
        x = Attention(self.config, self.dtype, name="attention")(x, bias)
        wide = Intermediate(self.config, self.dtype, name="intermediate")(x)
        return Output(self.config, self.dtype, name="output")(wide, x), None


class Encoder(nn.Module):
    """The whole model. `dtype` is the compute dtype; parameters keep the dtype they are given."""

    config: EncoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Array, lengths: Array) -> Array:
        """Hidden state of every position.

        Args:
          ids: int32 [B, S], padded on the right, S at most config.max_length.
          lengths: int32 [B], at least 1.

        Returns:
          [B, S, D] in the compute dtype; positions behind a row's length are meaningless.
        """
        chex.assert_rank([ids, lengths], [2, 1])
        c = self.config
        mask = jnp.arange(ids.shape[1]) < lengths[:, None]
        bias = jnp.where(mask, 0.0, MASKED)[:, None, None]  # float32 [B, 1 or N, 1 or T, S]
        if c.relative_attention_num_buckets:
            buckets = relative_buckets(ids.shape[1], c.relative_attention_num_buckets)
            table = Embed(
                c.relative_attention_num_buckets, c.num_heads, name="relative_attention_bias"
            )
            bias = bias + jnp.moveaxis(table(jnp.asarray(buckets)), -1, 0)
        x = Embeddings(c, self.dtype, name="embeddings")(ids)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        return layers(c, self.dtype, name="layers")(x, bias)[0]
