"""The chunked output head: equal to the unchunked one, small, and float32 where it adds up."""

from __future__ import annotations

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from grpo_jax.config import GRPO, Mesh
from grpo_jax.infra.mesh import batch_sharding, make_mesh, param_shardings
from grpo_jax.learn import chunks
from grpo_jax.learn.logps import forward_kl, loss_of_tokens, token_choices, token_logps
from grpo_jax.learn.objectives import Stats, Tokens, build_grpo_loss, build_sft_loss


def head_inputs(lead: tuple[int, ...], width: int = 8, vocab: int = 50):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(*lead, width)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(width, vocab)), jnp.float32)
    return hidden, kernel, jnp.asarray(rng.integers(0, vocab, lead), jnp.int32)


def direct_logps(hidden, kernel, targets, temperature):
    log_probs = jax.nn.log_softmax(hidden @ kernel / temperature)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


@pytest.mark.parametrize("lead", [(3, 2, 5), (2, 550)], ids=["less than a chunk", "three chunks"])
def test_chunked_head_equals_the_unchunked(monkeypatch, lead):
    monkeypatch.setitem(chunks.LOGITS, "cpu", 512 * 50)
    hidden, kernel, targets = head_inputs(lead)
    weights = jnp.cos(jnp.arange(targets.size).reshape(lead))
    mask = jnp.asarray(np.random.default_rng(1).random(lead) < 0.8)

    def outputs(fn):
        def loss(hidden, kernel):
            logps, entropy = fn(hidden, kernel)
            return jnp.sum(logps * weights), (logps, entropy)

        (_, values), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel)
        return values, grads

    def direct(hidden, kernel):
        return (jnp.where(mask, x, 0.0) for x in direct_logps(hidden, kernel, targets, 0.7))

    (logps, entropy), grads = outputs(lambda h, k: token_logps(h, k, targets, mask, 0.7))
    (wanted_logps, wanted_entropy), wanted_grads = outputs(direct)
    np.testing.assert_allclose(logps, wanted_logps, atol=1e-5)
    np.testing.assert_allclose(entropy, wanted_entropy, atol=1e-5)
    for got, wanted in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
    blind = jax.grad(lambda h: token_logps(h, kernel, targets, mask)[1].sum())(hidden)
    assert not np.any(blind)  # entropy is a metric


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("peaked", [0.3, 3.0])
def test_bfloat16_rounds_the_products_and_nothing_else(monkeypatch, cap, peaked):
    """Loss and entropy as in float32, of the same rounded numbers; gradients within 2^-8."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 16 * 50)
    hidden, kernel, targets = head_inputs((100,))
    inputs = [x.astype(jnp.bfloat16) for x in (peaked * hidden, kernel)]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=100), jnp.float32)
    tokens = Tokens(weights != 0, weights, weights, weights)

    def loss_fn(logps, entropy, tokens):
        return jnp.sum(logps * tokens.weights), Stats({"entropy": jnp.mean(entropy)}, {})

    def loss(hidden, kernel):
        return loss_of_tokens(hidden, kernel, targets, tokens, loss_fn, 1.0, cap)

    fn = jax.value_and_grad(loss, (0, 1), has_aux=True)
    got, wanted = (fn(*(x.astype(dtype) for x in inputs)) for dtype in (jnp.bfloat16, jnp.float32))
    chex.assert_trees_all_close(got[0], wanted[0], rtol=1e-3)
    for ours, exact in zip(got[1], wanted[1], strict=True):
        assert np.linalg.norm(ours.astype(jnp.float32) - exact) < 2**-8 * np.linalg.norm(exact)


@pytest.mark.parametrize("cap", [0.0, 3.0])
def test_the_loss_in_one_pass_is_the_loss_of_the_log_probs(monkeypatch, cap):
    """Loss, metrics and both gradients, over chunks the last of which is not full."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 16 * 50)
    hidden, kernel, targets = head_inputs((2, 3, 7))
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.random(targets.shape) < 0.8)
    near = token_logps(hidden, kernel, targets, mask, 0.7, cap)[0]

    def close(scale):
        return near + scale * jnp.asarray(rng.normal(size=targets.shape), jnp.float32)

    advantages = jnp.asarray(rng.normal(size=targets.shape), jnp.float32)
    shares = mask / mask.sum()
    tokens = Tokens(mask, shares * 2, shares, advantages, close(0.2), close(0.5))
    loss_fn = build_grpo_loss(GRPO(beta=0.3, delta=1.2), on_policy=False).fn

    def one_pass(hidden, kernel):
        loss, stats = loss_of_tokens(hidden, kernel, targets, tokens, loss_fn, 0.7, cap)
        return 3.0 * loss, stats

    def two_passes(hidden, kernel):
        loss, stats = loss_fn(*token_logps(hidden, kernel, targets, mask, 0.7, cap), tokens)
        return 3.0 * loss, stats

    (got, wanted) = (
        jax.value_and_grad(fn, (0, 1), has_aux=True)(hidden, kernel)
        for fn in (one_pass, two_passes)
    )
    assert wanted[0][1].means["clip_ratio/region"] > 0.05
    chex.assert_trees_all_close(got, wanted, atol=1e-5)


