"""Tokenizers out of GGUF files give the ids of the libraries that they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import regex
from test_gguf import WIDE, wide, write_gguf
from test_tokenizer import NASTY, write_sentencepiece

from grpo_jax.assets import synthetic
from grpo_jax.assets.tiny import _byte_chars
from grpo_jax.hub.gguf import convert_gguf
from grpo_jax.text.tokenizer import Tokenizer


def test_sentencepiece_in_gguf(tmp_path: Path) -> None:
    pieces = write_sentencepiece(tmp_path / "trained", "llama")
    size = pieces.get_piece_size()
    control, unused = pieces.is_control, pieces.is_unused
    types = [
        2 if pieces.is_unknown(i) else 3 if control(i) else 6 if pieces.is_byte(i) else 1
        for i in range(size)
    ]
    assert not any(map(unused, range(size)))
    spm = {
        "model": "llama", "tokens": [*map(pieces.id_to_piece, range(size)), "<|turn|>", "[PAD9]"],
        "scores": [*map(pieces.get_score, range(size)), -1e3, -1e3], "token_type": [*types, 3, 5],
        "eos_token_id": 2, "bos_token_id": 1, "unknown_token_id": 0, "eot_token_id": size,
    }  # fmt: skip
    embedding = {"token_embd.weight": np.zeros((size + 2, 256), np.float32)}
    tied = {k: v for k, v in wide().items() if k != "output.weight"} | embedding
    write_gguf(tmp_path / "a.gguf", tied, WIDE, spm)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert (tokenizer.vocab_size, set(tokenizer.eos_ids)) == (size + 2, {2, size})
    for text in [*NASTY, *(row["target"] for row in synthetic.pairs()[300:350])]:
        assert tokenizer.encode(text) == pieces.encode(text), text
        assert tokenizer.pretrained.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")
    assert tokenizer.encode_prompt("a", chat=False) == [1, *pieces.encode("a")]
    assert tokenizer.decode([[*pieces.encode("a b"), size]]) == ["a b"]
    write_gguf(tmp_path / "a.gguf", tied, WIDE, spm | {"add_bos_token": False})
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").encode_prompt("a", chat=False) == pieces.encode("a")


PUBLISHED = {  # the splits that Llama 3 and Qwen2 publish
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_splits(pre: str, tmp_path: Path) -> None:
    """Against the published regular expression and byte-pair encoding written out."""
    chars = _byte_chars()
    merges = ["h e", "l l", "he ll", "Ġ a", "1 2", "12 3", "123 4", "' s", "Ċ Ċ", "à ½", "Ġ Ġ"]
    whole = "Ġwaa'"[:4]  # "Ġwaa": no merge leads there, only Llama 3 takes it whole
    tokens = ["<|bos|>", "<|eos|>", *chars, *(m.replace(" ", "") for m in merges), whole]
    spec = {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "bos_token_id": 0,
        "eos_token_id": 1, "token_type": [3, 3] + [1] * (len(tokens) - 2),
    }  # fmt: skip
    tensors = {k: v for k, v in wide().items() if k != "output.weight"}
    tensors["token_embd.weight"] = np.zeros((len(tokens), 256), np.float32)
    write_gguf(tmp_path / "a.gguf", tensors, WIDE, spec)
    convert_gguf(tmp_path / "a.gguf", tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")

    def encode(text: str) -> list[int]:
        ids = []
        for piece in regex.findall(PUBLISHED[pre], text):
            word = [chars[byte] for byte in piece.encode()]
            if pre == "llama-bpe" and "".join(word) in tokens:
                word = ["".join(word)]
            for left, right in (merge.split(" ") for merge in merges):  # best first
                i = 0
                while i < len(word) - 1:
                    if word[i : i + 2] == [left, right]:
                        word[i : i + 2] = [left + right]
                    i += 1
            ids += [tokens.index(token) for token in word]
        return ids

    texts = [*NASTY, "hello hells 1234567", "it's IT'S waa waa'ee\n\n\n x \n", "a\r\n  b", "½ Ⅳ ٣٤"]
    for text in texts:
        if pre == "llama-bpe" or text.isascii():  # Qwen2 composes characters first
            assert tokenizer.encode(text) == encode(text), text
    assert (tokens.index(whole) in tokenizer.encode("a waa")) == (pre == "llama-bpe")
    bos = [0] if pre == "llama-bpe" else []
    assert tokenizer.encode_prompt("a", chat=False) == [*bos, *encode("a")]
