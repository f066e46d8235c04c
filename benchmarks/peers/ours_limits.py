"""What holds grpo_jax back: memory by vocabulary, and the distance to the hardware's limits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import work as work_lib
from benchmarks.peers.protocol import Channel, peak_rss, reset_peak_rss
from grpo_jax import hub
from grpo_jax.config import GRPO, Lora, Optimizer, Sampling
from grpo_jax.learn.objectives import build_grpo_loss
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import build_logps, build_update, init_state
from grpo_jax.models.decoder import Decoder
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import TrainBatch, TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def memory(channel: Channel, spec: dict[str, Any]) -> None:
    """Compiles log-probs or update, says what XLA needs for it, and runs it in this process."""
    work = spec["work"]
    model, params = _load(spec, "float32", work["remat"])
    parameter_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
    batch = _batch(spec, work["prompts"])
    if work["part"] == "logps":
        compiled, arguments, again = _logps(model, params, batch)
    else:
        compiled, arguments, again = _update(model, params, batch, work)
    del params
    report = _analysis(compiled)
    report["parameter_bytes"] = parameter_bytes

    def run(_: int) -> dict[str, Any]:
        nonlocal arguments
        loaded = reset_peak_rss()  # importing and compiling are over, and not counted
        out = jax.block_until_ready(compiled(*arguments))
        arguments = again(out)
        return {**report, "rss_loaded": loaded, "rss_growth": peak_rss() - loaded}

    channel.ready(PACKAGES)
    channel.serve(run)


def _logps(model: Decoder, params: Any, batch: TrainBatch) -> tuple[Any, tuple, Callable]:
    arguments = ({"params": jax.tree.map(jnp.asarray, params)}, batch)
    logps: Any = build_logps(model, 1.0)
    compiled = logps.lower(*arguments).compile()
    return compiled, arguments, lambda out: arguments


def _update(
    model: Decoder, params: Any, batch: TrainBatch, work: dict
) -> tuple[Any, tuple, Callable]:
    cfg = GRPO(beta=work["beta"])
    optimizer = build_optimizer(Optimizer(), 1)
    update: Any = build_update(model, optimizer, build_grpo_loss(cfg, on_policy=True), Lora())
    state = _state(params, optimizer)
    key = jax.random.key(0)
    # The reference's weights are an argument of the loop, not of the update.
    compiled = update.lower(state, None, batch, key).compile()
    return compiled, (state, None, batch, key), lambda out: (out[0], None, batch, key)


def _state(params: Any, optimizer: Any) -> TrainState:
    own = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    return jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(own)


def _analysis(compiled: Any) -> dict[str, int]:
    """XLA's own account, in bytes."""
    found = compiled.memory_analysis()
    return {
        "temporary_bytes": int(found.temp_size_in_bytes),
        "argument_bytes": int(found.argument_size_in_bytes),
        "output_bytes": int(found.output_size_in_bytes),
    }


def limits(channel: Channel, spec: dict[str, Any]) -> None:
    """Decode's share of the memory bandwidth and the update's share of the arithmetic peak."""
    work = spec["work"]
    shape = work_lib.Shape(**spec["shape"])
    model, params = _load(spec, "float32", work["remat"])
    own = {"params": jax.tree.map(lambda x: jnp.asarray(x, spec["dtype"]), params)}
    optimizer = build_optimizer(Optimizer(), 1)
    loss = build_grpo_loss(GRPO(beta=0.0), on_policy=True)
    update = build_update(model, optimizer, loss, Lora())
    T, G = work["max_new_tokens"], work["generations"]
    samplers = {n: build_sampler(model, Sampling(), n, tuple(spec["stops"])) for n in (1, T)}

    def sampled(prompts: int, tokens: int) -> float:
        batch = _batch(spec, prompts)
        ids, lengths = batch.prompt_ids, batch.prompt_lengths
        return _seconds(
            lambda: samplers[tokens](own, ids, lengths, jax.random.key(0), num_generations=G)
        )

    def decode(prompts: int, bandwidth: float) -> dict[str, float]:
        seconds = sampled(prompts, T) - sampled(prompts, 1)
        read = _decode_bytes(shape, prompts, work, jnp.dtype(spec["dtype"]).itemsize)
        return {
            "decode_seconds": seconds,
            "tokens_per_second": prompts * G * (T - 1) / seconds,
            "decode_bytes_per_second": read / seconds,
            "bandwidth_fraction": read / seconds / bandwidth,
        }

    def updated(prompts: int, peak: float) -> dict[str, float]:
        state = _state(params, optimizer)
        batch = _batch(spec, prompts)._replace(ref_logps=None)  # beta is 0

        def once() -> Any:
            nonlocal state
            state, stats = update(state, None, batch, jax.random.key(0))
            return stats, state

        seconds = _seconds(once)
        flops = _update_flops(shape, prompts, work)
        return {
            "update_seconds": seconds,
            "update_flops_per_second": flops / seconds,
            "flops_fraction": flops / seconds / peak,
        }

    def run(_: int) -> dict[str, Any]:
        bandwidth = _bandwidth(work["copy_bytes"])
        peak = _matmul_peak(work["matmul"], spec["dtype"])
        batches = {}
        for prompts in work["prompts"]:
            batches[prompts * G] = decode(prompts, bandwidth) | updated(prompts, peak)
        return {
            "bandwidth": bandwidth,
            "peak_flops": peak,
            "batches": batches,
            "bandwidth_fraction": max(b["bandwidth_fraction"] for b in batches.values()),
            "flops_fraction": max(b["flops_fraction"] for b in batches.values()),
        }

    channel.ready(PACKAGES)
    channel.serve(run)


