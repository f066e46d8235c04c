"""Adapters: identity at the start, merging, their gradients, what an update leaves alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.config import Lora
from grpo_jax.learn.objectives import build_sft_loss
from grpo_jax.learn.step import build_update, init_state, policy_variables
from grpo_jax.models import lora
from grpo_jax.structs import TrainBatch

CFG = Lora(rank=2, alpha=6.0)
P, S, G, T = 4, 5, 2, 4


@pytest.fixture(scope="module")
def batch() -> TrainBatch:
    rng = np.random.default_rng(0)
    return TrainBatch(
        prompt_ids=rng.integers(0, 300, (P, S)).astype(np.int32),
        prompt_lengths=np.array([5, 1, 3, 4], np.int32),
        ids=rng.integers(0, 300, (P, G, T)).astype(np.int32),
        mask=np.arange(T) < rng.integers(1, T + 1, (P, G, 1)),
        advantages=np.ones((P, G), np.float32),
    )


@pytest.fixture(scope="module")
def fresh(tiny_params) -> dict:
    return lora.init(jax.random.key(0), tiny_params, CFG)


@pytest.fixture(scope="module")
def used(fresh) -> dict:
    """An adapter in the middle of training: neither factor is zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def predict(tiny):
    def states(variables: dict, batch: TrainBatch) -> jax.Array:
        inputs = batch.prompt_ids, batch.prompt_lengths, batch.ids
        return tiny.apply(variables, *inputs, method="predict")

    return jax.jit(states)


@pytest.fixture(scope="module")
def update(tiny):
    """Plain gradient descent at rate 1: the change of a parameter is minus its gradient."""
    return build_update(tiny, optax.sgd(1.0), build_sft_loss(), CFG)


def test_a_fresh_adapter_is_the_identity(tiny_params, fresh, batch, predict):
    plain = predict({"params": tiny_params}, batch)
    adapted = predict(policy_variables(fresh, tiny_params, CFG), batch)
    np.testing.assert_array_equal(adapted, plain)
    merged = lora.merge(tiny_params, lora.scaled(fresh, CFG))
    jax.tree.map(np.testing.assert_array_equal, merged, tiny_params)


def test_fresh_adapters_have_the_paths_of_their_kernels(tiny_params, fresh):
    for block, names in (
        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        assert set(fresh["layers"][block]) == set(names)
        for name in names:
            layers, fan_in, fan_out = tiny_params["layers"][block][name]["kernel"].shape
            leaf = fresh["layers"][block][name]
            assert leaf["lora_a"].shape == (layers, fan_in, CFG.rank)
            assert leaf["lora_b"].shape == (layers, CFG.rank, fan_out)
            assert not np.any(leaf["lora_b"]) and np.abs(leaf["lora_a"]).max() <= fan_in**-0.5
    q, k = (fresh["layers"]["self_attn"][name]["lora_a"] for name in ("q_proj", "k_proj"))
    assert np.all(q != k) and np.all(q[0] != q[1])  # drawn apart


def test_targets_choose_the_layers_and_unknown_ones_are_named(tiny_params):
    some = lora.init(jax.random.key(0), tiny_params, Lora(rank=1, targets=("v_proj", "up_proj")))
    assert set(some["layers"]["self_attn"]) == {"v_proj"} and set(some["layers"]["mlp"]) == {
        "up_proj"
    }
    with pytest.raises(ValueError, match=r"model\.lora\.targets.*'c_attn'.*q_proj"):
        lora.init(jax.random.key(0), tiny_params, Lora(rank=1, targets=("c_attn", "v_proj")))


def test_all_linear_takes_whatever_the_layers_have():
    kernel = jax.ShapeDtypeStruct((2, 8, 6), jnp.float32)
    params = {"layers": {"self_attn": {"qkv_proj": {"kernel": kernel}}, "norm": {"scale": kernel}}}
    found = jax.eval_shape(lambda p: lora.init(jax.random.key(0), p, Lora(rank=3)), params)
    shapes = jax.tree.map(lambda x: x.shape, found, is_leaf=lambda x: hasattr(x, "shape"))
    leaf = {"lora_a": (2, 8, 3), "lora_b": (2, 3, 6)}
    assert shapes == {"layers": {"self_attn": {"qkv_proj": leaf}}}


def test_merged_equals_unmerged(tiny_params, used, batch, predict):
    variables = policy_variables(used, tiny_params, CFG)
    unmerged = np.asarray(predict(variables, batch))
    merged = lora.merge(tiny_params, variables["lora"])
    np.testing.assert_allclose(predict({"params": merged}, batch), unmerged, atol=5e-5)
    assert np.abs(unmerged - predict({"params": tiny_params}, batch)).max() > 0.1
    kernel = np.asarray(tiny_params["layers"]["mlp"]["up_proj"]["kernel"])
    factors = used["layers"]["mlp"]["up_proj"]
    delta = CFG.alpha / CFG.rank * np.asarray(factors["lora_a"]) @ np.asarray(factors["lora_b"])
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["up_proj"]["kernel"], kernel + delta, atol=1e-5
    )


