"""One layer of the decoder, its configuration, and where the tokens of a batch stand.

A training forward packs a prompt and its G completions into one row [S + G T] and lets the
attention see the prompt as a prefix they share, so a group costs one prompt, in compute and memory.
With a packing only attention sees that row; all else works on the tokens that count.
Decoding adds one token to each of P x G caches and sees the same prefix.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grpo_jax.models.layers import KV, Array, Linear, RMSNorm, attention, spread
from grpo_jax.models.packing import Packing
from grpo_jax.models.rope import Rope, Rotation, rotate, rotations, still

_ACTIVATIONS = {"silu": nn.silu, "gelu_pytorch_tanh": nn.gelu}


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
    rope: Rope = Rope()
    sliding_rope: Rope | None = None  # of layers with a window; None: as the others (Gemma 3)
    rope_layers: tuple[bool, ...] = ()  # which layers rotate; (): every one (SmolLM3)
    sliding_window: int = 0  # a query sees the last so many keys, itself included; 0: all
    sliding_layers: tuple[bool, ...] = ()  # which layers have the window; (): every one
    rms_norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to the norms' weights (Gemma: 1)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    output_bias: bool = False  # of o_proj
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each query and key head (Qwen3, Gemma 3)
    fused_projections: bool = False  # one matrix for q, k, v and one for gate, up (Phi-3)
    hidden_act: str = "silu"  # or gelu_pytorch_tanh
    post_norms: bool = False  # norms behind attention and feed-forward too (Gemma 2, 3)
    embedding_scale: float = 1.0  # Gemma: sqrt(hidden_size)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attn_logit_softcapping: float = 0.0  # 0: off
    final_logit_softcapping: float = 0.0
    max_position_embeddings: int = 2048

    def is_sliding(self, layer: int) -> bool:
        """Whether this layer's attention has the window."""
        return bool(self.sliding_window) and (not self.sliding_layers or self.sliding_layers[layer])

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The distinct kinds of rotation among the layers; None is no rotation."""
        return tuple(dict.fromkeys(self._rope_of(i) for i in range(self.num_layers)))

    def layer_kinds(self) -> list[LayerKind]:
        """What distinguishes each layer."""
        return [
            LayerKind(
                np.int32(self.ropes.index(self._rope_of(i))),
                np.int32(self.sliding_window if self.is_sliding(i) else _EVERYTHING),
            )
            for i in range(self.num_layers)
        ]

    def _rope_of(self, layer: int) -> Rope | None:
        if self.rope_layers and not self.rope_layers[layer]:
            return None
        return (self.sliding_rope or self.rope) if self.is_sliding(layer) else self.rope


_EVERYTHING = 2**30  # a window that no text fills


class LayerKind(NamedTuple):
    """What distinguishes a layer from the others; under the scan, arrays [L]."""

    rotation: Array | np.int32  # int32 [], index among DecoderConfig.ropes
    window: Array | np.int32  # int32 []


class Layout(NamedTuple):
    """Where the tokens of a batch stand: the same for every layer."""

    positions: Array  # int32 [P, X]
    prompt_mask: Array  # bool [P, S], what completions see of their prompt
    rotation: Rotation  # [R, P, X, H / 2] or [R, B, N, H / 2]: one for each of DecoderConfig.ropes
    packing: Packing | None = None  # None: layers see the grid [P, X] itself


def all_rotations(config: DecoderConfig, positions: Array) -> Rotation:
    """Positions int32 [...] -> the rotations of every kind of layer, [R, ..., H / 2]."""
    found = [rotations(rope or config.rope, config.head_dim, positions) for rope in config.ropes]
    pairs = zip(config.ropes, found, strict=True)
    kinds = [still(rotation) if rope is None else rotation for rope, rotation in pairs]
    return jax.tree.map(lambda *kind: jnp.stack(kind), *kinds)


def pick(rotation: Rotation, kind: LayerKind) -> Rotation:
    """A layer's rotation [..., H / 2] among all of them [R, ..., H / 2]."""
    return jax.tree.map(lambda x: x[kind.rotation], rotation)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float

    def setup(self) -> None:
        c = self.config

        def linear(heads: int) -> Linear:
            return Linear(heads * c.head_dim, c.qkv_bias, self.dtype, self.lora_dropout)

        if c.fused_projections:
            self.qkv_proj = linear(c.num_heads + 2 * c.num_kv_heads)
        else:
            self.q_proj = linear(c.num_heads)
            self.k_proj = linear(c.num_kv_heads)
            self.v_proj = linear(c.num_kv_heads)
        self.o_proj = Linear(c.hidden_size, c.output_bias, self.dtype, self.lora_dropout)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.rms_norm_eps, c.norm_offset)
            self.k_norm = RMSNorm(c.rms_norm_eps, c.norm_offset)

    def project(self, x: Array, rotation: Rotation) -> tuple[Array, Array, Array]:
        """x [..., D], rotation [..., H/2] -> rotated q [..., N, H], rotated k and v [..., K, H]."""
        c = self.config
        if c.fused_projections:
            edges = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
            flat = jnp.split(self.qkv_proj(x), edges, axis=-1)
        else:
            flat = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        q, k, v = (y.reshape(*x.shape[:-1], -1, c.head_dim) for y in flat)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, rotation), rotate(k, rotation), v

    def __call__(
        self, x: Array, layout: Layout, kind: LayerKind, num_generations: int
    ) -> tuple[Array, KV]:
        """Of whole rows: x [P, S + G T, D] or packed [B, N, D] -> the same, and prompts' KV."""
        positions, prompt_mask, rotation, packing = layout
        P, S = prompt_mask.shape
        q, k, v = self.project(x, pick(rotation, kind))
        if packing is not None:
            q, k, v = (packing.unpack(y) for y in (q, k, v))
        seen = prompt_mask[:, None, None, None, None]

        prefix = _kv(k[:, :S], v[:, :S])
        own = KV(prefix.k[:, None], prefix.v[:, None])
        out = self._attend(q[:, None, :S], own, self._causal(S, kind) & seen)[:, 0]
        if num_generations:
            T = (q.shape[1] - S) // num_generations

            def grouped(a: Array) -> Array:
                return a[:, S:].reshape(P, num_generations, T, *a.shape[2:])

            own = _kv(grouped(k), grouped(v))
            seen = seen & self._near(grouped(positions)[:, :, None, None, :, None], S, kind)
            rest = self._attend(grouped(q), own, self._causal(T, kind), (prefix, seen))
            out = jnp.concatenate([out, rest.reshape(P, num_generations * T, -1)], axis=1)
        if packing is not None:
            out = packing.pack(out)
        return self.o_proj(out), prefix

    def decode(
        self,
        x: Array,
        layout: Layout,
        kind: LayerKind,
        slot: Array,
        age: Array,
        cache: KV,
        prefix: KV,
    ) -> tuple[Array, KV]:
        """One new token a row, x [P, G, D].

        Args:
          layout: the new tokens' positions [P, G] and the prompts' mask [P, S].
          slot: int32 [], where the token goes in the cache, a ring of U.
          age: int32 [P, G], tokens of the row in the cache with this one: the last that many.
        """
        rotation = jax.tree.map(lambda r: r[:, :, None], pick(layout.rotation, kind))
        q, k, v = self.project(x[:, :, None], rotation)
        new = _kv(k, v)
        put = jax.lax.dynamic_update_slice_in_dim
        cache = KV(put(cache.k, new.k, slot, axis=4), put(cache.v, new.v, slot, axis=3))
        length = cache.v.shape[3]
        back = (slot - jnp.arange(length)) % length
        own = (back < age[..., None]) & (back < kind.window)
        seen = layout.prompt_mask[:, None, None, None, None]
        position = layout.positions[:, :, None, None, None, None]
        seen = seen & self._near(position, layout.prompt_mask.shape[1], kind)
        out = self._attend(q, cache, own[:, :, None, None, None], (prefix, seen))
        return self.o_proj(out[:, :, 0]), cache

    def _attend(
        self, q: Array, own: KV, mask: Array, prefix: tuple[KV, Array] | None = None
    ) -> Array:
        c = self.config
        return attention(q, own, mask, prefix, c.attention_scale, c.attn_logit_softcapping)

    def _near(self, queries: Array, keys: int, kind: LayerKind) -> Array:
        """Whether keys 0 ... keys - 1 are within the window of queries [..., 1]."""
        if not self.config.sliding_window:
            return jnp.ones((), bool)
        return queries - jnp.arange(keys) < kind.window

    def _causal(self, length: int, kind: LayerKind) -> Array:
        """bool [T, T]: a query sees itself and what is before it, within the window."""
        near = self._near(jnp.arange(length)[:, None], length, kind)
        return jnp.tril(jnp.ones((length, length), bool)) & near


