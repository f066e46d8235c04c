"""Rewards: the formulas, the shaping terms, caching, odd text, and the metrics of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import config
from grpo_jax.rewards import Scorer, calibrate_tau, terms, within_group_stats
from grpo_jax.structs import Rewards, Rollout, Row
from grpo_jax.text.measures import is_empty, repeated_share, sanitise
from grpo_jax.text.scripts import units

TEXT = "the quick brown fox jumps over the lazy dog near an old stone bridge"


class WordEncoder:
    """Bag of hashed words: order-blind and duplication-blind, as real encoders nearly are."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed(self, texts: list[str]) -> np.ndarray:
        self.seen += texts
        vectors = np.zeros((len(texts), 64), np.float32)
        for row, text in enumerate(texts):
            text.encode()  # as strict as a real tokenizer about surrogates
            assert "\0" not in text and len(text) < 100_000
            for word in units(text):
                place = int(hashlib.md5(word.encode()).hexdigest(), 16) % 64
                vectors[row, place] += 1.0
        return vectors


def english(texts: list[str]) -> np.ndarray:
    return np.array([text.isascii() and bool(text.strip()) for text in texts])


def prompts(*targets: str, sources: tuple[str, ...] = ()) -> list[Row]:
    sources = sources or tuple(f"source {i}" for i in range(len(targets)))
    return [Row(s, t, str(i)) for i, (s, t) in enumerate(zip(sources, targets, strict=True))]


def scorer(**overrides: object) -> Scorer:
    return Scorer(WordEncoder(), english, config.Reward(**overrides))  # type: ignore[arg-type]


SHAPED = {"length_weight": 0.2, "repetition_weight": 0.5, "max_length_ratio": 1.5}


@given(st.floats(-1, 1), st.floats(0, 0.95), st.floats(-1, 1))
@settings(max_examples=50, deadline=None)
def test_semantic_is_in_range_and_monotone(similarity: float, tau: float, other: float) -> None:
    low, high = sorted((similarity, other))
    a, b = (float(x) for x in terms.semantic(np.float32([low, high]), tau))
    assert 0 <= a <= b <= 1


def test_semantic_at_its_edges() -> None:
    values = terms.semantic(np.float32([-1, 0.4, 0.5, 0.75, 1.0, 1.0000001]), 0.5)
    np.testing.assert_allclose(values, [0, 0, 0, 0.5, 1, 1], atol=1e-6)


def test_penalties_start_and_end_where_they_say() -> None:
    np.testing.assert_allclose(
        terms.length_penalty(np.float32([0, 2, 3, 4, 9]), 2.0), [0, 0, 0.5, 1, 1]
    )
    np.testing.assert_allclose(
        terms.repetition_penalty(np.float32([0, 0.2, 0.6, 1]), 0.2), [0, 0, 0.5, 1], atol=1e-6
    )


def test_repeated_share_counts_ngrams_seen_before() -> None:
    assert repeated_share(list("ababab"), n=2) == pytest.approx(3 / 5)
    assert repeated_share(list("abc")) == 0.0
    assert repeated_share(units(TEXT)) == 0.0


def test_perfect_translation_gets_the_published_weights() -> None:
    rewards = scorer().score([TEXT], prompts(TEXT), tau=0.3)
    np.testing.assert_allclose(rewards.total, [[2.5]], atol=1e-5)
    assert set(rewards.terms) == {"semantic", "language"}
    assert rewards.total.dtype == np.float32


def test_said_twice_loses_by_repetition_and_by_length() -> None:
    twice = f"{TEXT}. {TEXT}"
    plain = scorer().score([TEXT, twice], prompts(TEXT), tau=0.3)
    assert plain.total[0, 1] == pytest.approx(float(plain.total[0, 0]), abs=1e-5)  # cosine is blind
    shaped = scorer(**SHAPED).score([TEXT, twice], prompts(TEXT), tau=0.3)
    assert shaped.terms["repetition"][0, 1] > 0.2
    assert shaped.terms["length"][0, 1] == pytest.approx(1 / 3, abs=1e-5)
    assert shaped.total[0, 1] < shaped.total[0, 0] - 0.1
    assert not np.any(shaped.terms["length"][0, 0]) and not np.any(shaped.terms["repetition"][0, 0])


