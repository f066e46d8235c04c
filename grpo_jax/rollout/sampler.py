"""The sampler: prefill each prompt once, then decode its G completions in one lax.while_loop.

In: parameters, P prompts, a key. Out: a Rollout with tokens, masks and log-probs, all on device.
The prompt's keys and values are kept once and shared by the group; each completion has its own
small cache, which the loop carries and XLA updates in place. Layers are unrolled in the loop and
their parameters sliced, cast and (LoRA) merged once before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from grpo_jax.config import Sampling
from grpo_jax.models import lora
from grpo_jax.models.block import DecoderLayer, Layout, all_rotations
from grpo_jax.models.decoder import Decoder, head, scale_embedding
from grpo_jax.models.layers import KV, RMSNorm, softcap
from grpo_jax.rollout.draw import draw
from grpo_jax.structs import Array, Rollout


class SamplingState(NamedTuple):
    """Carry of the decode loop. `t` tokens of each row have been drawn."""

    t: Array  # int32 []
    ids: Array  # int32 [P, G, T]
    mask: Array  # bool [P, G, T]
    logps: Array  # float32 [P, G, T]
    done: Array  # bool [P, G]
    caches: list[KV]  # L times [P, G, K, T - 1, H]


def build_sampler(
    model: Decoder,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    sharding: jax.sharding.Sharding | None = None,
) -> Callable[..., Rollout]:
    """The jitted function sample(variables, prompt_ids, prompt_lengths, key, num_generations).

    Args:
      model: the decoder; its dtype is the compute dtype.
      sampling: temperature and truncations.
      max_new_tokens: T; a completion that has not ended by then is cut off.
      eos_ids: a row ends with the first token that is one of these; it belongs to the completion.
      sharding: where parameters are gathered before the loop; None leaves them as they come.

    Returns:
      sample(variables, prompt_ids int32 [P, S], prompt_lengths int32 [P], key, num_generations=G)
      -> Rollout. variables is {"params": ...} or {"params": ..., "lora": scaled adapter}. The
      same key gives the same draws however the batch is sharded.
    """
    stops = jnp.asarray(eos_ids, jnp.int32)

    def sample(
        variables: dict, prompt_ids: Array, prompt_lengths: Array, key: Array, num_generations: int
    ) -> Rollout:
        params = _prepare(model, variables, sharding)
        P, S = prompt_ids.shape
        G, T = num_generations, max_new_tokens
        prompt_mask = jnp.arange(S) < prompt_lengths[:, None]
        output = head(params)
        hidden, prefix = cast(
            tuple[Array, KV],
            model.apply({"params": params}, prompt_ids, prompt_lengths, method="prefill"),
        )
        step = _build_step(model, params, prefix, prompt_lengths, prompt_mask)

        def append(state: SamplingState, hidden: Array) -> SamplingState:
            """Draw token t of every row from the states [P, G, D] just before it."""
            scores = jnp.matmul(hidden, output, preferred_element_type=jnp.float32)
            scores = softcap(scores, model.config.final_logit_softcapping)
            uniforms = jax.random.uniform(jax.random.fold_in(key, state.t), (P, G, 2))
            flat = scores.reshape(P * G, -1)
            token, logp = draw(flat, uniforms.reshape(P * G, 2), sampling)
            token, logp = token.reshape(P, G), logp.reshape(P, G)
            alive = ~state.done

            def write(buffer: Array, new: Array) -> Array:
                new = jnp.where(alive, new, jnp.zeros_like(new))
                return jax.lax.dynamic_update_index_in_dim(buffer, new, state.t, axis=2)

            return SamplingState(
                t=state.t + 1,
                ids=write(state.ids, token),
                mask=write(state.mask, alive),
                logps=write(state.logps, logp),
                done=state.done | jnp.isin(token, stops),
                caches=state.caches,
            )

        def body(state: SamplingState) -> SamplingState:
            token = jax.lax.dynamic_index_in_dim(state.ids, state.t - 1, axis=2, keepdims=False)
            hidden, caches = step(token, state.t - 1, state.caches)
            return append(state._replace(caches=caches), hidden)

        c = model.config
        blank = jnp.zeros((P, G, c.num_kv_heads, max(T - 1, 1), c.head_dim), model.dtype)
        state = SamplingState(
            t=jnp.zeros((), jnp.int32),
            ids=jnp.zeros((P, G, T), jnp.int32),
            mask=jnp.zeros((P, G, T), bool),
            logps=jnp.zeros((P, G, T), jnp.float32),
            done=jnp.zeros((P, G), bool),
            caches=[KV(blank, blank) for _ in range(c.num_layers)],
        )
        state = append(state, jnp.broadcast_to(hidden[:, None], (P, G, hidden.shape[-1])))
        state = jax.lax.while_loop(lambda s: (s.t < T) & ~jnp.all(s.done), body, state)
        return Rollout(ids=state.ids, mask=state.mask, logps=state.logps, ended=state.done)

    return jax.jit(sample, static_argnames="num_generations")


def _prepare(model: Decoder, variables: dict, sharding: jax.sharding.Sharding | None) -> dict:
    """Merged parameters in the compute dtype, gathered once."""
    params = variables["params"]
    if "lora" in variables:
        params = lora.merge(params, variables["lora"])
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    if sharding is not None:
        params = jax.lax.with_sharding_constraint(params, sharding)
    return params


def _build_step(
    model: Decoder, params: dict, prefix: KV, prompt_lengths: Array, prompt_mask: jax.Array
) -> Callable[[Array, Array, list[KV]], tuple[Array, list[KV]]]:
    """step(tokens [P, G], slot, caches) -> hidden [P, G, D] after the final norm, caches."""
    c = model.config
    layer = DecoderLayer(c, model.dtype)
    norm = RMSNorm(c.rms_norm_eps, c.norm_offset)
    kinds = c.layer_kinds()
    per_layer = [
        jax.tree.map(lambda x, i=i: x[i], (params["layers"], prefix)) for i in range(c.num_layers)
    ]

    def step(tokens: Array, slot: Array, caches: list[KV]) -> tuple[Array, list[KV]]:
        x = scale_embedding(c, params["embed_tokens"]["embedding"][tokens])
        positions = jnp.broadcast_to(prompt_lengths[:, None] + slot, tokens.shape)
        layout = Layout(positions, prompt_mask, all_rotations(c, positions))
        updated = []
        for (layer_params, layer_prefix), kind, cache in zip(per_layer, kinds, caches, strict=True):
            arguments = (x, layout, kind, slot, cache, layer_prefix)
            out: Any = layer.apply({"params": layer_params}, *arguments, method="decode")
            x, cache = out
            updated.append(cache)
        hidden: Any = norm.apply({"params": params["norm"]}, x)
        return hidden, updated

    return step
