"""The sampler: what is drawn, its log-probs against teacher forcing, stopping, sharding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from scipy.stats import chi2

from grpo_jax.config import Lora, Sampling
from grpo_jax.learn.step import build_logps
from grpo_jax.models import lora
from grpo_jax.models.decoder import logits as output_logits
from grpo_jax.rollout import sampler
from grpo_jax.rollout.draw import draw, mass_above, truncate
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import TrainBatch

V = 300  # more than one block of the two-level draw, and not a multiple of it
P, S, G, T = 8, 6, 3, 7
TEMPERATURE = 0.8
EOS_IDS = (0, *range(40, 80))  # id 0 is the padding too


def warp(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The warped softmax of one row by sorting, in float64; ties at a border survive together."""
    scores = logits.astype(np.float64) / (sampling.temperature or 1.0)
    probs = np.exp(scores - scores.max())
    if sampling.temperature == 0:
        return np.arange(probs.size) == np.argmax(probs)
    if sampling.top_k:
        probs = np.where(probs >= np.sort(probs)[-min(sampling.top_k, probs.size)], probs, 0)
    if sampling.top_p < 1:
        probs = probs / probs.sum()
        ranked = np.sort(probs)[::-1]
        border = np.searchsorted(np.cumsum(ranked), sampling.top_p * (1 - 1e-6))
        probs = np.where(probs >= ranked[border] * (1 - 1e-6), probs, 0)
    probs = np.where(probs >= sampling.min_p * probs.max() * (1 - 1e-6), probs, 0)
    return probs / probs.sum()


def assert_drawn_from(tokens: np.ndarray, probs: np.ndarray) -> None:
    """Pearson's chi-square with cells of at least 5 expected draws; p above 1e-3."""
    counts = np.bincount(tokens, minlength=probs.size)
    assert not counts[probs == 0].any()
    order = np.argsort(probs)
    expected, seen = probs[order] * tokens.size, counts[order]
    cell = np.minimum(np.cumsum(expected) // 5, (expected.sum() - 1e-6) // 5 - 1).astype(int)
    expected, seen = np.bincount(cell, expected), np.bincount(cell, seen)
    expected, seen = expected[expected > 0], seen[expected > 0]
    if expected.size > 1:
        statistic = np.sum((seen - expected) ** 2 / expected)
        assert chi2.sf(statistic, expected.size - 1) > 1e-3


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=0.0),
    Sampling(top_k=5),
    Sampling(top_p=0.8),
    Sampling(min_p=0.1),
    Sampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.02),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=lambda s: "/".join(map(str, vars(s).values())))
def test_frequencies_match_the_warped_softmax(sampling):
    logits = np.random.default_rng(0).normal(0, 2, V).astype(np.float32)
    logits[7] = logits[290] = logits[20]  # ties, across blocks
    uniforms = jax.random.uniform(jax.random.key(3), (20_000, 2))
    rows = jnp.broadcast_to(logits, (20_000, V))
    tokens, logps = map(np.asarray, draw(rows, uniforms, sampling))
    assert_drawn_from(tokens, warp(logits, sampling))
    wanted = jax.nn.log_softmax(jnp.asarray(logits) / (sampling.temperature or 1.0))
    np.testing.assert_allclose(logps, wanted[tokens], atol=1e-5)


def kept(weights: jax.Array, sampling: Sampling) -> np.ndarray:
    """bool [V]: which tokens of one row [1, V] may be drawn."""
    weights, wanted = truncate(weights, sampling)
    if wanted is None:
        return np.asarray(weights[0] > 0)
    above = mass_above(weights[:, None], weights[0][:, None, None])[:, 0]
    return np.asarray((weights[0] > 0) & (above < wanted))


@pytest.mark.parametrize("sampling", SAMPLINGS[3:])
@given(levels=st.lists(st.integers(-6, 6), min_size=24, max_size=24))
def test_truncation_keeps_what_sorting_keeps(sampling, levels):
    """Few distinct logits, so that ties at the border, and rows that are one tie, are common."""
    logits = np.asarray(levels, np.float32)
    scores = (logits - logits.max()) / np.float32(sampling.temperature)
    weights = jnp.exp(jnp.asarray(scores))[None]
    np.testing.assert_array_equal(kept(weights, sampling), warp(logits, sampling) > 0)


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_a_token_above_top_p_stands_alone(top_p):
    scores = np.full((1, V), -30.0, np.float32)
    scores[0, 123] = 0.0
    assert kept(jnp.exp(jnp.asarray(scores)), Sampling(top_p=top_p)).sum() == 1