@pytest.mark.parametrize(
    "split", [(2, 2, 2), (1, 1, 8)], ids=["vocabulary split", "does not divide"]
)
def test_the_head_on_a_mesh_is_that_of_one_device(monkeypatch, split):
    """Log-probs and their gradients, choices and KL; each device has chunks of its own."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 8 * 50)
    hidden, kernel, targets = head_inputs((4, 3, 7))
    mask = jnp.asarray(np.random.default_rng(1).random((4, 3, 7)) < 0.7).at[2].set(False)
    mesh = make_mesh(Mesh(*split))

    def everything(hidden, kernel, rows=None):
        def loss(hidden, kernel):
            logps, entropy = token_logps(hidden, kernel, targets, mask, 0.7, 3.0, rows)
            return jnp.sum(logps * jnp.cos(entropy)), (logps, entropy)

        choices = token_choices(hidden, kernel, targets, mask, rows=rows)
        kl = forward_kl(hidden, kernel, 0.9 * hidden, kernel[:, ::-1], mask, rows=rows)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel), choices, kl

    rows = batch_sharding(mesh)
    kernel_split = param_shardings(mesh, {"lm_head": {"kernel": kernel}})["lm_head"]["kernel"]
    placed = jax.device_put(hidden, rows), jax.device_put(kernel, kernel_split)
    got = jax.device_get(jax.jit(partial(everything, rows=rows))(*placed))
    wanted = jax.device_get(jax.jit(everything)(hidden, kernel))
    chex.assert_trees_all_close(got, wanted, atol=1e-5)


@pytest.mark.parametrize("vocab", [60, 240])
@pytest.mark.parametrize("passes", [1, 2])
def test_logits_of_all_tokens_never_exist(monkeypatch, vocab, passes):
    """No array of the gradient's program, loops included, grows with tokens x vocabulary."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 500 * 60)
    hidden, kernel, targets = head_inputs((4, 300), vocab=vocab)

    def loss(hidden, kernel):
        if passes == 2:
            return token_logps(hidden, kernel, targets, targets >= 0)[0].sum()
        ones = jnp.ones(targets.shape)
        tokens = Tokens(ones > 0, ones, ones, ones)
        return loss_of_tokens(hidden, kernel, targets, tokens, build_sft_loss().fn)[0]

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from sizes(inner)

    largest = max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, kernel).jaxpr))
    assert 400 * 60 <= largest <= 500 * 60 < targets.size * vocab