def _decode_bytes(shape: work_lib.Shape, prompts: int, work: dict, size: int) -> float:
    """Bytes that T - 1 decode steps must read: weights and head, prompt cache, own caches.

    The prompt's keys and values count once a group and a row's own grow by a token a step. The
    embedding's rows, activations and what is written are left out.
    """
    T, G, S = work["max_new_tokens"], work["generations"], work["prompt_length"]
    weights = shape.matrices() + shape.vocab * shape.hidden
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim
    cached = prompts * S * (T - 1) + prompts * G * (T - 1) * T / 2
    return size * (weights * (T - 1) + token * cached)


def _update_flops(shape: work_lib.Shape, prompts: int, work: dict) -> float:
    """Model FLOPs of one update: forward 2 and backward 4 a weight and token, recomputation not.

    A prompt counts once a group, as it is computed; the head counts completions only.
    """
    T, G, S = work["max_new_tokens"], work["generations"], work["prompt_length"]
    tokens = prompts * (S + G * (T - 1))
    pairs = prompts * (S * (S + 1) / 2 + G * (T - 1) * (S + T / 2))
    attention = 4 * shape.layers * shape.heads * shape.head_dim * pairs
    head = 2 * shape.vocab * shape.hidden * prompts * G * T
    return 3 * (2 * shape.matrices() * tokens + attention + head)


def _bandwidth(size: int) -> float:
    """Bytes a second that a large array is read and written with, in place.

    In place, because a CPU's time with fresh memory goes into getting its pages, not into moving
    numbers: a seventh of this on a 2-core machine.
    """
    x = jnp.zeros(size // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1.0, donate_argnums=0)

    def once() -> jax.Array:
        nonlocal x
        x = add(x)
        return x

    return 2 * size / _seconds(once, 10)


def _matmul_peak(n: int, dtype: str) -> float:
    """FLOPs a second of a large square matrix product."""
    x = jnp.ones((n, n), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * n**3 / _seconds(lambda: product(x), 10)


def _seconds(fn: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of some runs, after one that compiles."""
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - start)
    return min(times)


def _load(spec: dict[str, Any], param_dtype: str, remat: bool) -> tuple[Decoder, Any]:
    policy = hub.load_decoder(spec["folder"], dtype=spec["dtype"], param_dtype=param_dtype)
    model = Decoder(policy.config, jnp.dtype(spec["dtype"]), remat=remat)
    return model, jax.tree.map(np.asarray, policy.params)


def _batch(spec: dict[str, Any], prompts: int) -> TrainBatch:
    """Random full-length completions of random prompts."""
    work = spec["work"]
    G, T, S = work["generations"], work["max_new_tokens"], work["prompt_length"]
    draw = np.random.default_rng(0)
    vocab = spec["shape"]["vocab"]
    ids = draw.integers(work_lib.FIRST_WORD, vocab, (prompts, G, T), np.int32)
    return TrainBatch(
        prompt_ids=draw.integers(work_lib.FIRST_WORD, vocab, (prompts, S), np.int32),
        prompt_lengths=np.full(prompts, S, np.int32),
        ids=ids,
        mask=np.ones(ids.shape, bool),
        advantages=draw.normal(size=(prompts, G)).astype(np.float32),
        ref_logps=np.full(ids.shape, -np.log(vocab), np.float32),
    )