def test_top_p_ends_on_logits_that_are_not_numbers():
    logits = jnp.zeros((2, V)).at[1].set(jnp.nan)
    tokens, logps = draw(logits, jnp.full((2, 2), 0.5), Sampling(top_p=0.5))
    assert 0 <= tokens[0] < V and logps[0] == pytest.approx(-np.log(V)) and np.isnan(logps[1])


def test_never_a_token_of_weight_zero():
    """The extreme uniforms on rows with whole blocks of zero weight, first, middle and last."""
    edge = np.float32(1 - 2**-24)
    grid = np.array([[a, b] for a in (0, 0.5, edge) for b in (0, 0.5, edge)], np.float32)
    for alive in ([0], [299], [255, 256], [3, 298], [260]):
        logits = np.full(V, -1e30, np.float32)
        logits[alive] = 0.0
        rows = jnp.broadcast_to(logits, (len(grid), V))
        tokens, logps = draw(rows, jnp.asarray(grid), Sampling())
        assert set(np.asarray(tokens)) <= set(alive)
        np.testing.assert_allclose(logps, -np.log(len(alive)), atol=1e-6)
        truncated = jnp.zeros((len(grid), V)).at[:, jnp.asarray(alive)].set(5.0)
        tokens, _ = draw(truncated, jnp.asarray(grid), Sampling(top_k=len(alive)))
        assert set(np.asarray(tokens)) <= set(alive)


def test_greedy_takes_the_first_of_the_largest():
    logits = np.random.default_rng(1).integers(0, 5, (50, V)).astype(np.float32)
    tokens, logps = draw(jnp.asarray(logits), jnp.zeros((50, 2)), Sampling(temperature=0.0))
    np.testing.assert_array_equal(tokens, logits.argmax(1))
    np.testing.assert_allclose(logps, jax.nn.log_softmax(logits).max(1), atol=1e-5)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(5)
    lengths = np.array([6, 1, 3, 6, 2, 5, 4, 6], np.int32)
    return rng.integers(0, V, (P, S)).astype(np.int32), lengths


@pytest.fixture(scope="module")
def sample(tiny):
    """The sampler that most tests share, compiled once for P prompts and G completions."""
    built = build_sampler(tiny, Sampling(temperature=TEMPERATURE), T, EOS_IDS)
    return partial(built, num_generations=G)


@pytest.fixture(scope="module")
def rollout(sample, tiny_params, prompts):
    return jax.tree.map(np.asarray, sample({"params": tiny_params}, *prompts, jax.random.key(0)))


@pytest.fixture(scope="module")
def teacher_forced(tiny, prompts):
    """The same log-probs by one forward pass over prompt and completion; 0 where masked."""
    logps = build_logps(tiny, TEMPERATURE)

    def recompute(variables, rollout):
        advantages = np.zeros(rollout.ids.shape[:2], np.float32)
        batch = TrainBatch(*prompts, rollout.ids, rollout.mask, advantages)
        return np.where(rollout.mask, logps(variables, batch), 0.0)

    return recompute


def assert_well_formed(rollout, eos_ids) -> None:
    """Mask: a prefix up to and including the first EOS, or everything; nothing behind it."""
    is_eos = np.isin(rollout.ids, eos_ids) & rollout.mask
    lengths = rollout.mask.sum(-1)
    limit = rollout.mask.shape[-1]
    np.testing.assert_array_equal(rollout.mask, np.arange(limit) < lengths[..., None])
    np.testing.assert_array_equal(rollout.ended, is_eos.any(-1))
    first = np.where(rollout.ended, is_eos.argmax(-1) + 1, limit)
    np.testing.assert_array_equal(lengths, first)
    assert not rollout.ids[~rollout.mask].any() and not rollout.logps[~rollout.mask].any()


