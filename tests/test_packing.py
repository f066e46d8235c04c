"""Tokens without their padding: the same states, log-probs, updates and metrics, for less work."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import hlo
from grpo_jax import config
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.learn.objectives import build_grpo_loss
from grpo_jax.learn.step import build_logps, build_update, init_state
from grpo_jax.models import lora
from grpo_jax.models import packing as packing_lib
from grpo_jax.models.packing import Packing, slots_for
from grpo_jax.structs import TrainBatch

P, S, G, T = 8, 9, 3, 6
PLACES = S + G * T


def a_batch() -> TrainBatch:
    """Prompts of 1 token and of S, completions of 0 and of T, and one group without any."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, T + 1, (P, G))
    lengths[0], lengths[1, 0] = 0, T
    prompt_lengths = rng.integers(1, S + 1, P).astype(np.int32)
    prompt_lengths[1:3] = 1, S
    shape = (P, G, T)
    return TrainBatch(
        prompt_ids=rng.integers(0, 300, (P, S)).astype(np.int32),
        prompt_lengths=prompt_lengths,
        ids=rng.integers(0, 300, shape).astype(np.int32),
        mask=np.arange(T) < lengths[..., None],
        advantages=rng.normal(size=(P, G)).astype(np.float32),
        old_logps=rng.normal(-5, 0.2, shape).astype(np.float32),
        ref_logps=rng.normal(-5, 0.2, shape).astype(np.float32),
    )


def tokens_of(batch: TrainBatch) -> np.ndarray:
    return batch.prompt_lengths - 1 + batch.mask.sum((1, 2))


@pytest.fixture
def small(monkeypatch):
    """Batches of tests are small enough that none would be packed."""
    monkeypatch.setattr(packing_lib, "LEAST", 1)


@pytest.mark.parametrize("spare", [0, 7])
def test_completions_come_first_and_every_token_has_its_slot(spare):
    batch = a_batch()
    needed = int(tokens_of(batch).sum())
    packing = Packing.of(
        jnp.asarray(batch.prompt_lengths), S, jnp.asarray(batch.mask), needed + spare, None
    )
    grid = 1 + jnp.arange(P * PLACES).reshape(P, PLACES)
    packed = np.asarray(packing.pack(grid))
    prompts = np.asarray(grid)[:, :S][np.arange(S) < batch.prompt_lengths[:, None] - 1]
    own = np.asarray(grid)[:, S:][batch.mask.reshape(P, -1)]
    np.testing.assert_array_equal(packed[0, :needed], np.concatenate([own, prompts]))

    back = np.asarray(packing.unpack(packing.pack(grid)))
    counted = np.isin(np.asarray(grid), packed[0, :needed])
    np.testing.assert_array_equal(back[counted], np.asarray(grid)[counted])
    assert np.count_nonzero(back) == needed + spare  # the others are 0

    values = jnp.arange(P * G * T).reshape(P, G, T)
    again = packing.unpack_completions(packing.pack_completions(values), values.shape)
    np.testing.assert_array_equal(again[batch.mask], values[batch.mask])


def test_gradients_go_back_where_their_tokens_came_from():
    """<pack x, y> = <x, unpack y>, so each is the other's gradient."""
    batch, rng = a_batch(), np.random.default_rng(1)
    slots = int(tokens_of(batch).sum()) + 3
    packing = Packing.of(jnp.asarray(batch.prompt_lengths), S, jnp.asarray(batch.mask), slots, None)
    grid, packed = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((P, PLACES, 4), (1, slots, 4))
    )
    left = jnp.vdot(packing.pack(grid), packed)
    np.testing.assert_allclose(left, jnp.vdot(grid, packing.unpack(packed)), rtol=1e-4)
    pulled = jax.grad(lambda x: jnp.vdot(packing.pack(x), packed))(grid)
    np.testing.assert_array_equal(pulled, packing.unpack(packed))
    pulled = jax.grad(lambda x: jnp.vdot(packing.unpack(x), grid))(packed)
    np.testing.assert_array_equal(pulled, packing.pack(grid))


def families(tiny):
    """Architectures whose attention looks at positions in ways of its own."""
    c = tiny.config
    return {
        "full": tiny,
        "window": tiny.clone(
            config=dataclasses.replace(c, sliding_window=4, sliding_layers=(True, False))
        ),
    }


@pytest.mark.parametrize("family", ["full", "window"])
def test_packed_states_are_the_padded_ones(tiny, tiny_params, family):
    model, batch = families(tiny)[family], a_batch()
    lengths = jnp.asarray(batch.prompt_lengths)
    slots = int(tokens_of(batch).sum()) + 2

    @partial(jax.jit, static_argnames="slots")
    def predict(params, slots=None):
        packing = None
        if slots:
            packing = Packing.of(lengths, S, jnp.asarray(batch.mask), slots, None)
        inputs = (batch.prompt_ids, lengths, batch.ids, packing)
        hidden = model.apply({"params": params}, *inputs, method="predict")
        assert hidden.shape[:-1] == ((1, slots) if slots else (P, G, T))
        return hidden if packing is None else packing.unpack_completions(hidden, (P, G, T))

    padded, packed = predict(tiny_params), predict(tiny_params, slots)
    np.testing.assert_allclose(packed[batch.mask], padded[batch.mask], atol=3e-5, rtol=0)
    assert np.asarray(padded)[batch.mask].std() > 0.3


