"""The sampler: prefill each prompt once, then decode its G completions in one lax.while_loop.

In: parameters, P prompts, a key. Out: a Rollout with tokens, masks and log-probs, all on device.
The prompt's keys and values are kept once and shared by the group. A prompt has W <= G lanes, each
with a small cache that the loop carries and XLA updates in place; a lane whose completion has ended
takes the prompt's next one, so that short completions do not wait for long ones. The draws belong
to the completions, not to the lanes: W changes the time and the memory, not what is sampled.
Every token reads the whole cache, so a cache begins small and is doubled when it is full: one loop
after another, each compiled for its size.
Layers are unrolled in the loop and their parameters sliced, cast and (LoRA) merged once before it,
and on a CPU transposed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from grpo_jax.config import Sampling
from grpo_jax.models import lora
from grpo_jax.models.block import DecoderLayer, Layout, all_rotations
from grpo_jax.models.decoder import Decoder, head, scale_embedding
from grpo_jax.models.layers import KV, RMSNorm, matmul_few, softcap, spread
from grpo_jax.rollout.draw import draw_apart
from grpo_jax.structs import Array, Rollout

WIDE = 512  # hidden_size from which a CPU is faster with transposed kernels
LEAST = 64  # tokens that a lane's cache begins with room for


class SamplingState(NamedTuple):
    """Carry of the decode loop, for P prompts with W lanes each."""

    steps: Array  # int32 [], draws made by every lane so far
    sample: Array  # int32 [P, W], the completion that a lane is at; G when none is left for it
    age: Array  # int32 [P, W], tokens drawn of it
    token: Array  # int32 [P, W], the last of them
    started: Array  # int32 [P], completions that a lane has taken
    ids: Array  # int32 [P, G, T]
    logps: Array  # float32 [P, G, T]
    lengths: Array  # int32 [P, G]
    ended: Array  # bool [P, G], the last token is a stop
    caches: list[KV]  # L times [P, W, ...], rings that all lanes write at one place


def build_sampler(
    model: Decoder,
    sampling: Sampling,
    max_new_tokens: int,
    eos_ids: tuple[int, ...],
    gathered: Callable[[dict], Any] | None = None,
    lanes: int = 0,
) -> Callable[..., Rollout]:
    """The jitted function sample(variables, prompt_ids, prompt_lengths, key, num_generations).

    Args:
      model: the decoder; its dtype is the compute dtype.
      sampling: temperature and truncations.
      max_new_tokens: T; a completion that has not ended by then is cut off.
      eos_ids: a row ends with the first token that is one of these; it belongs to the completion.
      gathered: gives the shardings that parameters are brought to before the loop; None leaves
        them as they come.
      lanes: W, completions of a prompt that are drawn at one time; 0 draws all G at once.

    Returns:
      sample(variables, prompt_ids int32 [P, S], prompt_lengths int32 [P], key, num_generations=G)
      -> Rollout. variables is {"params": ...} or {"params": ..., "lora": scaled adapter}. The
      same key gives the same draws however the batch is sharded and however many lanes there are.
    """
    stops = jnp.asarray(eos_ids, jnp.int32)

    def sample(
        variables: dict, prompt_ids: Array, prompt_lengths: Array, key: Array, num_generations: int
    ) -> Rollout:
        params = _prepare(model, variables, gathered)
        P, S = prompt_ids.shape
        G, T = num_generations, max_new_tokens
        W = min(lanes or G, G)
        prompt_mask = jnp.arange(S) < prompt_lengths[:, None]
        multiply = _build_head(model, params)
        last, prefix = cast(
            tuple[Array, KV],
            model.apply({"params": params}, prompt_ids, prompt_lengths, method="prefill"),
        )
        first = jnp.broadcast_to(last[:, None], (P, W, last.shape[-1]))
        step = _build_step(model, params, prefix, prompt_lengths, prompt_mask, T)
        uniforms = jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t), (P, G, 2)))
        draws = jnp.moveaxis(uniforms(jnp.arange(T)), 0, 2)  # [P, G, T, 2]

        def append(state: SamplingState, hidden: jax.Array) -> SamplingState:
            """Draw each lane's next token from the state [P, W, D] just before it."""
            scores = softcap(multiply(hidden), model.config.final_logit_softcapping)
            chances = jax.vmap(lambda u, *at: u[at])(draws, state.sample, state.age)
            flat = scores.reshape(P * W, -1)
            token, logp = draw_apart(flat, chances.reshape(P * W, 2), sampling, model.rows)
            token, logp = token.reshape(P, W), logp.reshape(P, W)
            stopped = jnp.isin(token, stops)
            age = state.age + 1
            done = (state.sample < G) & (stopped | (age == T))
            following = state.started[:, None] + jnp.cumsum(done, axis=1) - 1
            return SamplingState(
                steps=state.steps + 1,
                sample=jnp.where(done, jnp.minimum(following, G), state.sample),
                age=jnp.where(done, 0, age),
                token=token,
                started=state.started + jnp.sum(done, axis=1),
                ids=_write(state.ids, token, state.sample, state.age),
                logps=_write(state.logps, logp, state.sample, state.age),
                lengths=_write(state.lengths, age, state.sample),
                ended=_write(state.ended, stopped, state.sample),
                caches=state.caches,
            )

        def body(state: SamplingState) -> SamplingState:
            hidden, caches = step(state)
            hidden = jnp.where((state.age == 0)[..., None], first, hidden)
            return append(state._replace(caches=caches), hidden)

        def going_on(state: SamplingState, size: int) -> jax.Array:
            """Whether there is work left, and room in the caches; the last ones are rings."""
            room = (state.steps <= size) | (size == sizes[-1])
            return jnp.logical_and(room, jnp.any(state.sample < G))

        c = model.config
        sizes = cache_sizes(T)
        values = jnp.zeros((P, W, c.num_kv_heads, sizes[0], c.head_dim), model.dtype)
        values = spread(values, model.rows)
        blank = KV(jnp.swapaxes(values, -1, -2), values)
        zeros = jnp.zeros((P, W), jnp.int32)
        state = SamplingState(
            steps=jnp.zeros((), jnp.int32),
            sample=zeros + jnp.arange(W),
            age=zeros,
            token=zeros,
            started=jnp.full(P, W),
            ids=jnp.zeros((P, G, T), jnp.int32),
            logps=jnp.zeros((P, G, T), jnp.float32),
            lengths=jnp.zeros((P, G), jnp.int32),
            ended=jnp.zeros((P, G), bool),
            caches=[blank for _ in range(c.num_layers)],
        )
        state = append(state, first)
        for size in sizes:
            state = state._replace(caches=[_grown(cache, size) for cache in state.caches])
            state = jax.lax.while_loop(functools.partial(going_on, size=size), body, state)
        mask = jnp.arange(T) < state.lengths[..., None]
        return Rollout(ids=state.ids, mask=mask, logps=state.logps, ended=state.ended)

    return jax.jit(sample, static_argnames="num_generations")