def test_log_probs_are_those_of_one_forward(tiny_params, teacher_forced, rollout):
    assert_well_formed(rollout, EOS_IDS)
    lengths = rollout.mask.sum(-1)
    assert lengths.min() < 3 and lengths.max() == T and not rollout.ended.all()
    wanted = teacher_forced({"params": tiny_params}, rollout)
    np.testing.assert_allclose(rollout.logps, wanted, atol=2e-5)
    assert len(np.unique(rollout.ids[..., 0])) > P  # a group's members differ


def test_log_probs_with_an_adapter(tiny_params, prompts, sample, teacher_forced):
    """The sampler merges the adapter, teacher forcing does not."""
    cfg = Lora(rank=2, alpha=8.0)
    adapter = lora.init(jax.random.key(1), tiny_params, cfg)
    rng = np.random.default_rng(2)
    noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), adapter)
    variables = {"params": tiny_params, "lora": lora.scaled(noisy, cfg)}
    got = jax.tree.map(np.asarray, sample(variables, *prompts, jax.random.key(0)))
    wanted = teacher_forced(variables, got)
    np.testing.assert_allclose(got.logps, wanted, atol=1e-4)
    base = teacher_forced({"params": tiny_params}, got)
    assert np.abs(got.logps - base).max() > 0.1


@pytest.mark.parametrize(("lanes", "sizes"), [(1, [6]), (2, [6]), (0, [2, 4, 6]), (1, [2, 4, 6])])
def test_lanes_and_caches_do_not_change_the_draws(
    monkeypatch, tiny, tiny_params, prompts, rollout, lanes, sizes
):
    """Lanes that take one completion after another, over caches that grow and then wrap around.

    `rollout` has all lanes and one cache.
    """
    monkeypatch.setattr(sampler, "LEAST", sizes[0])
    assert sampler.cache_sizes(T) == sizes
    sample = build_sampler(tiny, Sampling(temperature=TEMPERATURE), T, EOS_IDS, lanes=lanes)
    got = sample({"params": tiny_params}, *prompts, jax.random.key(0), num_generations=G)
    np.testing.assert_array_equal(got.ids, rollout.ids)
    np.testing.assert_array_equal(got.mask, rollout.mask)
    np.testing.assert_array_equal(got.ended, rollout.ended)
    np.testing.assert_allclose(got.logps, rollout.logps, atol=2e-5)


def test_caches_double_up_to_what_is_read():
    """The first holds LEAST tokens; none is much of a size with the next."""
    assert [sampler.cache_sizes(n) for n in (1, 2, 64, 96)] == [[1], [1], [63], [95]]
    for n in range(97, 1500):
        *smaller, last = sampler.cache_sizes(n)
        assert smaller == [sampler.LEAST * 2**i for i in range(len(smaller))]
        assert last == n - 1 and 1.5 * smaller[-1] <= last < 3 * smaller[-1]


def test_transposed_kernels_draw_the_same(monkeypatch, tiny, tiny_params, prompts, rollout):
    """What a CPU does from some width on; `rollout` has the head alone transposed."""
    monkeypatch.setattr(sampler, "WIDE", 1)
    wide = build_sampler(tiny, Sampling(temperature=TEMPERATURE), T, EOS_IDS)
    found = wide({"params": tiny_params}, *prompts, jax.random.key(0), num_generations=G)
    np.testing.assert_array_equal(found.ids, rollout.ids)
    np.testing.assert_allclose(found.logps, rollout.logps, atol=1e-5)


def test_the_same_key_draws_the_same(sample, tiny_params, prompts, rollout):
    again = sample({"params": tiny_params}, *prompts, jax.random.key(0))
    np.testing.assert_array_equal(again.ids, rollout.ids)
    other = sample({"params": tiny_params}, *prompts, jax.random.key(1))
    assert (np.asarray(other.ids) != rollout.ids).mean() > 0.3


def test_draws_do_not_depend_on_the_sharding(sample, tiny_params, prompts, rollout):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(tiny_params, NamedSharding(mesh, PartitionSpec()))
    got = sample({"params": params}, *map(place, prompts), jax.random.key(0))
    assert len(got.ids.sharding.device_set) == 8
    np.testing.assert_array_equal(got.ids, rollout.ids)
    np.testing.assert_allclose(got.logps, rollout.logps, atol=1e-5)