def test_language_gate_fires_softly_and_hard() -> None:
    mixed = TEXT + " и ещё"
    soft = scorer().score([mixed], prompts(TEXT), tau=0.3)
    hard = scorer(hard_gate=True).score([mixed], prompts(TEXT), tau=0.3)
    assert soft.terms["language"][0, 0] == 0 and 0 < soft.total[0, 0] < 1.5
    assert hard.total[0, 0] == 0 and hard.terms["semantic"][0, 0] > 0


@pytest.mark.parametrize("empty", ["", "  \n", "\u200b\u200e"])
def test_empty_completion_is_zero_in_every_term(empty: str) -> None:
    rewards = scorer(**SHAPED).score([empty, TEXT], prompts(TEXT), tau=0.0)
    for values in (rewards.total, rewards.similarity, *rewards.terms.values()):
        assert values[0, 0] == 0
    assert rewards.total[0, 1] > 2


def test_nothing_scores_below_an_empty_completion() -> None:
    spam = "бла " * 80
    heavy = scorer(length_weight=2.0, repetition_weight=2.0)
    assert heavy.score([spam], prompts(TEXT), tau=0.3).total[0, 0] == 0


@pytest.mark.parametrize(
    "odd", ["a \ud800 lone surrogate", "a NUL \0 inside", "word " * 200_000, "\ufffd", "…!?", "42"]
)
def test_odd_text_has_a_defined_reward(odd: str) -> None:
    rewards = scorer(**SHAPED).score([odd, TEXT], prompts(TEXT), tau=0.3)
    assert np.isfinite(rewards.total).all() and np.isfinite(rewards.similarity).all()
    assert rewards.total[0, 0] < rewards.total[0, 1]


def test_sanitise_keeps_ordinary_text() -> None:
    assert sanitise("བོད་ཡིག 中文 ئۇيغۇر 😀") == "བོད་ཡིག 中文 ئۇيغۇر 😀"
    assert not is_empty(".") and is_empty("\u200d \t")


def test_an_encoder_that_breaks_down_scores_zero_similarity() -> None:
    values = terms.cosine(np.float32([[[np.nan, 1], [0, 0], [1, 1]]]), np.float32([[1, 1]]))
    np.testing.assert_allclose(values, [[0, 0, 1]], atol=1e-6)


def test_anchors_are_cached_by_row_and_give_the_same_numbers() -> None:
    one = scorer()
    batch = prompts(TEXT, "a cat sat on a mat")
    texts = [TEXT, "a dog sat on a mat", "a cat sat", "dog"]
    first = one.score(texts, batch, tau=0.1)
    one.encoder.seen.clear()
    second = one.score(texts, batch, tau=0.1)
    np.testing.assert_array_equal(first.total, second.total)
    assert "a cat sat on a mat" not in one.encoder.seen  # only completions were encoded again


def test_equal_completions_are_encoded_once() -> None:
    one = scorer()
    one.score([TEXT] * 4, prompts(TEXT), tau=0.1)
    assert one.encoder.seen.count(TEXT) == 2  # one completion, one anchor


class TokenEncoder(WordEncoder):
    """Reads bytes as tokens, and spells a text in lower case: other letters go through text."""

    def shares_tokenizer(self, folder: Path) -> bool:
        return folder.name == "mine"

    def embed_ids(self, ids: np.ndarray, lengths: np.ndarray) -> Callable[[], np.ndarray]:
        rows = zip(np.asarray(ids), lengths, strict=True)
        texts = [bytes(row[:n].tolist()).decode().lower() for row, n in rows]
        return lambda: WordEncoder().embed(texts)

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rows = zip(texts, np.asarray(ids), lengths, strict=True)
        return np.array([text.lower() == bytes(row[:n].tolist()).decode() for text, row, n in rows])