def cache_sizes(max_new_tokens: int) -> list[int]:
    """How many tokens the lanes' caches have room for, one after another.

    The last token of a completion is never read. None is less than half as large again as the one
    before, which would save little and take a program.
    """
    last = max(max_new_tokens - 1, 1)
    size, sizes = LEAST, []
    while 3 * size <= 2 * last:
        sizes.append(size)
        size *= 2
    return [*sizes, last]


def _grown(cache: KV, size: int) -> KV:
    """The cache with room for `size` tokens."""
    more = (0, size - cache.v.shape[3])
    keep = [(0, 0)] * 3
    return KV(jnp.pad(cache.k, [*keep, (0, 0), more]), jnp.pad(cache.v, [*keep, more, (0, 0)]))


def _write(buffer: Array, values: Array, *at: Array) -> Array:
    """buffer[p, at[p, w]] = values[p, w] for each prompt and lane; lanes without work write none.

    Args:
      buffer: [P, G, ...].
      values: [P, W].
      at: int32 [P, W], one for each axis of the buffer behind the first.
    """
    write = jax.vmap(lambda row, value, *at: row.at[at].set(value, mode="drop"))
    return write(buffer, values, *at)


def _prepare(model: Decoder, variables: dict, gathered: Callable[[dict], Any] | None) -> dict:
    """Merged parameters in the compute dtype, gathered once."""
    params = variables["params"]
    if "lora" in variables:
        params = lora.merge(params, variables["lora"])
    params = jax.tree.map(lambda x: x.astype(model.dtype), params)
    if gathered is not None:
        params = jax.lax.with_sharding_constraint(params, gathered(params))
    return params


def _on_one_cpu(model: Decoder) -> bool:
    return model.rows is None and jax.default_backend() == "cpu"


def _build_head(model: Decoder, params: dict) -> Callable[[jax.Array], jax.Array]:
    """hidden [..., D] -> scores float32 [..., V]."""
    output = head(params)
    if _on_one_cpu(model):  # a tied embedding is the transposed matrix as it lies
        return lambda hidden: matmul_few(hidden, output.T, jnp.float32)
    return lambda hidden: jnp.matmul(hidden, output, preferred_element_type=jnp.float32)


def _transposed(tree: dict) -> dict:
    """The parameters of a layer with "transposed" for each "kernel"."""
    out: dict[str, Any] = {
        name: _transposed(x) if isinstance(x, dict) else x for name, x in tree.items()
    }
    if "kernel" in out:
        out["transposed"] = out.pop("kernel").T
    return out


def _build_step(
    model: Decoder,
    params: dict,
    prefix: KV,
    prompt_lengths: Array,
    prompt_mask: jax.Array,
    max_new_tokens: int,
) -> Callable[[SamplingState], tuple[Array, list[KV]]]:
    """step(state) -> hidden [P, W, D] after the final norm, from the lanes' last tokens; caches."""
    c = model.config
    layer = DecoderLayer(c, model.dtype, rows=model.rows)
    norm = RMSNorm(c.rms_norm_eps, c.norm_offset)
    kinds = c.layer_kinds()
    # Looked up, for XLA would compute the cosines in every layer again, and for every head.
    turns = all_rotations(c, jnp.arange(prompt_mask.shape[1] + max_new_tokens))
    per_layer = [
        jax.tree.map(lambda x, i=i: x[i], (params["layers"], prefix)) for i in range(c.num_layers)
    ]
    if _on_one_cpu(model) and c.hidden_size >= WIDE:
        per_layer = [(_transposed(layer_params), kv) for layer_params, kv in per_layer]

    def step(state: SamplingState) -> tuple[Array, list[KV]]:
        x = spread(scale_embedding(c, params["embed_tokens"]["embedding"][state.token]), model.rows)
        positions = jnp.asarray(prompt_lengths)[:, None] + jnp.maximum(state.age - 1, 0)
        layout = Layout(positions, prompt_mask, jax.tree.map(lambda x: x[:, positions], turns))
        slot = (state.steps - 1) % state.caches[0].v.shape[3]
        updated = []
        layers = zip(per_layer, kinds, state.caches, strict=True)
        for (layer_params, layer_prefix), kind, cache in layers:
            arguments = (x, layout, kind, slot, state.age, cache, layer_prefix)
            out: Any = layer.apply({"params": layer_params}, *arguments, method="decode")
            x, cache = out
            updated.append(cache)
        hidden: Any = norm.apply({"params": params["norm"]}, x)
        return hidden, updated

    return step