def with_bias(params: dict, token: int, value: float) -> dict:
    """Adds about `value` to one token's logit: one channel of the state is made a constant."""
    channel = jnp.zeros(32).at[0].set(1e4)  # so large that the final norm leaves nothing else
    embedding = params["embed_tokens"]["embedding"] + channel
    kernel = params["lm_head"]["kernel"].at[0].set(0.0).at[0, token].set(value / 32**0.5)
    norm = {"scale": params["norm"]["scale"].at[0].set(1.0)}
    return {
        **params,
        "embed_tokens": {"embedding": embedding},
        "lm_head": {"kernel": kernel},
        "norm": norm,
    }


def test_eos_first(sample, tiny_params, prompts):
    variables = {"params": with_bias(tiny_params, 0, 60.0)}
    got = jax.tree.map(np.asarray, sample(variables, *prompts, jax.random.key(0)))
    assert got.mask[..., 0].all() and not got.mask[..., 1:].any() and got.ended.all()
    assert not got.ids.any()  # id 0 is padding and EOS, and still belongs to the completion
    np.testing.assert_allclose(got.logps, 0.0, atol=1e-5)


def test_eos_that_is_the_padding_id(sample, tiny_params, prompts, teacher_forced):
    variables = {"params": with_bias(tiny_params, 0, 5.0)}
    got = jax.tree.map(np.asarray, sample(variables, *prompts, jax.random.key(0)))
    assert_well_formed(got, EOS_IDS)
    lengths = got.mask.sum(-1)
    last = np.take_along_axis(got.ids, lengths[..., None] - 1, -1)[..., 0]
    ended_by_zero = got.ended & (last == 0)
    assert len(np.unique(lengths[ended_by_zero])) > 2
    wanted = teacher_forced(variables, got)
    np.testing.assert_allclose(got.logps, wanted, atol=2e-5)
    assert (got.logps[got.mask] < 0).all()  # the EOS has a log-prob like any token


def test_eos_never(sample, tiny_params, prompts):
    got = sample({"params": with_bias(tiny_params, 200, 60.0)}, *prompts, jax.random.key(0))
    assert (np.asarray(got.ids) == 200).all()
    assert np.asarray(got.mask).all() and not np.asarray(got.ended).any()


def test_greedy_decoding_is_the_argmax_of_one_forward(tiny, tiny_params, prompts):
    """One completion a prompt; each token is the largest logit of the full forward before it."""
    sample = build_sampler(tiny, Sampling(temperature=0.0), T, (-1,))
    variables = {"params": tiny_params}
    got = sample(variables, *prompts, jax.random.key(0), num_generations=1)
    hidden = tiny.apply(variables, *prompts, got.ids, method="predict")
    scores = np.asarray(output_logits(tiny.config, tiny_params, hidden))
    np.testing.assert_array_equal(got.ids, scores.argmax(-1))
    np.testing.assert_allclose(got.logps, jax.nn.log_softmax(scores).max(-1), atol=2e-5)
    assert np.asarray(got.mask).all()


def test_one_prompt_one_token_and_its_frequencies(tiny, tiny_params, prompts):
    """P = 1, T = 1: the whole sampler against the softmax of one forward."""
    sampling = Sampling(temperature=TEMPERATURE, top_p=0.95)
    sample = build_sampler(tiny, sampling, 1, (5,))
    ids, lengths = prompts[0][:1], prompts[1][:1]
    got = sample({"params": tiny_params}, ids, lengths, jax.random.key(0), num_generations=4096)
    assert got.ids.shape == (1, 4096, 1) and np.asarray(got.mask).all()
    np.testing.assert_array_equal(got.ended, np.asarray(got.ids)[..., 0] == 5)
    hidden, _ = tiny.apply({"params": tiny_params}, ids, lengths, method="prefill")
    scores = np.asarray(output_logits(tiny.config, tiny_params, hidden))[0]
    assert_drawn_from(np.ravel(got.ids), warp(scores, sampling))
    wanted = jax.nn.log_softmax(scores / TEMPERATURE)[np.ravel(got.ids)]
    np.testing.assert_allclose(np.ravel(got.logps), wanted, atol=2e-5)