def test_token_ids_score_as_their_texts_do() -> None:
    texts = ["a red fox", "A Red Fox", "", "a red fox and more"]  # the last one was cut off
    ids, mask = np.zeros((2, 2, 20), np.int32), np.zeros((2, 2, 20), bool)
    ended = np.array([[True, True], [True, False]])
    for i, text in enumerate(texts):
        row = [*text.encode(), *([258] if ended.flat[i] else [])]
        ids.reshape(4, -1)[i, : len(row)], mask.reshape(4, -1)[i, : len(row)] = row, True
    rollout = Rollout(ids, mask, np.zeros(ids.shape, np.float32), ended)
    one = Scorer(TokenEncoder(), english, config.Reward())
    batch = prompts("a red fox", "a blue whale")
    wanted = one.score(texts, batch, tau=0.1)
    one.encoder.seen.clear()
    got = one.score(texts, batch, 0.1, rollout)
    np.testing.assert_allclose(got.total, wanted.total, atol=1e-6)
    assert one.encoder.seen == ["A Red Fox"]  # the only one that went through text
    assert one.reads_tokens(Path("mine")) and not one.reads_tokens(Path("other"))
    assert not scorer().reads_tokens(Path("mine"))


def test_anchor_source_needs_no_target() -> None:
    batch = prompts("", "", sources=("red fox", "blue whale"))
    long = "red fox " * 8
    rewards = scorer(anchor="source", **SHAPED).score(
        ["red fox", "whale", "red fox", long], batch, tau=0.1
    )
    assert rewards.similarity[0, 0] == pytest.approx(1.0, abs=1e-5)
    assert rewards.terms["length"][1, 1] == 1  # against the batch's median length
    with pytest.raises(ValueError, match="has none"):
        scorer().score(["a", "b"], batch, tau=0.1)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="3 texts for 2 rows"):
        scorer().score(["a"] * 3, prompts("a", "b"), tau=0.1)
    with pytest.raises(ValueError, match="reward.tau"):
        scorer().score(["a"], prompts("a"), tau=1.0)
    with pytest.raises(ValueError, match="reward.anchor"):
        scorer(anchor="both")


def test_similarity_pairs_texts_with_anchors() -> None:
    one = scorer()
    np.testing.assert_allclose(
        one.similarity(["a b", "c", "", "\ud800"], ["b a", "d", "x", "y"]), [1, 0, 0, 0], atol=1e-6
    )
    assert one.similarity([], []).shape == (0,)


def test_tau_is_a_clipped_quantile() -> None:
    dev = np.linspace(0, 1, 101)
    assert calibrate_tau(dev, 0.25) == pytest.approx(0.25)
    assert calibrate_tau(dev, 1.0) == 0.95
    assert calibrate_tau(-dev, 0.5) == 0.0
    for values, quantile, words in (
        (dev[:0], 0.2, "dev set is empty"),
        (np.array([np.nan, 0.1]), 0.2, "1 of 2"),
        (dev, 2.0, "tau_quantile"),
    ):
        with pytest.raises(ValueError, match=words):
            calibrate_tau(values, quantile)


def test_within_group_stats_use_the_spread_inside_groups() -> None:
    total = np.float32([[1, 1], [2, 4]])
    stats = within_group_stats(Rewards(total, {"semantic": total / 2}, total))
    assert stats["reward"] == 2 and stats["similarity"] == 2
    assert stats["frac_reward_zero_std"] == 0.5
    assert stats["reward_std"] == pytest.approx(np.sqrt(2) / 2)
    assert stats["rewards/semantic/mean"] == 1
    assert stats["rewards/semantic/std"] == pytest.approx(np.sqrt(2) / 4)
    assert all(isinstance(value, float) for value in stats.values())
    alone = within_group_stats(Rewards(total[:, :1], {}, total[:, :1]))
    assert alone["reward_std"] == 0 and alone["frac_reward_zero_std"] == 1
