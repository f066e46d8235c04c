"""grpo_jax on every task, through the functions that the training stages call.

The program's name picks how rows are arranged: "ours" as the package does it best; in sampling
"ours-fixed" all rows in one batch, "ours-batches" in batches of the rows that "ours" holds at a
time; in steps "ours-padded" trains on the padding too.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import ours_limits
from benchmarks.peers.protocol import Channel, jax_device_peak, text_stats
from benchmarks.work import rewards
from grpo_jax import hub
from grpo_jax.config import GRPO, Lora, Optimizer, Reward, Sampling
from grpo_jax.data.batches import bucket
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import init_state
from grpo_jax.models.decoder import Decoder
from grpo_jax.models.packing import slots_for, tokens_of
from grpo_jax.rewards.scorer import Scorer
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.stages.generation import completion_ids
from grpo_jax.stages.programs import build_programs, train_batch
from grpo_jax.stages.weights import frozen_copy
from grpo_jax.structs import Row
from grpo_jax.text.language import LanguageGate
from grpo_jax.text.tokenizer import Tokenizer

PACKAGES = ("jax", "jaxlib", "flax", "optax")
ROWS = 32  # that "ours-batches" samples at a time


class Loaded(NamedTuple):
    """A model folder, its parameters still on the host."""

    model: Decoder
    params: Any
    tokenizer: Tokenizer
    check: float


def load(spec: dict[str, Any], param_dtype: str) -> Loaded:
    """Reads spec's folder; activations are in spec's dtype."""
    policy = hub.load_decoder(spec["folder"], dtype=spec["dtype"], param_dtype=param_dtype)
    model = Decoder(policy.config, jnp.dtype(spec["dtype"]))
    ids = np.asarray(spec["prompt_ids"], np.int32)
    logps = jax.nn.log_softmax(policy.logits(ids)[:, :-1])
    check = float(jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1).mean())
    return Loaded(model, jax.tree.map(np.asarray, policy.params), policy.tokenizer, check)


def on_device(params: Any) -> Any:
    """A copy of its own on the device: donated buffers must not alias anything."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)


def encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 [P, S] and lengths int32 [P]."""
    rows = [tokenizer.encode_prompt(text, chat=False) for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, np.asarray([len(row) for row in rows], np.int32)


def sampling(channel: Channel, spec: dict[str, Any]) -> None:
    """Texts in, texts out."""
    work = spec["work"]
    policy = load(spec, param_dtype=spec["dtype"])
    params = {"params": on_device(policy.params)}
    warp = Sampling(temperature=work["temperature"], top_p=work["top_p"])
    G = work["generations"]
    prompts = work["prompts"]
    varying = work["mean_length"] > 0 and spec["program"] == "ours"
    lanes = max(1, G // 4) if varying else 0
    limit, stops = work["max_new_tokens"], tuple(spec["stops"])
    sample = build_sampler(policy.model, warp, limit, stops, lanes=lanes)
    at_once = max(1, ROWS // G) if spec["program"] == "ours-batches" else prompts

    def run(index: int) -> dict[str, Any]:
        ids, lengths = encode(policy.tokenizer, spec["prompts"])
        tokens: list[list[int]] = []
        for start in range(0, prompts, at_once):
            part = slice(start, start + at_once)
            key = jax.random.fold_in(jax.random.key(index), start)
            rollout = sample(params, ids[part], lengths[part], key, num_generations=G)
            tokens += completion_ids(jax.device_get(rollout))
        policy.tokenizer.decode(tokens)
        return text_stats([len(row) for row in tokens])

    channel.ready(PACKAGES, check=policy.check)
    channel.serve(run)


def step(channel: Channel, spec: dict[str, Any]) -> None:
    """Whole GRPO steps: the programs of stages/grpo.py, in its order."""
    work = spec["work"]
    policy = load(spec, "float32")
    model = policy.model.clone(remat=work["remat"], remat_policy=work["remat_policy"])
    G, T = work["generations"], work["max_new_tokens"]
    cfg = GRPO(
        num_generations=G,
        beta=work["beta"],
        loss_type=work["loss_type"],
        gradient_accumulation_steps=work["micro_batches"],
        sampling=Sampling(temperature=work["temperature"]),
        optimizer=Optimizer(
            learning_rate=work["learning_rate"], max_grad_norm=work["max_grad_norm"]
        ),
    )
    optimizer = build_optimizer(cfg.optimizer, 1)
    sample, reference_logps, update = build_programs(
        cfg, Lora(), model, optimizer, T, tuple(spec["stops"])
    )
    frozen = frozen_copy(policy.params, policy.model.dtype)
    state = jax.jit(lambda p: init_state(p, optimizer), donate_argnums=0)(on_device(policy.params))
    prompts, tokenizer, check = spec["prompts"], policy.tokenizer, policy.check
    del policy

    def run(index: int) -> dict[str, Any]:
        nonlocal state
        clock = [time.perf_counter()]
        sample_key, update_key = jax.random.split(jax.random.key(index))
        ids, lengths = encode(tokenizer, prompts)
        rollout = sample({"params": state.params}, ids, lengths, sample_key, num_generations=G)
        local = jax.device_get(rollout)
        clock.append(time.perf_counter())
        width = bucket(int(local.mask.sum(-1).max()), T)
        batch = train_batch(cfg, ids, lengths, rollout, width)
        slots = None
        if spec["program"] != "ours-padded":
            trained = tokens_of(lengths, local.mask.sum((1, 2)))
            slots = slots_for(trained, ids.shape[1] + G * width, work["micro_batches"], 1)
        batch = batch._replace(ref_logps=reference_logps({"params": frozen}, batch, slots))
        tokens = completion_ids(local)
        totals = np.asarray(rewards(tokenizer.decode(tokens)), np.float32).reshape(-1, G)
        scored = advantages(totals, {}, cfg.advantage, cfg.scale_rewards)
        batch = batch._replace(advantages=scored)
        clock.append(time.perf_counter())
        state, stats = update(state, frozen, batch, update_key, slots)
        stats = jax.device_get(stats)
        jax.block_until_ready(state)
        clock.append(time.perf_counter())
        phases = dict(zip(("sample", "score", "update"), np.diff(clock).tolist(), strict=True))
        return text_stats([len(row) for row in tokens]) | {
            "phases": phases,
            "reward": float(totals.mean()),
            "kl": float(stats["kl"]),
        }

    channel.ready(PACKAGES, check=check)
    channel.serve(run)


def encoding(channel: Channel, spec: dict[str, Any]) -> None:
    """The semantic reward with cached references, language gate and all."""
    work = spec["work"]
    encoder = hub.load_encoder(
        Path(spec["folder"]), dtype=spec["dtype"], batch_size=work["batch_size"]
    )
    texts, references = spec["texts"], spec["references"]
    rows = [Row(source="", target=text, group="") for text in references]
    cfg = Reward(tau=0.0)
    scorer = Scorer(encoder, LanguageGate.fit("en", references, []), cfg)
    anchors = [text for text in references for _ in range(work["generations"])]
    check = float(scorer.similarity(texts[:64], anchors[:64]).mean())
    scorer.score(texts[: len(rows)], rows, 0.0)  # caches the references

    def run(_: int) -> dict[str, Any]:
        out = jax.device_get(scorer.score(texts, rows, 0.0))
        return {"texts": len(texts), "mean_cosine": float(out.similarity.mean())}

    channel.ready(PACKAGES, check=check)
    channel.serve(run)


def main() -> None:
    channel = Channel()
    spec = channel.spec
    tasks = {
        "sampling": sampling,
        "step": step,
        "encoding": encoding,
        "memory": ours_limits.memory,
        "limits": ours_limits.limits,
    }
    tasks[spec["kind"]](channel, spec)
    channel.end(device_peak=jax_device_peak(jax))


if __name__ == "__main__":
    main()
