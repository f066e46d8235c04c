"""The jitted functions of learning: one update step, for SFT and GRPO alike, and log-probs.

Which tree is trained is decided here and nowhere else: with LoRA the adapter is, and `frozen` is
the model it adapts, which is also the reference; without, the whole model is, and `frozen` is the
reference copy (or None when nothing needs one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import Lora
from grpo_jax.learn.logps import loss_of_tokens, token_logps
from grpo_jax.learn.objectives import Loss, Stats, token_weights, tokens_of
from grpo_jax.models import lora
from grpo_jax.models.decoder import Decoder, head
from grpo_jax.models.packing import Packing
from grpo_jax.structs import Array, TrainBatch, TrainState


def policy_variables(trained: dict, frozen: dict | None, cfg: Lora) -> dict:
    """What `Decoder.apply` takes for the policy."""
    if cfg.rank:
        return {"params": frozen, "lora": lora.scaled(trained, cfg)}
    return {"params": trained}


def init_state(trained: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; call it under jit to place it."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))


def batch_logps(
    model: Decoder,
    variables: dict,
    batch: TrainBatch,
    temperature: float,
    rngs: dict | None = None,
    slots: int | None = None,
) -> tuple[Array, Array]:
    """Log-probs and entropy, float32 [P, G, T], of the completions of a batch, 0 where masked."""
    hidden, packing = _hidden(model, variables, batch, rngs, slots)
    targets = _in_order(packing, (batch.ids, batch.mask))
    cap = model.config.final_logit_softcapping
    found = token_logps(hidden, head(variables["params"]), *targets, temperature, cap, model.rows)
    if packing is None:
        return found
    shape = batch.ids.shape
    logps, entropy = (packing.unpack_completions(jnp.asarray(x), shape) for x in found)
    return logps, entropy


def _hidden(
    model: Decoder, variables: dict, batch: TrainBatch, rngs: dict | None, slots: int | None
) -> tuple[Any, Packing | None]:
    """The states just before each completion token, [P, G, T, D] or, with slots, packed.

    Where there are too few slots nothing is a number, so that no step is made of a part.
    """
    lengths = jnp.asarray(batch.prompt_lengths)
    packing = None
    if slots is not None:
        places = batch.prompt_ids.shape[1]
        packing = Packing.of(lengths, places, jnp.asarray(batch.mask), slots, model.rows)
    arguments = (batch.prompt_ids, lengths, batch.ids, packing)
    hidden: Any = model.apply(variables, *arguments, rngs=rngs, method="predict")
    if packing is not None:
        hidden = jnp.where(packing.complete[:, None, None], hidden, jnp.nan)
    return hidden, packing


def _in_order(packing: Packing | None, arrays: Any) -> Any:
    """Arrays [P, G, T] in the order of `_hidden`."""
    return arrays if packing is None else jax.tree.map(packing.pack_completions, arrays)


def build_logps(model: Decoder, temperature: float, micro_batches: int = 1) -> Callable[..., Array]:
    """The jitted function logps(variables, batch, slots=None) -> float32 [P, G, T], no gradient.

    0 where the batch is masked; slots as for `build_update`.
    """

    def logps(variables: dict, batch: TrainBatch, slots: int | None = None) -> Array:
        def one(micro: TrainBatch) -> Array:
            return batch_logps(model, variables, micro, temperature, slots=slots)[0]

        if micro_batches == 1:
            return one(batch)
        out = jax.lax.map(one, _split(batch, micro_batches))
        return jnp.moveaxis(out, 0, 1).reshape(batch.ids.shape)

    return jax.jit(logps, static_argnames="slots")


def build_loss(
    model: Decoder, loss_of: Loss, cfg: Lora, temperature: float
) -> Callable[..., tuple[Array, Stats]]:
    """loss(trained, frozen, batch, weights, shares, key, slots=None) -> (float32 [], Stats).

    Not jitted.

    Args:
      model, loss_of, cfg, temperature: as for `build_update`.

    Returns:
      loss. `weights` and `shares` are float32 [P, G, T] of `token_weights`, and what they leave out
      costs nothing; `key` drives LoRA dropout, None: there is none; slots as for `build_update`.
    """

    def loss(
        trained: dict,
        frozen: dict | None,
        batch: TrainBatch,
        weights: Array,
        shares: Array,
        key: Array | None,
        slots: int | None = None,
    ) -> tuple[Array, Stats]:
        variables = policy_variables(trained, frozen, cfg)
        rngs = {"dropout": key} if cfg.rank and cfg.dropout and key is not None else None
        tokens = tokens_of(batch, weights, shares)
        if not loss_of.by_token:
            logps = batch_logps(model, variables, batch, temperature, rngs, slots)
            return loss_of.fn(*logps, tokens)
        hidden, packing = _hidden(model, variables, batch, rngs, slots)
        return loss_of_tokens(
            hidden,
            head(variables["params"]),
            *_in_order(packing, (batch.ids, tokens)),
            loss_of.fn,
            temperature,
            model.config.final_logit_softcapping,
            model.rows,
        )

    return loss


def build_update(
    model: Decoder,
    optimizer: optax.GradientTransformation,
    loss_of: Loss,
    cfg: Lora,
    *,
    loss_type: str = "dapo",
    max_completion_length: int = 1,
    temperature: float = 1.0,
    micro_batches: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """The jitted, donated update(state, frozen, batch, key, slots=None) -> (state, stats).

    Args:
      model: the decoder.
      optimizer: of `build_optimizer`; another one's state would keep what a bad step does to it.
      loss_of: of learn.objectives.
      cfg: LoRA settings; rank 0 trains the whole model.
      loss_type, max_completion_length: see `token_weights`.
      temperature: the log-probs' temperature, that of sampling.
      micro_batches: the batch's prompts are split into this many, and gradients accumulated.

    Returns:
      update. `state` is donated: the caller's is gone. `key` drives LoRA dropout. `slots` (of
      models.packing.slots_for) is how many of a micro-batch's tokens a device works on, None: on
      all, padding with them; it changes the time, and results only as rounding does. stats holds
      float32 scalars: loss, grad_norm, num_tokens, skipped and those of the loss function. If the
      loss or the gradient's norm is not finite, skipped is 1 and the new state is the old one, bit
      for bit. A parameter that its own step would make infinite (a huge learning rate) stays.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    gradient = jax.value_and_grad(build_loss(model, loss_of, cfg, temperature), has_aux=True)

    def update(
        state: TrainState,
        frozen: dict | None,
        batch: TrainBatch,
        key: Array,
        slots: int | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        batches = _split(batch, micro_batches)
        weights = token_weights(batches.mask, loss_type, max_completion_length)
        token_mean = token_weights(batches.mask, "dapo", max_completion_length)
        keys = jax.random.split(key, micro_batches)

        def accumulate(grads: dict, xs: tuple) -> tuple[dict, tuple[Array, Stats]]:
            out, new = gradient(state.params, frozen, *xs, slots)
            return jax.tree.map(jnp.add, grads, new), out

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
        xs = (batches, weights, token_mean, keys)
        if micro_batches == 1:
            (value, parts), grads = gradient(
                state.params, frozen, *jax.tree.map(lambda x: x[0], xs), slots
            )
        else:
            grads, (value, parts) = jax.lax.scan(accumulate, zeros, xs)
            value = jnp.sum(value)
            parts = Stats(jax.tree.map(jnp.sum, parts.means), jax.tree.map(jnp.max, parts.maxima))
        norm = optax.tree.norm(grads)
        fine = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, fine=fine)
        params = jax.tree.map(
            lambda new, before: jnp.where(fine & jnp.isfinite(new), new, before),
            optax.apply_updates(state.params, updates),
            state.params,
        )
        count = jnp.where(fine, state.step + 1, state.step)
        stats = {"loss": value, "grad_norm": norm, "skipped": 1.0 - fine.astype(jnp.float32)}
        stats |= {"num_tokens": jnp.sum(batch.mask).astype(jnp.float32)}
        stats |= parts.means | parts.maxima
        return TrainState(count, params, opt_state), stats

    return jax.jit(update, donate_argnums=0, static_argnames="slots")


def _split(batch: TrainBatch, parts: int) -> TrainBatch:
    """[P, ...] -> [parts, P / parts, ...] on every array.

    Micro-batch i takes prompts i, i + parts, ...: neighbours in the sharded axis then stay apart
    and every device works on every micro-batch.
    """
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