def test_merging_keeps_the_base_dtype(tiny_params, used):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny_params)
    merged = lora.merge(half, lora.scaled(used, CFG))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged))


def test_an_update_is_the_projected_full_gradient_and_leaves_the_base(
    tiny, tiny_params, used, batch, update
):
    """dL/dA = s dL/dW B^T, dL/dB = s A^T dL/dW; dL/dW from full fine-tuning at merged weights."""
    before = jax.tree.map(np.array, tiny_params)
    state = init_state(jax.tree.map(jnp.copy, used), optax.sgd(1.0))
    state, _ = update(state, tiny_params, batch, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, tiny_params, before)

    merged = lora.merge(tiny_params, lora.scaled(used, CFG))
    full = build_update(tiny, optax.sgd(1.0), build_sft_loss(), Lora())
    moved, _ = full(
        init_state(jax.tree.map(jnp.copy, merged), optax.sgd(1.0)), None, batch, jax.random.key(0)
    )
    scale = CFG.alpha / CFG.rank
    for block, names in used["layers"].items():
        for name, factors in names.items():
            kernel = merged["layers"][block][name]["kernel"]
            weight_grad = np.asarray(kernel - moved.params["layers"][block][name]["kernel"])
            lora_a, lora_b = np.asarray(factors["lora_a"]), np.asarray(factors["lora_b"])
            wanted_a = scale * weight_grad @ lora_b.swapaxes(1, 2)
            wanted_b = scale * lora_a.swapaxes(1, 2) @ weight_grad
            new = state.params["layers"][block][name]
            assert np.abs(wanted_a).max() > 1e-3 and np.abs(wanted_b).max() > 1e-3
            np.testing.assert_allclose(lora_a - new["lora_a"], wanted_a, atol=2e-5)
            np.testing.assert_allclose(lora_b - new["lora_b"], wanted_b, atol=2e-5)


def test_the_first_update_moves_only_b(tiny_params, fresh, batch, update):
    state = init_state(jax.tree.map(jnp.copy, fresh), optax.sgd(1.0))
    state, stats = update(state, tiny_params, batch, jax.random.key(0))
    new, old = state.params["layers"]["self_attn"], fresh["layers"]["self_attn"]
    for name in old:
        np.testing.assert_array_equal(new[name]["lora_a"], old[name]["lora_a"])
        assert np.abs(new[name]["lora_b"]).max() > 1e-4
    assert float(stats["grad_norm"]) > 0


def test_dropout_acts_on_the_adapter_alone_and_only_with_a_key(
    tiny, tiny_params, used, fresh, batch, predict
):
    model = tiny.clone(lora_dropout=0.5)
    inputs = batch.prompt_ids, batch.prompt_lengths, batch.ids

    @jax.jit
    def noisy(variables: dict, key: jax.Array) -> jax.Array:
        return model.apply(variables, *inputs, rngs={"dropout": key}, method="predict")

    variables = policy_variables(used, tiny_params, CFG)
    one, two = noisy(variables, jax.random.key(0)), noisy(variables, jax.random.key(1))
    assert np.abs(one - two).max() > 0.01
    np.testing.assert_array_equal(noisy(variables, jax.random.key(0)), one)
    identity = policy_variables(fresh, tiny_params, CFG)
    base = noisy(identity, jax.random.key(0))
    np.testing.assert_array_equal(noisy(identity, jax.random.key(1)), base)
    np.testing.assert_array_equal(
        jax.jit(lambda v: model.apply(v, *inputs, method="predict"))(variables),
        predict(variables, batch),
    )
