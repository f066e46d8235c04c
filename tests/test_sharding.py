"""One step of GRPO on all kinds of meshes: the same numbers, and nothing needless sent."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import hlo
from benchmarks.scaling import offences
from grpo_jax import config
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.learn import chunks
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.objectives import build_grpo_loss
from grpo_jax.learn.step import build_update, init_state
from grpo_jax.models.decoder import Decoder
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import Rollout, TrainBatch, TrainState

P, S, G, T = 8, 6, 2, 5
ONE = (1, 1, 1)
SPLITS = ((8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2), (4, 1, 2))  # two key-value heads


class Step(NamedTuple):
    """What a step gives, and the program that it was."""

    rollout: Rollout
    stats: dict[str, float]
    params: dict
    program: hlo.Program


def run_step(model: Decoder, params: dict, split: tuple[int, int, int]) -> Step:
    """Samples and one step of gradient descent, as one program on a mesh."""
    devices = jax.devices()[: int(np.prod(split))]
    mesh = mesh_lib.make_mesh(config.Mesh(*split), devices)
    rows = mesh_lib.batch_sharding(mesh)
    model = model.clone(rows=rows if mesh.size > 1 else None)
    cfg = config.GRPO(beta=0.1)
    gathered = mesh_lib.gathered(mesh)
    sample = build_sampler(model, config.Sampling(temperature=0.9, top_p=0.9), T, (7,), gathered)
    optimizer = optax.sgd(1.0)
    loss = build_grpo_loss(cfg, on_policy=False)
    update = build_update(model, optimizer, loss, config.Lora())

    def step(state: TrainState, ids: Any, lengths: Any, key: Any) -> tuple:
        variables = {"params": state.params}
        rollout = sample(variables, ids, lengths, key, num_generations=G)
        reward = jnp.mean((rollout.ids % 2 == 0) & rollout.mask, axis=-1)
        old = 1.1 * rollout.logps  # so that ratio and KL are not those of an unchanged policy
        batch = TrainBatch(
            ids, lengths, rollout.ids, rollout.mask, advantages(reward, {}), old, old
        )
        state, stats = update(state, None, batch, key)
        return rollout, stats, state.params

    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (P, S)).astype(np.int32)
    lengths = rng.integers(1, S + 1, P).astype(np.int32)
    placed = jax.device_put(params, mesh_lib.param_shardings(mesh, params))
    arguments = (init_state(placed, optimizer), *mesh_lib.put_batch(mesh, [ids, lengths]))
    compiled = jax.jit(step).lower(*arguments, jax.random.key(3)).compile()
    found = jax.device_get(compiled(*arguments, jax.random.key(3)))
    return Step(*found, hlo.read(compiled.as_text(), trips=T - 1))


@pytest.fixture(scope="module")
def shallow(tiny, tiny_params) -> tuple[Decoder, dict]:
    """The tiny decoder's first layer: the second would be sharded alike."""
    layers = jax.tree.map(lambda x: x[:1], tiny_params["layers"])
    model = Decoder(dataclasses.replace(tiny.config, num_layers=1))
    return model, {**tiny_params, "layers": layers}


@pytest.fixture(scope="module")
def steps(shallow):
    """Steps by split, each compiled once; a chunk has at most 8 tokens."""
    done: dict[tuple[int, int, int], Step] = {}

    def get(split: tuple[int, int, int]) -> Step:
        if split not in done:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(chunks.LOGITS, "cpu", 8 * 300)
                done[split] = run_step(*shallow, split)
        return done[split]

    return get


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_every_split_gives_the_same_step(steps, split):
    got, wanted = steps(split), steps(ONE)
    np.testing.assert_array_equal(got.rollout.ids, wanted.rollout.ids)
    np.testing.assert_array_equal(got.rollout.mask, wanted.rollout.mask)
    close = partial(np.testing.assert_allclose, atol=3e-5, rtol=1e-4)
    close(got.rollout.logps, wanted.rollout.logps)
    assert wanted.stats["kl"] > 1e-3 and wanted.stats["grad_norm"] > 0.1
    jax.tree.map(close, got.stats, wanted.stats)
    jax.tree.map(close, got.params, wanted.params)


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_no_split_sends_logits_or_other_rows(steps, shallow, split):
    """No logits, keys or states of others; the head and its gradient once, outside of loops."""
    program, (model, params) = steps(split).program, shallow
    c = model.config
    lanes = P * G // (split[0] * split[1])
    assert not offences(program, params, split[2], lanes, c.hidden_size)
    vocab = {c.vocab_size, c.vocab_size // split[2]}
    gathered = [
        one
        for one in program.collectives
        if one.kind in ("all-gather", "all-reduce", "reduce-scatter")
        and any(vocab & set(a.shape) and len(a.shape) > 1 for a in one.arrays)
    ]
    assert bool(gathered) == (split[0] * split[1] > 1)  # along tensor alone nothing of the kind
    assert not [one for one in gathered if one.loops]
