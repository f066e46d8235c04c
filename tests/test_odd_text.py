"""Texts that nobody would write: encoders and tokenizers take every Python string."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import make_hub

from grpo_jax import hub
from grpo_jax.rewards.embedding import embed
from grpo_jax.text.measures import MAX_CHARS, encodable, is_empty, is_odd, repeated_share, sanitise
from grpo_jax.text.scripts import script_shares, units
from grpo_jax.text.tokenizer import Tokenizer

ODD = {
    "lone surrogates": "a\ud800 b\udfff", "NULs": "a\0b\0", "unassigned": "\u0378\U0010ffff\ufdd0",
    "right to left": "\u202e\u200fabc\u202c", "empty": "", "spaces": " \t\n\u3000",
    "zero width": "\u200b\ufeff\u2060", "1 MB of a": "a" * 10**6, "1 MB of NUL": "\0" * 10**6,
    "1 MB of marks": "e" + "\u0301" * 10**6, "grows eighteenfold": "\ufdfa" * 330_000,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> hub.SentenceEncoder:
    folder = tmp_path_factory.mktemp("encoder")
    make_hub.write_encoder(folder, "mean")
    return hub.load_encoder(folder, batch_size=8)


@pytest.mark.parametrize("name", ODD)
def test_an_encoder_takes_any_text(encoder: hub.SentenceEncoder, name: str) -> None:
    vectors = encoder.embed([ODD[name], "the cat"])
    assert vectors.shape == (2, encoder.dim) and np.isfinite(vectors).all()
    np.testing.assert_allclose(vectors[1], encoder.embed(["the cat"])[0], atol=1e-6)


def test_a_text_that_an_encoders_tokenizer_refuses_has_no_vector(
    encoder: hub.SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = type(encoder.tokenizer).__call__

    def reads(self: Any, texts: list[str], **options: Any) -> Any:
        if "dog" in texts:
            raise Exception("Missing [UNK] token from the vocabulary")  # as the Rust library does
        return read(self, texts, **options)

    wanted = encoder.embed(["the cat", "a cat"])
    monkeypatch.setattr(type(encoder.tokenizer), "__call__", reads)
    with pytest.raises(ValueError, match="the tokenizer cannot encode: Missing"):
        encoder.embed(["dog"])
    vectors = embed(encoder, ["the cat", "dog", "a cat", "dog"])
    np.testing.assert_allclose(vectors[[0, 2]], wanted, atol=1e-6)
    assert not vectors[[1, 3]].any()


@pytest.mark.parametrize("name", ODD)
def test_measures_of_any_text_take_little_time(name: str) -> None:
    start = time.process_time()
    text = sanitise(ODD[name])
    text.encode()
    assert len(text) <= MAX_CHARS and "\0" not in text
    share = repeated_share(units(text))
    assert 0.0 <= share < 1.0 and sum(script_shares(text).values()) < 1.0 + 1e-6
    assert is_empty(text) == (name in ("empty", "spaces", "zero width", "unassigned"))
    assert time.process_time() - start < 2.0  # 1 MB without the cut: up to 20 s


def test_a_tokenizer_takes_lone_surrogates(llama_folder: Path) -> None:
    tokenizer = Tokenizer.load(llama_folder)
    assert encodable("a\ud800\0") == "a\ufffd\0"
    assert tokenizer.encode("a\ud800b") == tokenizer.encode("a\ufffdb")
    assert tokenizer.decode([tokenizer.encode("x\0y")]) == ["x\0y"]  # NUL is a byte like any other


def test_odd_texts_are_those_that_are_changed_before_they_are_scored() -> None:
    assert [is_odd(text) for text in ("", "ཡིག", "a\0b", "\ud800", "x" * 10**6)] == [
        False, False, True, True, True,
    ]  # fmt: skip
