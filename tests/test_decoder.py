"""The decoder: shared prefixes, padding, causality, rematerialisation, dtypes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models.decoder import Decoder, logits

LENGTHS = np.array([7, 4, 1], np.int32)
P, S, G, T = 3, 7, 2, 5


@pytest.fixture(scope="module")
def data(tiny):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, tiny.config.vocab_size, (P, S)).astype(np.int32)
    ids = rng.integers(0, tiny.config.vocab_size, (P, G, T)).astype(np.int32)
    return prompts, ids


@pytest.fixture(scope="module")
def forward(tiny):
    return jax.jit(lambda params, ids, lengths: tiny.apply({"params": params}, ids, lengths))


@pytest.fixture(scope="module")
def predict(tiny):
    return jax.jit(
        lambda params, ids, lengths, completions: tiny.apply(
            {"params": params}, ids, lengths, completions, method="predict"
        )
    )


def rows_of(prompts, ids):
    """Each completion behind its own copy of its prompt: ids [P * G, S + T], lengths [P * G]."""
    rows = np.zeros((P * G, S + T), np.int32)
    for p in range(P):
        for g in range(G):
            row = np.concatenate([prompts[p, : LENGTHS[p]], ids[p, g]])
            rows[p * G + g, : row.size] = row
    return rows, np.repeat(LENGTHS, G) + T


def test_shared_prefix_equals_repeated_rows(tiny_params, data, forward, predict):
    prompts, ids = data
    shared = np.asarray(predict(tiny_params, prompts, LENGTHS, ids))
    repeated = np.asarray(forward(tiny_params, *rows_of(prompts, ids)))
    for p in range(P):
        for g in range(G):
            start = LENGTHS[p] - 1
            wanted = repeated[p * G + g, start : start + T]
            np.testing.assert_allclose(shared[p, g], wanted, atol=2e-5, rtol=0)
    assert shared.std() > 0.3  # there was something to compare


def test_padding_changes_nothing(tiny_params, data, forward, predict):
    prompts, ids = data
    garbage = np.random.default_rng(1).integers(0, 300, (P, G, T + 3)).astype(np.int32)
    padded = np.where(np.arange(S) < LENGTHS[:, None], prompts, 0)
    wider = np.concatenate([prompts, garbage[:, 0]], axis=1)
    longer = np.concatenate([ids, garbage[:, :, :3]], axis=2)
    wanted = np.asarray(predict(tiny_params, padded, LENGTHS, ids))
    got = np.asarray(predict(tiny_params, wider, LENGTHS, longer))[:, :, :T]
    np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=0)
    plain = np.asarray(forward(tiny_params, *rows_of(prompts, ids)))
    rows, lengths = rows_of(prompts, ids)
    noise = np.where(np.arange(S + T) < lengths[:, None], rows, 299)
    noisy = np.asarray(forward(tiny_params, noise, lengths))
    valid = np.arange(S + T) < lengths[:, None]
    np.testing.assert_allclose(noisy[valid], plain[valid], atol=2e-5, rtol=0)
    assert np.isfinite(noisy).all()


def test_a_state_depends_on_its_past_and_only_on_it(tiny_params, data, predict):
    prompts, ids = data
    base = np.asarray(predict(tiny_params, prompts, LENGTHS, ids))
    changed = ids.copy()
    changed[:, 0, 2] = (changed[:, 0, 2] + 1) % 300
    got = np.asarray(predict(tiny_params, prompts, LENGTHS, changed))
    np.testing.assert_array_equal(got[:, 0, :3], base[:, 0, :3])
    np.testing.assert_array_equal(got[:, 1], base[:, 1])  # nor on the rest of its group
    assert (np.abs(got[:, 0, 3:] - base[:, 0, 3:]).max(-1) > 1e-3).all()


def test_the_last_token_of_a_prompt_is_read(tiny_params, data, predict):
    prompts, ids = data
    base = np.asarray(predict(tiny_params, prompts, LENGTHS, ids))
    changed = prompts.copy()
    changed[np.arange(P), LENGTHS - 1] = (changed[np.arange(P), LENGTHS - 1] + 1) % 300
    got = np.asarray(predict(tiny_params, changed, LENGTHS, ids))
    assert (np.abs(got - base).max(-1) > 1e-3).all()


def test_one_token_completions(tiny, tiny_params, data, predict):
    prompts, ids = data
    got = tiny.apply({"params": tiny_params}, prompts, LENGTHS, ids[:, :, :1], method="predict")
    wanted = predict(tiny_params, prompts, LENGTHS, ids)[:, :, :1]
    np.testing.assert_allclose(got, wanted, atol=2e-5, rtol=0)


def test_prefill_is_the_last_position(tiny, tiny_params, data, forward):
    prompts, _ = data
    prefill = jax.jit(lambda p, *a: tiny.apply({"params": p}, *a, method="prefill"))
    hidden, kv = prefill(tiny_params, prompts, LENGTHS)
    wanted = np.asarray(forward(tiny_params, prompts, LENGTHS))[np.arange(P), LENGTHS - 1]
    np.testing.assert_allclose(hidden, wanted, atol=1e-5, rtol=0)
    c = tiny.config
    heads = (c.num_layers, P, c.num_kv_heads)
    assert kv.k.shape == (*heads, c.head_dim, S) and kv.v.shape == (*heads, S, c.head_dim)


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_remat_changes_neither_value_nor_gradient(tiny, tiny_params, data, policy):
    """And keeps what its policy says: the products that the backward pass reads, or none."""
    prompts, ids = data

    def value(model):
        def loss(params):
            hidden = model.apply({"params": params}, prompts, LENGTHS, ids, method="predict")
            return jnp.sum(jnp.sin(hidden))

        return jax.jit(jax.value_and_grad(loss))(tiny_params)

    recomputing = tiny.clone(remat=True, remat_policy=policy)

    def states(params):
        return recomputing.apply({"params": params}, prompts, LENGTHS, ids, method="predict")

    c, tokens = tiny.config, P * (S + G * T)
    backward = jax.eval_shape(lambda params: jax.vjp(states, params)[1], tiny_params)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward)]
    products = [shape for shape in kept if shape[:2] == (c.num_layers, tokens)]
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    widths = [heads, kv_heads, kv_heads, c.hidden_size] + 2 * [c.intermediate_size]
    assert Counter(shape[2] for shape in products) == Counter(widths if policy == "dots" else [])
    plain, remat = value(tiny), value(recomputing)
    np.testing.assert_allclose(plain[0], remat[0], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(a).max())),
        plain[1],
        remat[1],
    )
    # lm_head is applied by learn.logps, so no gradient reaches it here; everything else moves.
    quiet = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain[1])
        if not np.abs(leaf).max() > 1e-6 and path[0].key != "lm_head"
    ]

    assert quiet == []


def test_parameter_paths_and_shapes(tiny):
    config = dataclasses.replace(tiny.config, tie_word_embeddings=True, qk_norm=False)
    ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), ids, lengths)["params"]
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    assert got == {
        "embed_tokens/embedding": (300, 32),
        "layers/input_layernorm/scale": (2, 32),
        "layers/self_attn/q_proj/kernel": (2, 32, 32),
        "layers/self_attn/q_proj/bias": (2, 32),
        "layers/self_attn/k_proj/kernel": (2, 32, 16),
        "layers/self_attn/k_proj/bias": (2, 16),
        "layers/self_attn/v_proj/kernel": (2, 32, 16),
        "layers/self_attn/v_proj/bias": (2, 16),
        "layers/self_attn/o_proj/kernel": (2, 32, 32),
        "layers/post_attention_layernorm/scale": (2, 32),
        "layers/mlp/gate_proj/kernel": (2, 32, 48),
        "layers/mlp/up_proj/kernel": (2, 32, 48),
        "layers/mlp/down_proj/kernel": (2, 48, 32),
        "norm/scale": (32,),
    }


def test_tied_and_untied_logits(tiny, tiny_params):
    hidden = np.random.default_rng(2).normal(size=(2, 3, 32)).astype(np.float32)
    untied = logits(tiny.config, tiny_params, jnp.asarray(hidden))
    np.testing.assert_allclose(untied, hidden @ tiny_params["lm_head"]["kernel"], atol=1e-5)
    tied = {name: leaf for name, leaf in tiny_params.items() if name != "lm_head"}
    embedding = np.asarray(tiny_params["embed_tokens"]["embedding"])
    np.testing.assert_allclose(
        logits(tiny.config, tied, jnp.asarray(hidden)), hidden @ embedding.T, atol=1e-5
    )


def test_bfloat16_stays_close_and_scores_in_float32(tiny, tiny_params, data, predict):
    prompts, ids = data
    model = tiny.clone(dtype=jnp.bfloat16)
    hidden = jax.jit(lambda p, *a: model.apply({"params": p}, *a, method="predict"))(
        tiny_params, prompts, LENGTHS, ids
    )
    assert hidden.dtype == jnp.bfloat16
    assert logits(tiny.config, tiny_params, hidden).dtype == jnp.float32
    wanted = np.asarray(predict(tiny_params, prompts, LENGTHS, ids))
    error = np.asarray(hidden, np.float32) - wanted
    assert np.sqrt(np.mean(error**2)) < 0.05 * wanted.std()
