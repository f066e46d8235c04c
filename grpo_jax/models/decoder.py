"""The causal language model: one decoder for the llama family, switched by its configuration.

In: token ids padded on the right. Out: float hidden states after the final norm; `logits` and
`head` turn them into scores. Parameters are a nested dict whose paths keep Hugging Face's words,
with the leaves of `layers` stacked [L, ...] for the scan.

A training forward packs a prompt and its G completions into one row [S + G (T - 1)] and lets the
attention see the prompt as a prefix they share, so a group costs one prompt, in compute and memory.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grpo_jax.models.layers import KV, Array, Embed, Linear, RMSNorm, attention, rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Architecture, as read from a model folder's config.json (hub)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # biases on q, k, v (Qwen2)
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3)
    max_position_embeddings: int = 2048


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float

    def setup(self) -> None:
        c = self.config

        def linear(heads: int, bias: bool) -> Linear:
            return Linear(heads * c.head_dim, bias, self.dtype, self.lora_dropout)

        self.q_proj = linear(c.num_heads, c.attention_bias)
        self.k_proj = linear(c.num_kv_heads, c.attention_bias)
        self.v_proj = linear(c.num_kv_heads, c.attention_bias)
        self.o_proj = Linear(c.hidden_size, False, self.dtype, self.lora_dropout)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps)
            self.k_norm = RMSNorm(c.rms_norm_eps)

    def project(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        """x [..., D], positions [...] -> rotated q [..., N, H], rotated k and v [..., K, H]."""
        c = self.config
        q = self.q_proj(x).reshape(*x.shape[:-1], c.num_heads, c.head_dim)
        k = self.k_proj(x).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        v = self.v_proj(x).reshape(*x.shape[:-1], c.num_kv_heads, c.head_dim)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta), v

    def __call__(
        self, x: Array, positions: Array, prompt_mask: Array, num_generations: int
    ) -> tuple[Array, KV]:
        """Prompt and completions packed: x [P, S + G T, D] -> [P, S + G T, D], the prompt's KV."""
        P, S = prompt_mask.shape
        q, k, v = self.project(x, positions)

        def causal(length: int) -> Array:
            return jnp.tril(jnp.ones((length, length), bool))

        def head_major(a: Array) -> Array:
            return jnp.swapaxes(a, -2, -3)

        prefix = KV(head_major(k[:, :S]), head_major(v[:, :S]))
        mask = causal(S) & prompt_mask[:, None, None, None, None]
        own = KV(prefix.k[:, None], prefix.v[:, None])
        out = attention(q[:, None, :S], own, mask)[:, 0]
        if num_generations:
            T = (x.shape[1] - S) // num_generations

            def grouped(a: Array) -> Array:
                return a[:, S:].reshape(P, num_generations, T, *a.shape[2:])

            own = KV(head_major(grouped(k)), head_major(grouped(v)))
            rest = attention(grouped(q), own, causal(T), (prefix, prompt_mask))
            out = jnp.concatenate([out, rest.reshape(P, num_generations * T, -1)], axis=1)
        return self.o_proj(out), prefix

    def decode(
        self, x: Array, positions: Array, slot: Array, cache: KV, prefix: KV, prompt_mask: Array
    ) -> tuple[Array, KV]:
        """One new token a row: x [P, G, D] at `slot` of the cache [P, G, K, U, H]."""
        q, k, v = self.project(x[:, :, None], positions[:, :, None])

        def write(buffer: Array, new: Array) -> Array:
            new = jnp.swapaxes(new, 2, 3).astype(buffer.dtype)
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, axis=3)

        cache = KV(write(cache.k, k), write(cache.v, v))
        written = jnp.arange(cache.k.shape[3]) <= slot
        out = attention(q, cache, written, (prefix, prompt_mask))
        return self.o_proj(out[:, :, 0]), cache


