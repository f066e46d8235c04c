"""Rewards: the formulas, the shaping terms, caching, odd text, and the metrics of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import config
from grpo_jax.rewards import Scorer, build_anchor, calibrate_tau, terms, within_group_stats
from grpo_jax.rewards.anchors import shuffled_targets
from grpo_jax.rewards.lexical import against
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


@given(st.floats(0, 12), st.floats(0, 12), st.floats(0.05, 0.99))
@settings(max_examples=30, deadline=None)
def test_length_penalty_falls_to_its_plateau_and_rises_behind_it(
    a: float, b: float, low: float
) -> None:
    ratios = np.float32(sorted((a, b)))
    both = np.asarray(terms.length_penalty(ratios, 1.5, low))
    assert np.all((both >= 0) & (both <= 1))
    if ratios[1] <= 1.5:
        assert both[0] >= both[1]
    if ratios[0] >= low:
        assert both[0] <= both[1]
        np.testing.assert_array_equal(both, terms.length_penalty(ratios, 1.5))
    edges = terms.length_penalty(np.float32([0, low / 2, low, 1, 1.5, 2.25, 3]), 1.5, low)
    np.testing.assert_allclose(edges, [1, 0.5, 0, 0, 0, 0.5, 1], atol=1e-6)


def test_repeated_share_counts_ngrams_seen_before() -> None:
    assert repeated_share(list("ababab"), n=2) == pytest.approx(3 / 5)
    assert repeated_share(list("abc")) == 0.0
    assert repeated_share(units(TEXT)) == 0.0


def test_perfect_translation_gets_the_published_weights() -> None:
    rewards = scorer().score([TEXT], prompts(TEXT), tau=0.3)
    np.testing.assert_allclose(rewards.total, [[2.5]], atol=1e-5)
    assert set(rewards.terms) == {"semantic", "language", "length", "repetition"}
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


class ChattyEncoder(WordEncoder):
    """Gives every text a vector, as real encoders do: an empty one resembles all others."""

    def embed(self, texts: list[str]) -> np.ndarray:
        return super().embed(texts) + 1.0


@pytest.mark.parametrize("empty", ["", "  \n", "\u200b\u200e"])
def test_empty_completion_is_zero_in_every_term(empty: str) -> None:
    one = Scorer(ChattyEncoder(), english, config.Reward(**SHAPED))  # type: ignore[arg-type]
    rewards = one.score([empty, TEXT], prompts(TEXT), tau=0.0)
    assert one.similarity_to_anchor([empty, TEXT], prompts(TEXT))[0] == 0
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

    def start(self, texts: list[str]) -> Callable[[], np.ndarray]:
        vectors = self.embed(texts)
        return lambda: vectors

    def embed_ids(self, ids: np.ndarray, lengths: np.ndarray) -> Callable[[], np.ndarray]:
        rows = zip(np.asarray(ids), lengths, strict=True)
        texts = [bytes(row[:n].tolist()).decode().lower() for row, n in rows]
        return lambda: WordEncoder().embed(texts)

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        rows = zip(texts, np.asarray(ids), lengths, strict=True)
        return np.array([text.lower() == bytes(row[:n].tolist()).decode() for text, row, n in rows])


def rollout_of(texts: list[str], ended: np.ndarray) -> Rollout:
    """P * G texts as bytes, with an end-of-sequence where they ended: bool [P, G]."""
    rows = [
        [*text.encode(), *([258] if done else [])]
        for text, done in zip(texts, ended.flat, strict=True)
    ]
    ids = np.zeros((len(texts), max(map(len, rows))), np.int32)
    mask = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, True
    shape = (*ended.shape, -1)
    zeros = np.zeros(ids.shape, np.float32)
    return Rollout(ids.reshape(shape), mask.reshape(shape), zeros.reshape(shape), ended)


def test_token_ids_score_as_their_texts_do() -> None:
    texts = ["a red fox", "A Red Fox", "", "a red fox and more"]  # the last one was cut off
    rollout = rollout_of(texts, np.array([[True, True], [True, False]]))
    one = Scorer(TokenEncoder(), english, config.Reward())
    batch = prompts("a red fox", "a blue whale")
    wanted = one.score(texts, batch, tau=0.1)
    one.encoder.seen.clear()
    got = one.score(texts, batch, 0.1, rollout)
    np.testing.assert_allclose(got.total, wanted.total, atol=1e-6)
    assert one.encoder.seen == ["A Red Fox"]  # the only one that went through text
    assert one.reads_tokens(Path("mine")) and not one.reads_tokens(Path("other"))
    assert not scorer().reads_tokens(Path("mine"))


@pytest.mark.parametrize("as_tokens", [False, True])
def test_the_device_works_while_the_host_measures(as_tokens: bool) -> None:
    happened: list[str] = []

    class Slow(TokenEncoder):
        def start(self, texts: list[str]) -> Callable[[], np.ndarray]:
            return self.noted("texts", self.embed(texts))

        def embed_ids(self, ids: np.ndarray, lengths: np.ndarray) -> Callable[[], np.ndarray]:
            return self.noted("ids", super().embed_ids(ids, lengths)())

        def noted(self, what: str, vectors: np.ndarray) -> Callable[[], np.ndarray]:
            happened.append(f"{what} started")
            return lambda: happened.append(f"{what} waited for") or vectors  # type: ignore[func-returns-value]

    def gate(texts: list[str]) -> np.ndarray:
        happened.append("measured")
        return np.ones(len(texts), bool)

    texts = ["a red fox"] * 4
    rollout = rollout_of(texts, np.ones((2, 2), bool)) if as_tokens else None
    one = Scorer(Slow(), gate, config.Reward())
    one.score(texts, prompts("a red fox", "a blue whale"), 0.1, rollout)
    measured = happened.index("measured")
    wanted = {"texts started", "ids started"} if as_tokens else {"texts started"}
    assert set(happened[:measured]) == wanted
    assert all("waited" in word for word in happened[measured + 1 :])
    assert len(happened) == 2 * 2 + 1  # completions and anchors


class FailingEncoder(TokenEncoder):
    """Raises for a batch with a text that holds "\u2e31", as an encoder does and a tokenizer."""

    def embed(self, texts: list[str]) -> np.ndarray:
        if any("\u2e31" in text for text in texts):
            raise KeyError("\u2e31")
        return super().embed(texts) + 1.0

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.embed(texts)
        return super().same_tokens(texts, ids, lengths)


class LateFailingEncoder(FailingEncoder):
    """Fails when it is waited for, as a device does."""

    def start(self, texts: list[str]) -> Callable[[], np.ndarray]:
        return lambda: self.embed(texts)


@pytest.mark.parametrize("encoder", [FailingEncoder, LateFailingEncoder])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_a_text_on_which_the_encoder_fails_scores_0_and_is_counted(
    as_tokens: bool, encoder: type[FailingEncoder], caplog: pytest.LogCaptureFixture
) -> None:
    one = Scorer(encoder(), english, config.Reward(**SHAPED))  # type: ignore[arg-type]
    texts = [TEXT, "the \u2e31", TEXT, ""]
    rollout = rollout_of(texts, np.ones((1, 4), bool)) if as_tokens else None
    rewards = one.score(texts, prompts(TEXT), 0.0, rollout)
    np.testing.assert_array_equal(rewards.unread, [[False, True, False, False]])
    for values in (rewards.total, rewards.similarity, *rewards.terms.values()):
        assert values[0, 1] == 0
    assert rewards.total[0, 0] > 2
    whole = one.score([TEXT, TEXT], prompts(TEXT), 0.0)
    np.testing.assert_array_equal(rewards.total[0, [0, 2]], whole.total[0])
    assert caplog.text.count("the encoder fails on 'the \u2e31', which scores 0 (KeyError") == 1
    np.testing.assert_array_equal(
        one.similarity([TEXT, "\u2e31"], [TEXT, TEXT]) > 0.9, [True, False]
    )
    row = prompts("\u2e31 in a reference")
    assert one.score([TEXT, "a"], row, 0.0).unread.all()


def test_an_encoder_that_fails_on_everything_ends_the_run() -> None:
    class Broken(WordEncoder):
        def embed(self, texts: list[str]) -> np.ndarray:
            raise ValueError("no weights")

    with pytest.raises(ValueError, match="no weights"):
        Scorer(Broken(), english, config.Reward()).score([TEXT], prompts(TEXT), 0.0)  # type: ignore[arg-type]


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


TIBETAN = ("བོད་ཡིག་ནི་སྐད་ཡིག་ཡིན།", "བོད་ཡིག་ནི་ཡིག་རིགས་ཡིན།")
PAIRS = [
    (TEXT, "the quick brown fox jumped over a lazy dog near the stone bridge"),
    (TEXT, "the"),
    ("It's 3.50, isn't it?", "it's \"3.50\", isn't it?"),
    ("Caffeine", "a cat"),
    TIBETAN,
    ("今天天气很好。", "今天的天气好。"),
]


def tokens(text: str) -> str:
    """Syllables or characters of the unspaced examples, cut by hand."""
    for mark in "།。":
        text = text.replace(mark, " ")
    return " ".join(text.replace("་", " ").split() if "་" in text else "".join(text.split()))


@pytest.mark.parametrize(("anchor", "text"), PAIRS)
def test_lexical_scores_are_sacrebleus(anchor: str, text: str) -> None:
    chrf = sacrebleu.sentence_chrf(text, [anchor], word_order=2).score / 100
    if anchor.isascii():
        bleu = sacrebleu.sentence_bleu(text, [anchor]).score / 100
    else:
        bleu = sacrebleu.sentence_bleu(tokens(text), [tokens(anchor)], tokenize="none").score / 100
        assert bleu > 0
    np.testing.assert_allclose(against("chrf", anchor, [text, "x", text])[[0, 2]], chrf, atol=1e-7)
    np.testing.assert_allclose(against("bleu", anchor, [text, "x", text])[[0, 2]], bleu, atol=1e-7)


@pytest.mark.parametrize("metric", ["cosine", "chrf", "bleu"])
@given(st.text(min_size=1, max_size=30), st.text(max_size=30))
@settings(max_examples=25, deadline=None)
def test_every_metric_is_1_for_the_same_text_and_0_for_none(
    metric: str, anchor: str, other: str
) -> None:
    if not units(sanitise(anchor)):
        anchor += "word"
    one = scorer(metric=metric)
    same, empty, any_text = one.similarity_to_anchor([anchor, " ", other], prompts(anchor))
    assert same == pytest.approx(1.0, abs=1e-5) and empty == 0 and 0 <= any_text <= 1.0001


@pytest.mark.parametrize("metric", ["cosine", "chrf", "bleu"])
def test_similarity_to_anchor_is_what_score_uses(metric: str) -> None:
    one = scorer(metric=metric)
    batch = prompts(TEXT, "a cat sat on a mat")
    texts = [TEXT, "a quick fox", "", "a cat sat on the mat", "dog", "a cat sat on a mat"]
    alone = one.similarity_to_anchor(texts, batch)
    rewards = one.score(texts, batch, tau=0.2)
    assert alone.dtype == np.float32 and alone.shape == (6,)
    np.testing.assert_allclose(np.reshape(rewards.similarity, -1), alone, atol=1e-6)
    wanted = np.clip((alone - 0.2) / 0.8, 0, 1)
    np.testing.assert_allclose(np.reshape(rewards.terms["semantic"], -1), wanted, atol=1e-6)
    assert alone[0] == pytest.approx(1) and alone[2] == 0 and 0.2 < alone[3] < 1
    assert one.similarity_to_anchor([], []).shape == (0,)


@pytest.mark.parametrize("metric", ["chrf", "bleu"])
def test_lexical_rewards_leave_the_encoder_alone(metric: str) -> None:
    encoder = TokenEncoder()
    one = Scorer(encoder, english, config.Reward(metric=metric))
    one.score([TEXT, "fox"], prompts(TEXT), tau=0.1)
    one.similarity_to_anchor([TEXT], prompts(TEXT))
    assert encoder.seen == [] and not one.reads_tokens(Path("mine"))
    np.testing.assert_allclose(one.similarity(["a b"], ["b a"]), [1], atol=1e-6)  # evaluation's
    assert encoder.seen


def test_shuffling_deranges_and_uses_every_target_as_often() -> None:
    targets = [f"sentence {i % 30}" for i in range(50)] + ["", "Sentence  0 "]
    others = shuffled_targets(targets, seed=1)
    plain = [target.casefold().split() for target in targets]
    for mine, other in zip(plain, others, strict=True):
        assert (other.casefold().split() != mine) if mine else other == ""
    assert len({(t, o) for t, o in zip(targets[:50], others, strict=False)}) == 30
    assert len(set(others)) == 31  # a permutation of the distinct ones, and ''
    assert shuffled_targets(targets, seed=1) == others != shuffled_targets(targets, seed=2)
    assert shuffled_targets(targets[::-1], seed=1) == others[::-1]
    for few in ([], ["a", "A "], ["", "a"]):
        with pytest.raises(ValueError, match="distinct targets"):
            shuffled_targets(few, seed=0)


def test_shuffling_stays_within_its_part_of_the_data() -> None:
    train, dev = prompts("a", "b", "c"), prompts("x", "y", "a")
    anchor_of = build_anchor("shuffled", [train, train[::-1], dev], seed=3)
    assert {anchor_of(row) for row in train} == {"a", "b", "c"}
    assert {anchor_of(row) for row in dev} == {"x", "y", "a"}
    assert all(anchor_of(row) != row.target for row in train + dev)
    with pytest.raises(ValueError, match="not prepared for"):
        anchor_of(Row("new", "a", "9"))
    with pytest.raises(ValueError, match="'shuffled' was not prepared"):
        scorer(anchor="shuffled").score(["a"], train[:1], tau=0.1)


@pytest.mark.parametrize("metric", ["cosine", "chrf", "bleu"])
def test_under_shuffled_references_being_right_earns_nothing(metric: str) -> None:
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("aeioubdgklmnrst"), 5)) for _ in range(400)]
    batch = prompts(*(" ".join(draw.choice(words, 12)) for _ in range(60)))
    right = [row.target for row in batch]
    wrong = right[7:] + right[:7]

    def gain(kind: str) -> float:
        cfg = config.Reward(metric=metric, anchor=kind)
        one = Scorer(WordEncoder(), english, cfg, build_anchor(kind, [batch], seed=0))
        tau = calibrate_tau(one.similarity_to_anchor(wrong, batch), 0.25)
        mean = [float(np.mean(one.score(texts, batch, tau).total)) for texts in (right, wrong)]
        return mean[0] - mean[1]

    assert gain("target") > 1.0 and abs(gain("shuffled")) < 0.1


def test_shuffled_lengths_are_the_shuffled_references() -> None:
    batch = prompts("one two three four", "one two")
    cfg = config.Reward(anchor="shuffled", length_weight=0.5, max_length_ratio=1.0)
    one = Scorer(WordEncoder(), english, cfg, build_anchor("shuffled", [batch]))
    rewards = one.score(["one two three four", "one two"], batch, tau=0.0)
    np.testing.assert_allclose(rewards.terms["length"], [[1.0], [0.0]])


SG_SRL = {
    "anchor": "source", "semantic_weight": 1.0, "language_weight": 0.0, "hard_gate": True,
    "length_weight": 0.2, "repetition_weight": 0.05, "tau": 0.0,
    "max_length_ratio": 2.5, "max_repetition": 0.15,
}  # fmt: skip


def sg_srl_batch() -> tuple[list[Row], list[str]]:
    batch = prompts("", "", sources=("a red fox ran", "the blue whale sang a song"))
    return batch, [
        "a red fox ran", "a red fox бла", "a red fox " * 5, "fox " * 9,
        "whale", "", "the blue whale sang", "whale song " * 3,
    ]  # fmt: skip


def test_sg_srl_is_its_formula() -> None:
    batch, texts = sg_srl_batch()
    one = scorer(**SG_SRL)
    rewards = one.score(texts, batch, tau=0.0)
    r = one.similarity(texts, [row.source for row in batch for _ in range(4)])
    n = np.array([len(text.split()) for text in texts])
    p_len = np.clip((n / np.median(n[n > 0]) - 2.5) / 2.5, 0, 1)
    rep = np.array([repeated_share(text.split()) for text in texts])
    p_rep = np.maximum(rep - 0.15, 0) / 0.85
    wanted = english(texts) * np.maximum(r - 0.20 * p_len - 0.05 * p_rep, 0)
    assert (p_len > 0).sum() == 1 and (p_rep > 0).sum() == 3 and (wanted == 0).sum() == 2
    np.testing.assert_allclose(np.reshape(rewards.total, -1), wanted, atol=1e-6)


def test_the_batchs_median_is_of_all_processes() -> None:
    batch, texts = sg_srl_batch()
    whole = scorer(**SG_SRL).score(texts, batch, tau=0.0)
    lengths = np.float32([len(text.split()) for text in texts]).reshape(2, 4)
    for process in (0, 1):

        def gather(mine: np.ndarray, process: int = process) -> np.ndarray:
            np.testing.assert_array_equal(mine, lengths[process : process + 1])
            return lengths

        cfg = config.Reward(**SG_SRL)  # type: ignore[arg-type]
        one = Scorer(WordEncoder(), english, cfg, gather=gather)
        part = one.score(texts[process * 4 : process * 4 + 4], batch[process : process + 1], 0.0)
        np.testing.assert_array_equal(part.total[0], whole.total[process])


def test_without_the_language_gate_its_rate_is_still_logged() -> None:
    texts = [TEXT, TEXT + " и ещё"]
    rewards = scorer(language_weight=0.0).score(texts, prompts(TEXT), tau=0.3)
    np.testing.assert_array_equal(rewards.terms["language"], [[1, 0]])
    np.testing.assert_allclose(rewards.total, 1.5 * rewards.terms["semantic"], rtol=1e-6)
    assert within_group_stats(rewards)["rewards/language/mean"] == 0.5


def test_leaving_words_out_costs_with_a_least_length() -> None:
    texts = [TEXT, " ".join(TEXT.split()[:7])]  # half of the words
    free = scorer(length_weight=0.5).score(texts, prompts(TEXT), tau=0.3)
    strict = scorer(length_weight=0.5, min_length_ratio=0.8).score(texts, prompts(TEXT), tau=0.3)
    np.testing.assert_array_equal(free.terms["length"], [[0, 0]])
    np.testing.assert_allclose(strict.terms["length"], [[0, 1 - 0.5 / 0.8]], atol=1e-6)
    assert strict.total[0, 0] == free.total[0, 0]
    lost = float(free.total[0, 1] - strict.total[0, 1])
    assert lost == pytest.approx(0.5 * (1 - 0.5 / 0.8), abs=1e-6)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="3 texts for 2 rows"):
        scorer().score(["a"] * 3, prompts("a", "b"), tau=0.1)
    with pytest.raises(ValueError, match="reward.tau"):
        scorer().score(["a"], prompts("a"), tau=1.0)
    with pytest.raises(ValueError, match="reward.anchor"):
        scorer(anchor="both")
    with pytest.raises(ValueError, match="reward.metric: got 'rouge'"):
        scorer(metric="rouge")


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
    stats = within_group_stats(Rewards(total, {"semantic": total / 2}, total, total < 0))
    assert stats["reward"] == 2 and stats["similarity"] == 2
    assert stats["frac_reward_zero_std"] == 0.5
    assert stats["reward_std"] == pytest.approx(np.sqrt(2) / 2)
    assert stats["rewards/semantic/mean"] == 1
    assert stats["rewards/semantic/std"] == pytest.approx(np.sqrt(2) / 4)
    assert all(isinstance(value, float) for value in stats.values())
    alone = within_group_stats(Rewards(total[:, :1], {}, total[:, :1], total[:, :1] < 0))
    assert alone["reward_std"] == 0 and alone["frac_reward_zero_std"] == 1