@pytest.mark.parametrize("kernel_dtype", [jnp.float32, jnp.bfloat16])
def test_the_head_gradient_of_bfloat16_adds_up_in_float32(monkeypatch, kernel_dtype):
    """Many chunks that each add a little: a bfloat16 sum stalls at 256 times a chunk's share."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * 20)
    row, kernel, targets = head_inputs((1,), vocab=20)
    count = 4 * 800
    hidden = jnp.broadcast_to(row.astype(jnp.bfloat16), (count, 8))
    targets = jnp.broadcast_to(targets, (count,))
    kernel = kernel.astype(kernel_dtype)

    def loss(kernel):
        return token_logps(hidden, kernel, targets, targets >= 0)[0].sum()

    def direct(kernel):
        return direct_logps(hidden.astype(jnp.float32), kernel, targets, 1.0)[0].sum()

    got = jax.grad(loss)(kernel)
    wanted = jax.grad(direct)(kernel.astype(jnp.bfloat16).astype(jnp.float32))
    assert got.dtype == kernel_dtype
    error = np.abs(np.asarray(got, np.float32) - wanted).max() / np.abs(wanted).max()
    assert error < 0.01


def test_forward_kl_is_the_kl():
    hidden_p, head_p, _ = head_inputs((2, 300))
    hidden_q, head_q = 0.9 * hidden_p + 0.1, head_p[:, ::-1]
    log_p, log_q = (jax.nn.log_softmax(h @ k) for h, k in ((hidden_p, head_p), (hidden_q, head_q)))
    mask = jnp.ones((2, 300), bool)
    got = forward_kl(hidden_p, head_p, hidden_q, head_q, mask)
    wanted = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert got.shape == (2, 300) and (np.asarray(got) > 0).all()
    np.testing.assert_allclose(forward_kl(hidden_p, head_p, hidden_p, head_p, mask), 0, atol=1e-6)


@pytest.mark.parametrize("split", [None, (8, 1, 1)], ids=["one device", "eight"])
def test_chunks_behind_the_last_token_are_not_computed(monkeypatch, split):
    """What is not a number there reaches nothing: not even a gradient, which adds up chunks."""
    monkeypatch.setitem(chunks.LOGITS, "cpu", 4 * 50)
    hidden, kernel, targets = head_inputs((8, 12))
    rows = None if split is None else batch_sharding(make_mesh(Mesh(*split)))
    if split is None:
        hidden, targets = hidden.reshape(1, 96, -1), targets.reshape(1, 96)
        counts, last = np.array([[37]]), 40
    else:
        counts = np.array([[0], [1], [4], [5], [8], [9], [12], [3]])
        last = -(-counts // 4) * 4  # a device has a row, in three chunks
    places = np.arange(hidden.shape[1])
    mask = jnp.asarray(places < counts)
    poisoned = jnp.where((places < last)[..., None], hidden, jnp.nan)
    ones = jnp.ones(targets.shape)
    tokens = Tokens(mask, mask * ones, mask * ones, ones)

    def everything(hidden, kernel):
        def loss(hidden, kernel):
            fn = build_sft_loss().fn
            one = loss_of_tokens(hidden, kernel, targets, tokens, fn, rows=rows)[0]
            logps, entropy = token_logps(hidden, kernel, targets, mask, rows=rows)
            return one + jnp.sum(logps * jnp.cos(entropy)), (logps, entropy)

        kl = forward_kl(hidden, kernel, hidden, kernel[:, ::-1], mask, rows=rows)
        choices = token_choices(hidden, kernel, targets, mask, rows=rows)
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, kernel), choices, kl

    run = jax.jit(everything)
    got, wanted = jax.device_get((run(poisoned, kernel), run(hidden, kernel)))
    chex.assert_trees_all_equal(got, wanted)
    assert np.isfinite(got[0][1][1]).all() and np.abs(got[0][1][1]).max() > 0.1
    assert not np.any(got[0][0][1][0][~np.asarray(mask)])