def _kv(k: Array, v: Array) -> KV:
    """k, v [..., S, K, H] in a cache's order."""
    return KV(jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2))


class MLP(nn.Module):
    """Gated feed-forward block."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float

    def setup(self) -> None:
        c = self.config

        def linear(features: int) -> Linear:
            return Linear(features, c.mlp_bias, self.dtype, self.lora_dropout)

        if c.fused_projections:
            self.gate_up_proj = linear(2 * c.intermediate_size)
        else:
            self.gate_proj = linear(c.intermediate_size)
            self.up_proj = linear(c.intermediate_size)
        self.down_proj = linear(c.hidden_size)

    def __call__(self, x: Array) -> Array:
        if self.config.fused_projections:
            gate, up = jnp.split(self.gate_up_proj(x), 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_ACTIVATIONS[self.config.hidden_act](gate) * up)


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    config: DecoderConfig
    dtype: DTypeLike
    lora_dropout: float = 0.0
    num_generations: int = 0
    return_kv: bool = False
    rows: jax.sharding.NamedSharding | None = None

    def setup(self) -> None:
        c = self.config

        def norm() -> RMSNorm:
            return RMSNorm(c.rms_norm_eps, c.norm_offset)

        self.input_layernorm = norm()
        self.self_attn = Attention(c, self.dtype, self.lora_dropout)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(c, self.dtype, self.lora_dropout)
        if c.post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()

    def __call__(self, x: Array, layout: Layout, kind: LayerKind) -> tuple[Array, KV | None]:
        normed = self.input_layernorm(x)
        out, kv = self.self_attn(normed, layout, kind, self.num_generations)
        x = spread(self._feed_forward(x, out), self.rows)
        return x, kv if self.return_kv else None

    def decode(
        self,
        x: Array,
        layout: Layout,
        kind: LayerKind,
        slot: Array,
        age: Array,
        cache: KV,
        prefix: KV,
    ) -> tuple[Array, KV]:
        """As Attention.decode: x [P, G, D] -> [P, G, D] and the cache with one more token."""
        normed = self.input_layernorm(x)
        out, cache = self.self_attn.decode(normed, layout, kind, slot, age, cache, prefix)
        return spread(self._feed_forward(x, out), self.rows), cache

    def _feed_forward(self, x: Array, attended: Array) -> Array:
        if self.config.post_norms:
            x = x + self.post_attention_layernorm(attended)
            out = self.mlp(self.pre_feedforward_layernorm(x))
            return x + self.post_feedforward_layernorm(out)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))