class MLP(nn.Module):
    """SwiGLU feed-forward block."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float

    def setup(self) -> None:
        c = self.config
        self.gate_proj = Linear(c.intermediate_size, False, self.dtype, self.lora_dropout)
        self.up_proj = Linear(c.intermediate_size, False, self.dtype, self.lora_dropout)
        self.down_proj = Linear(c.hidden_size, False, self.dtype, self.lora_dropout)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float = 0.0
    num_generations: int = 0
    return_kv: bool = False

    def setup(self) -> None:
        self.input_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.self_attn = Attention(self.config, self.dtype, self.lora_dropout)
        self.post_attention_layernorm = RMSNorm(self.config.rms_norm_eps)
        self.mlp = MLP(self.config, self.dtype, self.lora_dropout)

    def __call__(self, x: Array, positions: Array, prompt_mask: Array) -> tuple[Array, KV | None]:
        normed = self.input_layernorm(x)
        out, kv = self.self_attn(normed, positions, prompt_mask, self.num_generations)
        x = x + out
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, kv if self.return_kv else None

    def decode(
        self, x: Array, positions: Array, slot: Array, cache: KV, prefix: KV, prompt_mask: Array
    ) -> tuple[Array, KV]:
        normed = self.input_layernorm(x)
        out, cache = self.self_attn.decode(normed, positions, slot, cache, prefix, prompt_mask)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Decoder(nn.Module):
    """The whole model. `dtype` is the compute dtype; parameters keep the dtype they are given."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    lora_dropout: float = 0.0

    @nn.compact
    def forward(
        self,
        ids: Array,
        positions: Array,
        prompt_mask: Array,
        num_generations: int,
        return_kv: bool,
    ) -> tuple[Array, KV | None]:
        """Packed ids [P, X] -> hidden [P, X, D] and, if asked, the prompt's KV [L, P, K, S, H]."""
        c = self.config
        x = Embed(c.vocab_size, c.hidden_size, self.dtype, name="embed_tokens")(ids)
        layer = nn.remat(DecoderLayer, prevent_cse=False) if self.remat else DecoderLayer
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )
        x, kv = layers(c, self.dtype, self.lora_dropout, num_generations, return_kv, name="layers")(
            x, positions, prompt_mask
        )
        x = RMSNorm(c.rms_norm_eps, name="norm")(x)
        if not c.tie_word_embeddings:  # declared here, applied by `head` and `logits`
            Head(c.vocab_size, c.hidden_size, name="lm_head")()
        return x, kv

    def __call__(self, ids: Array, lengths: Array) -> Array:
        """Hidden state of every position.

        Args:
          ids: int32 [P, S], padded on the right.
          lengths: int32 [P], at least 1.

        Returns:
          [P, S, D] in the compute dtype; positions behind a row's length are meaningless.
        """
        return self.forward(ids, *_prompt_layout(ids, lengths), 0, False)[0]

    def prefill(self, ids: Array, lengths: Array) -> tuple[Array, KV]:
        """As `__call__`, but the last position only: hidden [P, D] and KV [L, P, K, S, H]."""
        hidden, kv = self.forward(ids, *_prompt_layout(ids, lengths), 0, True)
        assert kv is not None
        return _at(hidden, lengths - 1), kv

    def predict(self, prompt_ids: Array, prompt_lengths: Array, ids: Array) -> Array:
        """The hidden states that predict each completion token, G completions to a prompt.

        Args:
          prompt_ids: int32 [P, S], padded on the right.
          prompt_lengths: int32 [P], at least 1.
          ids: int32 [P, G, T] completions, padded on the right.

        Returns:
          [P, G, T, D]: entry t is the state just before token t.
        """
        P, S = prompt_ids.shape
        _, G, T = ids.shape
        chex.assert_shape(prompt_lengths, (P,))
        positions, mask = _prompt_layout(prompt_ids, prompt_lengths)
        # The last token predicts nothing that is asked for, so it is not computed.
        own = prompt_lengths[:, None, None] + jnp.arange(T - 1)[None, None]
        own = jnp.broadcast_to(own, (P, G, T - 1)).reshape(P, -1)
        packed = jnp.concatenate([prompt_ids, ids[:, :, :-1].reshape(P, -1)], axis=1)
        positions = jnp.concatenate([positions, own], axis=1)
        groups = G if T > 1 else 0  # with one token each, nothing stands behind the prompt
        hidden, _ = self.forward(packed, positions, mask, groups, False)
        first = _at(hidden, prompt_lengths - 1)[:, None, None]
        first = jnp.broadcast_to(first, (P, G, 1, first.shape[-1]))
        rest = hidden[:, S:].reshape(P, G, T - 1, hidden.shape[-1])
        return jnp.concatenate([first, rest], axis=2)


class Head(nn.Module):
    """Declares the untied output matrix."""

    vocab_size: int
    hidden_size: int

    @nn.compact
    def __call__(self) -> Array:
        init = nn.initializers.lecun_normal()
        return self.param("kernel", init, (self.hidden_size, self.vocab_size), jnp.float32)


def _prompt_layout(ids: Array, lengths: Array) -> tuple[Array, Array]:
    """Positions int32 [P, S] and mask bool [P, S] of prompts padded on the right."""
    P, S = ids.shape
    positions = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (P, S))
    return positions, positions < lengths[:, None]


def _at(x: Array, index: Array) -> Array:
    """x [P, S, D], index [P] -> x[p, index[p]] as [P, D]."""
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def head(params: dict) -> Array:
    """The output matrix [D, V]: the untied kernel, or the embedding transposed."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


def logits(params: dict, hidden: Array) -> Array:
    """Hidden [..., D] -> float32 [..., V]. For long sequences use learn.logps, which chunks."""
    kernel = head(params).astype(hidden.dtype)
    return jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
