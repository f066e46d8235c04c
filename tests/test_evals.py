"""Evaluation: metrics against their reference implementations, intervals, floors, the judge."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax import hub
from grpo_jax.evals.floors import copy_source, translation_memory
from grpo_jax.evals.metrics import (
    paired_bootstrap,
    statistics,
    translation_metrics,
)
from grpo_jax.rewards import similarity
from grpo_jax.text.scripts import written_without_spaces

WORDS = [
    "the",
    "a",
    "menu",
    "opens",
    "closes",
    "file",
    "page",
    "cell",
    "red",
    "small",
    "sheet",
    "on",
]


def sentences(n: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 16))) + "." for _ in range(n)]


def damaged(texts: list[str], share: float, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        " ".join(rng.choice(WORDS) if rng.random() < share else word for word in text.split())
        for text in texts
    ]


def score(hyps: list[str], refs: list[str], bootstrap: int = 0, **names: np.ndarray) -> dict:
    sources = [f"madda {i}" for i in range(len(hyps))]
    gate = np.ones(len(hyps), bool)
    return translation_metrics(hyps, refs, sources, names, gate, bootstrap, seed=1)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_chrf_and_bleu_equal_sacrebleu(share: float) -> None:
    from sacrebleu.metrics import BLEU, CHRF

    refs = sentences(40, 0)
    hyps = damaged(refs, share, 1)
    hyps[3], hyps[7] = "", "x"
    found = score(hyps, refs)
    chrf = CHRF(word_order=2).corpus_score(hyps, [refs]).score
    assert found["chrf++"]["value"] == pytest.approx(chrf, abs=1e-9)
    assert found["bleu"]["value"] == pytest.approx(
        BLEU().corpus_score(hyps, [refs]).score, abs=1e-9
    )


@pytest.mark.parametrize(
    "hyps, refs",
    [
        (["a b c x y", "p q"], ["a b c d e", "p q r"]),  # no 4-gram matches: smoothed
        (["a z y x w", "q"], ["a b c d e", "r"]),  # three orders without a match
        (["x y z w"], ["a b c d"]),  # nothing matches
        (["a b"], ["a b"]),  # too short for a 4-gram
        (["", ""], ["a", "b"]),
    ],
)
def test_bleu_smoothing_equals_sacrebleu(hyps: list[str], refs: list[str]) -> None:
    from sacrebleu.metrics import BLEU

    expected = BLEU().corpus_score(hyps, [refs]).score
    assert score(hyps, refs)["bleu"]["value"] == pytest.approx(expected, abs=1e-9)


def test_a_perfect_and_an_empty_system() -> None:
    refs = sentences(10, 0)
    best = score(refs, refs)
    assert all(best[name]["value"] == pytest.approx(100) for name in ("chrf++", "bleu", "rouge_l"))
    assert best["length_ratio"]["value"] == 1 and best["empty_rate"]["value"] == 0
    worst = score([""] * 10, refs)
    assert all(worst[name]["value"] == 0 for name in ("chrf++", "bleu", "rouge_l", "length_ratio"))
    assert worst["empty_rate"]["value"] == 1 and worst["copy_rate"]["value"] == 0


def test_rouge_and_bleu_split_scripts_without_spaces() -> None:
    refs = ["བོད་ཡིག་སློབ་གྲྭ་ཆེན་མོ", "我们今天学习新的语言"]
    hyps = ["བོད་ཡིག་སློབ་ཁང་ཆེན་མོ", "我们昨天学习新的语言"]
    assert written_without_spaces(refs) and not written_without_spaces(["two words", "one"])
    found = score(hyps, refs)
    assert found["rouge_l"]["value"] == pytest.approx(100 * (5 / 6 + 9 / 10) / 2)
    assert 20 < found["bleu"]["value"] < 100


def test_rates_say_what_happened() -> None:
    sources = ["faayila banuu", "Calc", "fuula haaraa", "kan biraa"]
    refs = ["open the file", "Calc", "a new page", "another one"]
    hyps = ["Faayila banuu", "Calc", "page page page page page page page", ""]
    gate = np.array([False, True, True, False])
    cosines = {"similarity": np.array([0.0, 1.0, 0.5, 0.1])}
    found = translation_metrics(hyps, refs, sources, cosines, gate, 0, 0)
    value = {name: entry["value"] for name, entry in found.items()}
    assert value["copy_rate"] == 0.25  # "Calc" is its own translation
    assert value["language_consistency"] == 0.5 and value["empty_rate"] == 0.25
    assert value["similarity"] == pytest.approx(0.4)
    assert value["repeated_4grams"] == pytest.approx(0.75 / 4)
    assert value["length_ratio"] == pytest.approx((2 + 1 + 7 + 0) / (3 + 1 + 3 + 2))


def test_rows_without_reference_leave_reference_metrics_alone() -> None:
    refs, hyps = sentences(6, 0), damaged(sentences(6, 0), 0.3, 1)
    with_gaps = score([*hyps, "anything"], [*refs, ""])
    assert with_gaps["chrf++"]["value"] == pytest.approx(score(hyps, refs)["chrf++"]["value"])
    alone = score(hyps, [""] * 6)
    assert "chrf++" not in alone and "language_consistency" in alone


def test_intervals_hold_the_value_and_have_the_right_width() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.2, 200)
    refs = sentences(200, 0)
    found = score(damaged(refs, 0.4, 2), refs, bootstrap=2000, similarity=values)
    for entry in found.values():
        assert entry["low"] <= entry["value"] <= entry["high"]
    width = found["similarity"]["high"] - found["similarity"]["low"]
    assert width == pytest.approx(2 * 1.96 * values.std() / np.sqrt(200), rel=0.08)
    assert found == score(damaged(refs, 0.4, 2), refs, bootstrap=2000, similarity=values)


def test_bootstrap_of_a_corpus_metric_equals_scoring_the_resample() -> None:
    from sacrebleu.metrics import CHRF

    refs = sentences(12, 0)
    hyps = damaged(refs, 0.5, 1)
    rows, value = statistics(hyps, refs, refs, {}, np.ones(12))["chrf++"]
    drawn = np.random.default_rng(3).integers(0, 12, 12)
    again = CHRF(word_order=2).corpus_score([hyps[i] for i in drawn], [[refs[i] for i in drawn]])
    assert value(np.bincount(drawn, minlength=12) @ rows) == pytest.approx(again.score, abs=1e-9)


def test_paired_bootstrap_sees_a_real_difference_and_no_other() -> None:
    refs = sentences(120, 0)

    def arm(share: float, seed: int) -> dict:
        hyps = damaged(refs, share, seed)
        return statistics(hyps, refs, ["s"] * 120, {}, np.ones(120))

    worse, better, same = arm(0.5, 1), arm(0.35, 2), arm(0.5, 3)
    gain = paired_bootstrap(worse, better, 1000, 0)["chrf++"]
    assert gain["difference"] > 0 and gain["low"] > 0 and gain["p"] < 0.01
    tie = paired_bootstrap(worse, same, 1000, 0)["chrf++"]
    assert tie["low"] < 0 < tie["high"] and tie["p"] > 0.05
    assert paired_bootstrap(worse, worse, 100, 0)["bleu"]["p"] == 1
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap(worse, statistics(["a"], ["a"], ["a"], {}, np.ones(1)), 10, 0)


def test_metrics_reject_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score([], [])
    with pytest.raises(ValueError, match="2 hypotheses and {'references': 1}"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="similarity holds values that are not finite"):
        score(["a"], ["a"], similarity=np.array([np.nan]))
    assert score(["\ud800 \0"], ["a b"])["chrf++"]["value"] == 0


def test_copy_floor() -> None:
    assert copy_source(["a", "b"]) == ["a", "b"]


def test_translation_memory_finds_the_nearest_source() -> None:
    train = ["faayila haaraa banuu", "fuula cufuu", "barruu filachuu", "中文句子"]
    targets = ["open a new file", "close the page", "select the text", "a Chinese sentence"]
    asked = ["Faayila  haaraa banu", "barruu kana filachuu", "中文", "qqq", ""]
    found = translation_memory(asked, train, targets)
    assert found == [targets[0], targets[2], targets[3], "", ""]
    assert translation_memory(train, train, targets) == targets
    assert translation_memory(["fuula cufuu"], train, ["x", "", "y", "z"]) != [""]  # no target
    assert translation_memory(["a"], [], []) == [""]


def test_translation_memory_cosine_is_the_brute_force_one() -> None:
    from collections import Counter

    train, asked = sentences(60, 0), damaged(sentences(10, 5), 0.2, 1)

    def grams(text: str) -> Counter:
        text = f" {text} "
        return Counter(text[i : i + n] for n in (2, 3, 4) for i in range(len(text) - n + 1))

    df = Counter(gram for text in train for gram in grams(text))

    def vector(text: str) -> dict[str, float]:
        return {
            gram: (1 + np.log(count)) * np.log1p(60 / max(df[gram], 1))
            for gram, count in grams(text).items()
        }

    def cosine(a: dict[str, float], b: dict[str, float]) -> float:
        dot = sum(a[gram] * b.get(gram, 0.0) for gram in a)
        return dot / np.sqrt(sum(x * x for x in b.values()))  # the query's norm ranks nothing

    vectors = [vector(text) for text in train]
    best = [train[np.argmax([cosine(vector(text), v) for v in vectors])] for text in asked]
    assert translation_memory(asked, train, train) == best


@pytest.mark.assets
def test_judge_is_the_universal_sentence_encoder() -> None:
    encoder = hub.load_encoder("asset:use-multilingual-judge")
    texts = ["The file was opened.", "Someone opened the file.", "It rains in the mountains."]
    cosines = similarity(encoder, [*texts, "", "a \ud800 \0 b"], [texts[0]] * 5)
    assert cosines[0] == pytest.approx(1, abs=1e-5)
    assert cosines[1] == pytest.approx(0.78, abs=0.02) and abs(cosines[2]) < 0.3
    assert cosines[3] == 0 and np.isfinite(cosines[4])