@pytest.mark.parametrize(
    "level, micro, rank, split",
    [
        ("sequence", 2, 0, None),
        ("token", 2, 2, None),
        ("token", 1, 0, (2, 2, 2)),
    ],
    ids=["GSPO, micro-batches", "LoRA, micro-batches", "mesh"],
)
def test_a_packed_update_is_the_padded_one(tiny, tiny_params, small, level, micro, rank, split):
    """Log-probs, metrics and gradients; the packed one works on fewer tokens."""
    cfg = config.Lora(rank=rank, alpha=2.0 * rank)
    mesh = mesh_lib.make_mesh(config.Mesh(*split or (1, 1, 1)), jax.devices()[: 8 if split else 1])
    rows = mesh_lib.batch_sharding(mesh) if split else None
    model = tiny.clone(rows=rows, remat=rank > 0)
    loss = build_grpo_loss(config.GRPO(beta=0.1, importance_sampling_level=level), on_policy=False)
    update = build_update(model, optax.sgd(1.0), loss, cfg, micro_batches=micro)
    logps = build_logps(model, 1.0, micro)
    batch = a_batch()
    slots = slots_for(tokens_of(batch), PLACES, micro, mesh_lib.row_parts(mesh))
    assert slots is not None
    placed = mesh_lib.put_batch(mesh, batch)
    params = jax.device_put(tiny_params, mesh_lib.param_shardings(mesh, tiny_params))
    trained, frozen = params, None
    if rank:
        trained, frozen = lora.init(jax.random.key(0), params, cfg), params
        trained = jax.tree.map(lambda x: x + 0.1, trained)

    def run(slots):
        state = init_state(jax.tree.map(jnp.copy, trained), optax.sgd(1.0))
        state, stats = update(state, frozen, placed, jax.random.key(0), slots)
        return jax.device_get((logps({"params": params}, placed, slots), stats, state.params))

    (packed, stats, after), (padded, wanted, wanted_after) = run(slots), run(None)
    assert not stats["skipped"]
    close = partial(np.testing.assert_allclose, atol=5e-5, rtol=1e-4)
    close(packed, padded)
    assert not packed[~batch.mask].any() and packed[batch.mask].all()
    jax.tree.map(close, stats, wanted)
    jax.tree.map(close, after, wanted_after)
    assert wanted["kl"] > 1e-3 and wanted["grad_norm"] > 0.1


def test_packing_sends_nothing_between_devices(tiny, tiny_params, small):
    """Each device packs its own rows: the same exchanges as with the padding, and no more bytes."""
    mesh = mesh_lib.make_mesh(config.Mesh(1, 8, 1))
    model = tiny.clone(rows=mesh_lib.batch_sharding(mesh))
    loss = build_grpo_loss(config.GRPO(), on_policy=False)
    update = build_update(model, optax.sgd(1.0), loss, config.Lora())
    params = jax.device_put(tiny_params, mesh_lib.param_shardings(mesh, tiny_params))
    state, batch = init_state(params, optax.sgd(1.0)), mesh_lib.put_batch(mesh, a_batch())

    def exchanges(slots):
        compiled = update.lower(state, None, batch, jax.random.key(0), slots).compile()
        found = hlo.read(compiled.as_text()).collectives
        return Counter(one.kind for one in found), sum(one.bytes for one in found)

    slots = slots_for(tokens_of(a_batch()), PLACES, 1, 8)
    assert slots is not None
    (kinds, sent), (wanted, most) = exchanges(slots), exchanges(None)
    assert kinds == wanted and kinds and sent <= most


def test_too_few_slots_make_no_step(tiny, tiny_params):
    """A step whose loss is not a number is not made (test_nonfinite)."""
    batch, logps = a_batch(), build_logps(tiny, 1.0)
    needed = int(tokens_of(batch).sum())
    for slots, fine in ((needed, True), (needed - 1, False)):
        found = np.asarray(logps({"params": tiny_params}, batch, slots))
        assert np.isfinite(found).all() == fine
        assert np.isfinite(found[batch.mask]).any() == fine


def test_packing_saves_the_work_on_padding(tiny, tiny_params):
    """By XLA's count of a forward pass: attention stays, everything else shrinks."""
    batch = a_batch()
    needed = int(tokens_of(batch).sum())
    assert needed < 0.6 * P * PLACES
    logps = build_logps(tiny, 1.0)

    def work(slots):
        compiled = logps.lower({"params": tiny_params}, batch, slots).compile()
        return compiled.cost_analysis()["flops"]

    assert work(needed) < 0.75 * work(None)


@given(
    st.lists(st.integers(0, 90), min_size=12, max_size=12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
)
def test_slots_hold_every_devices_tokens(tokens, parts, devices):
    """Of every part, dealt out as micro-batches and mesh deal them; and no more than needed."""
    tokens, places = np.array(tokens), 90
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_lib, "LEAST", 1)
        slots = slots_for(tokens, places, parts, devices)
    if 12 % (parts * devices):
        assert slots is None
        return
    rows = 12 // (parts * devices)
    most = max(
        tokens[part::parts][device * rows : (device + 1) * rows].sum()
        for part in range(parts)
        for device in range(devices)
    )
    if slots is None:
        assert most > 0.75 * rows * places
    else:
        assert most <= slots < rows * places
        eighth = rows * places / 8
        assert slots % 8 == 0 and slots <= (np.ceil(max(most, 1) / eighth)) * eighth + 8


def test_nothing_is_packed_where_nothing_is_gained():
    assert slots_for(np.full(4, 10), 60, 1, 1) is None  # 240 places
    assert slots_for(np.full(4, 10), 100, 1, 1) == 256  # 400, of which an eighth would do
    assert slots_for(np.full(4, 1000), 1000, 1, 1) is None  # full
