"""Objectives and advantages: TRL's numbers (golden/make_learn.py) and the properties they obey."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from grpo_jax.config import GRPO
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.objectives import (
    build_grpo_loss,
    build_sft_loss,
    kl_estimate,
    token_weights,
    tokens_of,
)
from grpo_jax.structs import TrainBatch

with np.load(Path(__file__).parent / "golden" / "learn.npz") as file:
    GOLDEN = dict(file)
ABOUT = json.loads(str(GOLDEN.pop("about")))
KL_CASES = [name for name, case in ABOUT["cases"].items() if case.get("beta")]


def golden_batch(with_ref: bool = True) -> TrainBatch:
    P, G, _ = GOLDEN["mask"].shape
    return TrainBatch(
        prompt_ids=np.zeros((P, 1), np.int32),
        prompt_lengths=np.ones(P, np.int32),
        ids=np.zeros(GOLDEN["mask"].shape, np.int32),
        mask=GOLDEN["mask"],
        advantages=GOLDEN["advantages"],
        old_logps=GOLDEN["old_logps"],
        ref_logps=GOLDEN["ref_logps"] if with_ref else None,
    )


def evaluate(case: dict, logps: np.ndarray, batch: TrainBatch):
    """(loss, sums of the means), gradient in logps: micro-batch by micro-batch, as an update does.

    Micro-batch i takes prompts i, i + parts, ...
    """
    case = dict(case)
    parts, on_policy = case.pop("micro_batches", 1), case.pop("on_policy", False)
    loss_fn = build_grpo_loss(GRPO(**{"beta": 0.0, **case}), on_policy).fn

    def split(x: np.ndarray) -> jax.Array:
        return jnp.stack([jnp.asarray(x[i::parts]) for i in range(parts)])

    batches = jax.tree.map(split, batch)
    weights = token_weights(batches.mask, case["loss_type"], ABOUT["limit"])
    mean = token_weights(batches.mask, "dapo", ABOUT["limit"])

    def total(logps: jax.Array):
        loss, means = 0.0, []
        for i in range(parts):
            micro = jax.tree.map(lambda x, i=i: x[i], batches)
            value, stats = loss_fn(logps[i], logps[i] * 0, tokens_of(micro, weights[i], mean[i]))
            loss += value
            means.append(stats.means)
        return loss, jax.tree.map(lambda *x: sum(x), *means)

    (loss, means), grad = jax.value_and_grad(total, has_aux=True)(split(logps))
    unsplit = np.zeros_like(logps)
    for i in range(parts):
        unsplit[i::parts] = grad[i]
    return float(loss), {name: float(value) for name, value in means.items()}, unsplit


@pytest.mark.parametrize("name", ABOUT["cases"])
def test_losses_agree_with_trl(name):
    case = ABOUT["cases"][name]
    batch = golden_batch(with_ref=name in KL_CASES)
    loss, means, grad = evaluate(case, GOLDEN["logps"], batch)
    np.testing.assert_allclose(loss, GOLDEN[f"loss/{name}"], rtol=2e-6)
    np.testing.assert_allclose(grad, GOLDEN[f"grad/{name}"], rtol=2e-5, atol=1e-8)
    assert np.abs(grad).max() > 0.01
    if case.get("importance_sampling_level") != "sequence" and "micro_batches" not in case:
        for side in ("low", "high", "region"):
            wanted = ABOUT["metrics"][name][f"clip_ratio/{side}_mean"]
            np.testing.assert_allclose(means[f"clip_ratio/{side}"], wanted, atol=1e-6)
    if name == "kl_uncorrected":
        np.testing.assert_allclose(means["kl"], ABOUT["metrics"][name]["kl"], rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo"])
def test_accumulation_changes_nothing_but_bnpo(loss_type):
    case = {"loss_type": loss_type, "beta": 0.1}
    once = evaluate(case, GOLDEN["logps"], golden_batch())
    twice = evaluate(case | {"micro_batches": 2}, GOLDEN["logps"], golden_batch())
    same = np.allclose(once[0], twice[0], rtol=1e-6) and np.allclose(once[2], twice[2], atol=1e-7)
    assert same == (loss_type != "bnpo")
    assert once[1] == pytest.approx(twice[1], abs=1e-6) or loss_type == "bnpo"


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_masked_tokens_touch_neither_loss_nor_gradient(level):
    """Whatever stands behind the end, even log-probs that would overflow the estimate of the KL."""
    case = {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": level}
    wanted = evaluate(case, GOLDEN["logps"], golden_batch())
    hidden = ~GOLDEN["mask"]
    batch = golden_batch()._replace(
        old_logps=np.where(hidden, 0.0, GOLDEN["old_logps"]),
        ref_logps=np.where(hidden, 0.0, GOLDEN["ref_logps"]),
    )
    got = evaluate(case, np.where(hidden, -200.0, GOLDEN["logps"]), batch)
    assert got[0] == pytest.approx(wanted[0], rel=1e-6)
    np.testing.assert_allclose(got[2], wanted[2], atol=1e-7)
    assert (got[2][hidden] == 0).all()


def test_padding_the_completions_changes_no_weight():
    mask = GOLDEN["mask"][None]
    padded = np.pad(mask, ((0, 0),) * 3 + ((0, 5),))
    for loss_type in ("grpo", "dapo", "dr_grpo", "bnpo"):
        weights = np.asarray(token_weights(jnp.asarray(mask), loss_type, ABOUT["limit"]))
        wider = np.asarray(token_weights(jnp.asarray(padded), loss_type, ABOUT["limit"]))
        np.testing.assert_array_equal(wider[..., :-5], weights)
        assert (wider[..., -5:] == 0).all() and (weights[~mask] == 0).all()
    empty = token_weights(jnp.zeros((1, 2, 2, 3), bool), "dapo", 3)
    assert (np.asarray(empty) == 0).all()


def test_sft_loss_is_the_mean_cross_entropy():
    mask = GOLDEN["mask"][:, :1]
    batch = golden_batch()._replace(
        mask=mask, advantages=np.ones((len(mask), 1), np.float32), old_logps=None, ref_logps=None
    )
    weights = token_weights(jnp.asarray(mask)[None], "dapo", 1)[0]
    logps = GOLDEN["logps"][:, :1]
    tokens = tokens_of(batch, weights, weights)
    loss, stats = build_sft_loss().fn(logps, jnp.ones(mask.shape), tokens)
    assert float(loss) == pytest.approx(-logps[mask].mean(), rel=1e-6)
    assert float(stats.means["entropy"]) == pytest.approx(1.0)


def test_on_policy_needs_no_old_log_probs():
    case = {"loss_type": "dapo", "on_policy": True}
    without = golden_batch(with_ref=False)._replace(old_logps=None)
    loss, means, grad = evaluate(case, GOLDEN["logps"], without)
    mask = GOLDEN["mask"]
    advantage = np.broadcast_to(GOLDEN["advantages"][..., None], mask.shape)
    assert loss == pytest.approx(-advantage[mask].mean(), rel=1e-5)
    np.testing.assert_allclose(grad, -advantage * mask / mask.sum(), rtol=1e-5)
    assert means["clip_ratio/region"] == 0


FLOATS = st.floats(-20, 0, width=32)
LOGPS = hnp.arrays(np.float32, (7,), elements=FLOATS)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_sampling_corrects_a_sampler_that_drew_from_another_policy(level):
    """Over every token of a small vocabulary, drawn as the sampler thinks likely: the policy
    gradient is that of draws from the policy; and a cap bounds what a token counts."""
    rng = np.random.default_rng(2)
    scores, sampler, rewards = rng.normal(size=(3, 6))
    drawn = jax.nn.log_softmax(sampler)
    batch = TrainBatch(
        prompt_ids=np.zeros((6, 1), np.int32),
        prompt_lengths=np.ones(6, np.int32),
        ids=np.arange(6, dtype=np.int32)[:, None, None],
        mask=np.ones((6, 1, 1), bool),
        advantages=rewards[:, None],
        old_logps=drawn[:, None, None],
    )

    def gradient(cap):
        cfg = GRPO(beta=0.0, importance_sampling_cap=cap, importance_sampling_level=level)
        loss = build_grpo_loss(cfg, on_policy=True).fn

        def expected(scores):
            logps = jax.nn.log_softmax(scores)[:, None, None]
            tokens = tokens_of(batch, jnp.exp(drawn)[:, None, None], jnp.ones((6, 1, 1)))
            return loss(logps, logps * 0, tokens)[0]

        return np.asarray(jax.grad(expected)(jnp.asarray(scores)))

    wanted = jax.grad(lambda s: -jnp.sum(jax.nn.softmax(s) * rewards))(jnp.asarray(scores))
    np.testing.assert_allclose(gradient(1e6), wanted, atol=1e-5)
    assert np.abs(gradient(None) - wanted).max() > 0.05
    bounded = np.minimum(np.exp(jax.nn.log_softmax(scores) - drawn), 0.5) * np.exp(drawn) * rewards
    probs = np.asarray(jax.nn.softmax(jnp.asarray(scores)))
    np.testing.assert_allclose(gradient(0.5), probs * bounded.sum() - bounded, atol=1e-5)


@given(LOGPS, LOGPS)
def test_k3_is_never_negative_and_zero_at_equality(logps, ref_logps):
    assert (np.asarray(kl_estimate(logps, ref_logps, "k3")) >= -1e-6).all()
    for kind in ("k1", "k2", "k3"):
        assert (np.asarray(kl_estimate(logps, logps, kind)) == 0).all()


def test_kl_estimators_estimate_the_kl():
    """Expectations under the policy, summed exactly over a small vocabulary."""
    rng = np.random.default_rng(0)
    policy, reference = jax.nn.log_softmax(rng.normal(0, 0.3, (2, 50)), axis=-1)
    exact = float(jnp.sum(jnp.exp(policy) * (policy - reference)))
    for kind, tolerance in (("k1", 1e-5), ("k2", 0.1), ("k3", 1e-5)):
        mean = float(jnp.sum(jnp.exp(policy) * kl_estimate(policy, reference, kind)))
        assert mean == pytest.approx(exact, rel=tolerance)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_bias_correction_gives_the_gradient_of_the_kl(kind):
    """E[grad(ratio k)] is the KL's gradient; E[grad k] is 0 for k1, and KL(ref || p)'s for k3."""
    rng = np.random.default_rng(1)
    scores, reference = jnp.asarray(rng.normal(0, 1, (2, 50)))
    reference = jax.nn.log_softmax(reference)

    def kl(scores):
        policy = jax.nn.log_softmax(scores)
        return jnp.sum(jnp.exp(policy) * (policy - reference))

    def expected_gradient(corrected: bool):
        weights = jnp.exp(jax.nn.log_softmax(scores))  # of the sampled tokens, held fixed

        def estimate(scores):
            logps = jax.nn.log_softmax(scores)[None, None]
            batch = golden_batch()._replace(
                mask=np.ones((1, 1, 50), bool),
                advantages=np.zeros((1, 1), np.float32),
                ref_logps=reference[None, None],
                old_logps=None,
            )
            cfg = GRPO(beta=1.0, kl_estimator=kind, kl_bias_correction=corrected)
            tokens = tokens_of(batch, weights[None, None], weights[None, None])
            return build_grpo_loss(cfg, on_policy=True).fn(logps, logps * 0, tokens)[0]

        return jax.grad(estimate)(scores)

    np.testing.assert_allclose(expected_gradient(True), jax.grad(kl)(scores), atol=1e-5)
    assert np.abs(expected_gradient(False) - jax.grad(kl)(scores)).max() > 0.01


@pytest.mark.parametrize("name", ["group", "batch", "none", "rloo", "gdpo"])
def test_advantages_agree_with_trl(name):
    terms = dict(zip(ABOUT["weights"], GOLDEN["rewards"], strict=True))
    total = sum(weight * terms[term] for term, weight in ABOUT["weights"].items())
    kind, scale = {"rloo": ("rloo", "none"), "gdpo": ("gdpo", "group")}.get(name, ("group", name))
    got = np.asarray(advantages(total, terms, kind, scale, ABOUT["weights"]))
    np.testing.assert_allclose(got, GOLDEN[f"advantages/{name}"], atol=2e-6)
    assert (got[1] == 0).all()  # the group without spread


KINDS = [("group", "group"), ("group", "batch"), ("group", "none"), ("rloo", "none"), ("gdpo", "")]
GRID = hnp.arrays(np.int32, (4, 3), elements=st.integers(-8, 8))  # ties are common


@pytest.mark.parametrize(("kind", "scale"), KINDS)
@given(rewards=GRID, shift=st.integers(-64, 64))
def test_advantage_properties(kind, scale, rewards, shift):
    rewards = rewards.astype(np.float32) / 8

    def values(rewards: np.ndarray) -> np.ndarray:
        return np.asarray(advantages(rewards, {"only": rewards}, kind, scale))

    got = values(rewards)
    np.testing.assert_allclose(got.sum(1), 0, atol=2e-5)
    np.testing.assert_allclose(values(rewards + shift), got, atol=2e-4)
    tie = rewards.max(1) == rewards.min(1)
    assert (got[tie] == 0).all()
    np.testing.assert_array_equal(np.argmax(got, 1)[~tie], np.argmax(rewards, 1)[~tie])
    # Multiples of 1/8 are exact; 0.1 is not, and its mean of three is not 0.1.
    inexact = np.where(tie[:, None], np.float32(0.1), rewards)
    assert (values(inexact)[tie] == 0).all()


@pytest.mark.parametrize(("kind", "scale"), KINDS)
@pytest.mark.parametrize("shape", [(1, 4), (5, 1), (1, 1)])
def test_one_group_and_groups_of_one(kind, scale, shape):
    rewards = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    got = np.asarray(advantages(rewards, {"only": rewards}, kind, scale))
    assert got.shape == shape and np.isfinite(got).all()
    assert (got == 0).all() == (shape[1] == 1)
