"""The frozen sentence encoder's transformer: BERT (arXiv 1810.04805) in Flax Linen.

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
from jax.typing import DTypeLike

from grpo_jax.models.layers import MASKED, Array, Embed, Linear


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Architecture, as read from a model folder's config.json (hub)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


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
        positions = jnp.arange(ids.shape[1])
        x = x + embed(c.max_position_embeddings, "position_embeddings")(positions)
        x = x + embed(c.type_vocab_size, "token_type_embeddings")(jnp.zeros((), jnp.int32))
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(x).astype(self.dtype)


class SelfAttention(nn.Module):
    """Bidirectional multi-head attention without its output projection."""

    config: EncoderConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        head_dim = c.hidden_size // c.num_heads

        def heads(name: str) -> Array:
            y = Linear(c.hidden_size, True, self.dtype, name=name)(x)
            return y.reshape(*x.shape[:2], c.num_heads, head_dim)

        q, k, v = heads("query"), heads("key"), heads("value")
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
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
    def __call__(self, x: Array, mask: Array) -> Array:
        out = SelfAttention(self.config, self.dtype, name="self")(x, mask)
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
    def __call__(self, x: Array, mask: Array) -> tuple[Array, None]:
        x = Attention(self.config, self.dtype, name="attention")(x, mask)
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
          ids: int32 [B, S], padded on the right, S at most max_position_embeddings.
          lengths: int32 [B], at least 1.

        Returns:
          [B, S, D] in the compute dtype; positions behind a row's length are meaningless.
        """
        chex.assert_rank([ids, lengths], [2, 1])
        mask = jnp.arange(ids.shape[1]) < lengths[:, None]
        x = Embeddings(self.config, self.dtype, name="embeddings")(ids)
        layers = nn.scan(
            EncoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.config.num_layers,
        )
        return layers(self.config, self.dtype, name="layers")(x, mask)[0]
