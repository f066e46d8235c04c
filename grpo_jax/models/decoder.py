"""The causal language model: one decoder for all families, switched by its configuration.

In: token ids padded on the right. Out: float hidden states after the final norm; `logits` and
`head` turn them into scores. Parameters are a nested dict whose paths keep Hugging Face's words,
with the leaves of `layers` stacked [L, ...] for the scan.
"""

from __future__ import annotations

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grpo_jax.models.block import DecoderConfig, DecoderLayer, Layout, all_rotations
from grpo_jax.models.layers import KV, Array, Embed, RMSNorm, crosswise, softcap, spread
from grpo_jax.models.packing import Packing

__all__ = ["Decoder", "DecoderConfig", "head", "logits", "scale_embedding"]


# What a recomputed layer keeps beside its input.
POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class Decoder(nn.Module):
    """The whole model. `dtype` is the compute dtype; parameters keep the dtype they are given."""

    config: DecoderConfig
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    remat_policy: str = "full"  # or dots: keep the linear layers' products
    lora_dropout: float = 0.0
    rows: jax.sharding.NamedSharding | None = None  # how a batch's rows are split over devices

    @nn.compact
    def forward(
        self,
        ids: Array,
        positions: Array,
        prompt_mask: Array,
        num_generations: int,
        return_kv: bool,
        packing: Packing | None = None,
    ) -> tuple[Array, KV | None]:
        """Ids [P, X], prompts with their completions -> hidden [P, X, D] or, packed, [B, N, D].

        If asked, the prompts' KV [L, P, K, S, H] too.
        """
        c = self.config
        seen = positions
        if packing is not None:
            ids, seen = packing.pack(ids), packing.pack(positions)
        embed = Embed(c.vocab_size, c.hidden_size, self.dtype, name="embed_tokens")
        x = spread(embed(ids), crosswise(self.rows))
        x = spread(scale_embedding(c, x), self.rows)
        layout = Layout(positions, prompt_mask, all_rotations(c, seen), packing)
        kinds = jax.tree.map(lambda *kind: jnp.stack(kind), *c.layer_kinds())
        layer = DecoderLayer
        if self.remat:
            layer = nn.remat(layer, prevent_cse=False, policy=POLICIES[self.remat_policy])
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
        )
        arguments = (c, self.dtype, self.lora_dropout, num_generations, return_kv, self.rows)
        x, kv = layers(*arguments, name="layers")(x, layout, kinds)
        x = RMSNorm(c.rms_norm_eps, c.norm_offset, name="norm")(x)
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

    def predict(
        self,
        prompt_ids: Array,
        prompt_lengths: Array,
        ids: Array,
        packing: Packing | None = None,
    ) -> Array:
        """The hidden states that predict each completion token, G completions to a prompt.

        A completion's row begins with the prompt's last token, so that each of its states predicts
        one of its own tokens; the prompt's tokens before that are shared.

        Args:
          prompt_ids: int32 [P, S], padded on the right.
          prompt_lengths: int32 [P], at least 1.
          ids: int32 [P, G, T] completions, padded on the right.
          packing: of these prompts and completions; None: padding is computed too.

        Returns:
          [P, G, T, D]: entry t is the state just before token t. With a packing [B, N, D], the same
          in its order (`Packing.pack_completions`).
        """
        P, S = prompt_ids.shape
        _, G, T = ids.shape
        chex.assert_shape(prompt_lengths, (P,))
        positions, prompt_mask = _prompt_layout(prompt_ids, prompt_lengths - 1)
        own = (prompt_lengths - 1)[:, None, None] + jnp.arange(T)
        own = jnp.broadcast_to(own, (P, G, T)).reshape(P, -1)
        positions = jnp.concatenate([positions, own], axis=1)
        last = jnp.broadcast_to(_at(prompt_ids, prompt_lengths - 1)[:, None, None], (P, G, 1))
        read = jnp.concatenate([last, ids[:, :, :-1]], axis=2)
        row = jnp.concatenate([prompt_ids, read.reshape(P, -1)], axis=1)
        hidden, _ = self.forward(row, positions, prompt_mask, G, False, packing)
        if packing is not None:
            return hidden
        return hidden[:, S:].reshape(P, G, T, hidden.shape[-1])


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
    """x [P, S, ...], index [P] -> x[p, index[p]] as [P, ...]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def scale_embedding(config: DecoderConfig, x: Array) -> Array:
    """Embedded tokens as the first layer wants them."""
    scale = config.embedding_scale
    return x if scale == 1.0 else x * jnp.asarray(scale, x.dtype)


def head(params: dict) -> Array:
    """The output matrix [D, V]: the untied kernel, or the embedding transposed."""
    if "lm_head" in params:
        return params["lm_head"]["kernel"]
    return params["embed_tokens"]["embedding"].T


def logits(config: DecoderConfig, params: dict, hidden: Array) -> Array:
    """Hidden [..., D] -> float32 [..., V]. For long sequences use learn.logps, which chunks."""
    kernel = head(params).astype(hidden.dtype)
    scores = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    return softcap(scores, config.final_logit_softcapping)
