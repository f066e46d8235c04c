"""Learning: the update and its equivalences, the optimizer, a reward that rises."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.config import GRPO, Lora, Optimizer, Sampling
from grpo_jax.learn.advantages import advantages
from grpo_jax.learn.objectives import build_grpo_loss, tokens_of
from grpo_jax.learn.optimizer import build_optimizer, build_schedule
from grpo_jax.learn.step import build_logps, build_update, init_state
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import TrainBatch

P, S, G, T = 8, 6, 4, 8
TEMPERATURE = 0.9


def direct_logps(hidden, kernel, targets, temperature):
    """What learn.logps.token_logps computes, with all logits at once."""
    log_probs = jax.nn.log_softmax(hidden @ kernel / temperature)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)


# The update.


@pytest.fixture(scope="module")
def batch(tiny, tiny_params) -> TrainBatch:
    rng = np.random.default_rng(2)
    batch = TrainBatch(
        prompt_ids=rng.integers(0, 300, (P, S)).astype(np.int32),
        prompt_lengths=rng.integers(1, S + 1, P).astype(np.int32),
        ids=rng.integers(0, 300, (P, G, T)).astype(np.int32),
        mask=np.arange(T) < rng.integers(0, T + 1, (P, G, 1)),
        advantages=rng.normal(size=(P, G)).astype(np.float32),
    )
    logps = build_logps(tiny, TEMPERATURE)({"params": tiny_params}, batch)
    noise = rng.normal(0, 0.2, (2, P, G, T)).astype(np.float32)
    return batch._replace(old_logps=logps + noise[0], ref_logps=logps + noise[1])


class Bigram:
    """Stands in for the decoder where the model does not matter: a state a token, no layers."""

    config = SimpleNamespace(final_logit_softcapping=0.0)
    rows = None

    def apply(self, variables, prompt_ids, prompt_lengths, ids, packing=None, rngs=None, method=""):
        last = jnp.take_along_axis(prompt_ids, prompt_lengths[:, None] - 1, axis=1)
        last = jnp.broadcast_to(last[..., None], (*ids.shape[:2], 1))
        before = jnp.concatenate([last, ids[..., :-1]], axis=-1)
        return variables["params"]["embed_tokens"]["embedding"][before]


@pytest.fixture(scope="module")
def updates(tiny):
    """Updates by (loss_type, micro_batches), compiled once; gradient descent at rate 1."""
    built = {}

    def get(loss_type: str = "dapo", micro_batches: int = 1):
        key = loss_type, micro_batches
        if key not in built:
            built[key] = build_update(
                tiny if loss_type == "dapo" else Bigram(),
                optax.sgd(1.0),
                build_grpo_loss(GRPO(beta=0.1, loss_type=loss_type), on_policy=False),
                Lora(),
                loss_type=loss_type,
                max_completion_length=T + 2,
                temperature=TEMPERATURE,
                micro_batches=micro_batches,
            )
        return built[key]

    return get


def fresh_state(params: dict):
    """A state of its own, since updates give theirs away."""
    return init_state(jax.tree.map(jnp.copy, params), optax.sgd(1.0))


@pytest.fixture(scope="module")
def step(updates, tiny_params):
    """step(batch, loss_type, micro_batches) -> gradients and stats at the tiny parameters."""

    def run(batch: TrainBatch, *kind):
        state, stats = updates(*kind)(fresh_state(tiny_params), None, batch, jax.random.key(0))
        grads = jax.tree.map(lambda a, b: np.asarray(a - b), tiny_params, state.params)
        return grads, {name: float(value) for name, value in stats.items()}

    return run


def assert_same(got, wanted, atol=3e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol, rtol=1e-4), got, wanted)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_accumulated_equals_unaccumulated(step, batch, loss_type):
    grads, stats = step(batch, loss_type, 1)
    accumulated, accumulated_stats = step(batch, loss_type, 4)
    assert_same(accumulated, grads)
    assert_same(accumulated_stats, stats)
    assert stats["grad_norm"] > 0.1 and stats["kl"] > 0
    assert stats["num_tokens"] == batch.mask.sum()


def test_the_gradient_is_that_of_the_loss(tiny, tiny_params, batch, step):
    """Against autodiff through unchunked logits and one row a completion, prompts repeated."""
    grads, stats = step(batch)
    rows = np.zeros((P * G, S + T), np.int32)
    starts = np.repeat(batch.prompt_lengths, G)
    for row, start in enumerate(starts):
        rows[row, :start] = batch.prompt_ids[row // G, :start]
        rows[row, start : start + T] = batch.ids[row // G, row % G]
    places = starts[:, None] - 1 + np.arange(T)

    @jax.jit
    def value(params):
        hidden = tiny.apply({"params": params}, rows, starts + T)
        hidden = hidden[np.arange(P * G)[:, None], places].reshape(P, G, T, -1)
        kernel = params["lm_head"]["kernel"]
        logps, entropy = direct_logps(hidden, kernel, batch.ids, TEMPERATURE)
        weights = jnp.asarray(batch.mask / batch.mask.sum(), jnp.float32)
        loss_fn = build_grpo_loss(GRPO(beta=0.1), on_policy=False).fn
        return loss_fn(logps, entropy, tokens_of(batch, weights, weights))[0]

    loss, wanted = jax.value_and_grad(value)(tiny_params)
    assert stats["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert_same(grads, wanted)


def test_jit_equals_no_jit(step, updates, tiny_params, batch):
    grads, stats = step(batch, "grpo", 4)
    plain = updates("grpo", 4).__wrapped__
    state, eager = plain(fresh_state(tiny_params), None, batch, jax.random.key(0))
    assert_same(jax.tree.map(lambda a, b: a - b, tiny_params, state.params), grads)
    assert_same({name: float(value) for name, value in eager.items()}, stats)


def test_masked_rows_give_no_gradient(step, batch):
    """What a masked completion says, and how good it was, is never read; only its row counts."""
    mask = batch.mask.copy()
    mask[:, 0] = False
    masked = batch._replace(mask=mask)
    rng = np.random.default_rng(3)
    ids, scores = batch.ids.copy(), batch.advantages.copy()
    ids[:, 0], scores[:, 0] = rng.integers(0, 300, (P, T)), 1e3
    grads, stats = step(masked, "grpo", 1)
    other, other_stats = step(masked._replace(ids=ids, advantages=scores), "grpo", 1)
    assert_same(other, grads, atol=1e-6)
    assert other_stats == pytest.approx(stats, abs=1e-6)


def test_padding_changes_neither_loss_nor_gradient(step, batch):
    grads, stats = step(batch)
    rng = np.random.default_rng(4)

    def pad(x, fill):
        return np.concatenate([x, fill], axis=-1)

    garbage = rng.integers(0, 300, (P, G, 3)).astype(np.int32)
    noise = rng.normal(size=garbage.shape).astype(np.float32)
    padded = batch._replace(
        prompt_ids=pad(batch.prompt_ids, garbage[:, 0]),
        ids=pad(batch.ids, garbage),
        mask=pad(batch.mask, np.zeros(garbage.shape, bool)),
        old_logps=pad(batch.old_logps, noise),
        ref_logps=pad(batch.ref_logps, noise),
    )
    wider, wider_stats = step(padded)
    assert_same(wider, grads)
    assert_same(wider_stats, stats)


def test_the_second_pass_over_a_rollout_uses_the_ratio(tiny, tiny_params, updates, batch):
    """num_iterations = 2: first ratio 1 and nothing clipped, then exp(new - old), some clipped."""
    logps = build_logps(tiny, TEMPERATURE)
    old = logps({"params": tiny_params}, batch)
    fresh = batch._replace(old_logps=old, ref_logps=old)
    mask, scores = batch.mask, np.broadcast_to(batch.advantages[..., None], batch.mask.shape)
    state, stats = updates()(fresh_state(tiny_params), None, fresh, jax.random.key(0))
    assert float(stats["clip_ratio/region"]) == 0 and float(stats["kl"]) == 0
    assert float(stats["loss"]) == pytest.approx(-scores[mask].mean(), rel=1e-4)

    new = np.asarray(logps({"params": state.params}, batch), np.float64)
    ratio = np.exp(new - np.asarray(old))
    surrogate = np.minimum(ratio * scores, np.clip(ratio, 0.8, 1.2) * scores)
    kl = np.exp(np.asarray(old) - new) - (np.asarray(old) - new) - 1
    state, stats = updates()(state, None, fresh, jax.random.key(0))
    wanted = (-surrogate + 0.1 * ratio * kl)[mask].mean()
    assert float(stats["loss"]) == pytest.approx(wanted, rel=1e-3)
    assert float(stats["clip_ratio/region"]) > 0.05
    assert int(state.step) == 2


def test_the_state_is_donated(tiny_params, updates, batch):
    state = fresh_state(tiny_params)
    new, _ = updates()(state, None, batch, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((new, tiny_params)))


# The optimizer.


def test_schedules():
    cfg = Optimizer(learning_rate=1.0, schedule="cosine", warmup_ratio=0.2)
    rates = [float(build_schedule(cfg, 10)(step)) for step in range(11)]
    assert rates[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert rates[6] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)
    linear = build_schedule(Optimizer(learning_rate=2.0, schedule="linear"), 4)
    assert [float(linear(step)) for step in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    assert float(build_schedule(Optimizer(learning_rate=3.0), 5)(100)) == 3.0


def test_decay_spares_norms_and_biases():
    names = ("kernel", "embedding", "lora_a", "lora_b", "scale", "bias")
    params = {"layer": {name: jnp.ones((2, 3)) for name in names}}
    cfg = Optimizer(learning_rate=0.1, weight_decay=0.5, moment_dtype="bfloat16")
    optimizer = build_optimizer(cfg, 10)
    opt_state = optimizer.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    decay, _ = optimizer.update(zeros, opt_state, params, fine=jnp.array(True))
    spared = {name for name, leaf in decay["layer"].items() if not np.any(leaf)}
    assert spared == {"scale", "bias"}
    np.testing.assert_allclose(decay["layer"]["kernel"], -0.05, rtol=1e-6)
    moments = [x.dtype.name for x in jax.tree.leaves(opt_state) if x.ndim]
    assert sorted(set(moments)) == ["bfloat16", "float32"]


@pytest.mark.parametrize(("limit", "wanted"), [(1.0, 0.5), (0.0, 3.0)])
def test_clipping_bounds_the_global_norm(limit, wanted):
    grads = {"scale": jnp.full(4, 3.0)}  # of norm 6; with b1 = 0 the first moment is what AdamW saw
    optimizer = build_optimizer(Optimizer(max_grad_norm=limit, b1=0.0), 1)
    _, state = optimizer.update(grads, optimizer.init(grads), grads, fine=jnp.array(True))
    moments = [float(jnp.max(x)) for x in jax.tree.leaves(state) if x.ndim]
    assert max(moments) == pytest.approx(wanted)


def test_steps_are_those_of_optax_and_a_bad_one_leaves_no_trace():
    cfg = Optimizer(learning_rate=0.1, weight_decay=0.1, b1=0.8, b2=0.9, schedule="cosine")
    theirs = optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(build_schedule(cfg, 6), b1=0.8, b2=0.9, weight_decay=0.1),
    )
    ours = build_optimizer(cfg, 6)
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(draw.normal(size=(3, 4)), jnp.float32)}
    expected, states = params, (ours.init(params), theirs.init(params))
    for step in range(6):
        grads = {"kernel": jnp.asarray(draw.normal(size=(3, 4)) * 3.0**step / 9, jnp.float32)}
        bad = {"kernel": grads["kernel"].at[0, 0].set(jnp.nan)}
        _, after = ours.update(bad, states[0], params, fine=jnp.array(False))
        jax.tree.map(np.testing.assert_array_equal, after, states[0])
        mine, own = ours.update(grads, states[0], params, fine=jnp.array(True))
        others, their = theirs.update(grads, states[1], expected)
        params, expected = optax.apply_updates(params, mine), optax.apply_updates(expected, others)
        np.testing.assert_allclose(params["kernel"], expected["kernel"], rtol=1e-6)
        states = own, their
    for mine, other in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-6)


# The loop.


def test_grpo_raises_the_reward(tiny, tiny_params):
    """Reward: the share of one token, id 65, among those drawn. Eight updates must raise it."""
    rng = np.random.default_rng(7)
    prompts = rng.integers(0, 300, (P, S)).astype(np.int32)
    lengths = np.full(P, S, np.int32)
    boost = tiny_params["lm_head"]["kernel"].at[:, 65].multiply(2.0)  # rare at first, not absent
    params = {**tiny_params, "lm_head": {"kernel": boost}}
    sample = build_sampler(tiny, Sampling(temperature=TEMPERATURE), T, (0,))
    optimizer = build_optimizer(Optimizer(learning_rate=2e-2), 8)
    update = build_update(
        tiny,
        optimizer,
        build_grpo_loss(GRPO(beta=0.0), on_policy=True),
        Lora(),
        temperature=TEMPERATURE,
    )
    state = init_state(jax.tree.map(jnp.copy, params), optimizer)
    rewards = []
    for index in range(8):
        key = jax.random.fold_in(jax.random.key(0), index)
        rollout = sample({"params": state.params}, prompts, lengths, key, num_generations=G)
        share = jnp.mean((rollout.ids == 65) & rollout.mask, axis=-1)
        rewards.append(float(share.mean()))
        batch = TrainBatch(
            prompts, lengths, rollout.ids, rollout.mask, advantages(share, {}), rollout.logps
        )
        state, stats = update(state, None, batch, key)
        assert float(stats["sampling/sampling_logp_difference/max"]) < 1e-3
    assert rewards[-1] > rewards[0] + 0.3
    assert int(state.step) == 8
