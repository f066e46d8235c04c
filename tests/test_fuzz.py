"""A seeded sample of the damaged files that `python -m tests.faults.fuzz` makes by the million."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo_jax.text.strict import inside, parse_json, shown
from tests.faults.fuzz import fuzz

INPUTS = {"tokenizer": 80, "sentencepiece": 80, "gguf": 80, "adapter": 100, "checkpoint": 12}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "reader",
    ["jsonl", "csv", "tsv", "parquet", "decoder-config", "encoder-config", "modules", "tokenizer",
     "sentencepiece", "safetensors", "shard-index", "gguf", "adapter", "tasks", "checkpoint"],
)  # fmt: skip
def test_damaged_files_are_refused_in_words(reader: str) -> None:
    inputs = INPUTS.get(reader, 200)
    result = fuzz(reader, inputs, seed=7)
    assert not result.crashes
    assert result.tried == inputs and 0 < result.accepted < inputs


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[1e999]", "too large"),
        ("9" * 5000, "a number of 5000 digits"),
        ('["\\ud800"]', "a lone surrogate"),
        (b"\xff", "byte 0 is not UTF-8"),
        ("{", "Expecting property name"),
    ],
)
def test_json_is_read_within_bounds(text: str | bytes, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse_json(text)


def test_json_within_the_bounds_is_what_python_reads() -> None:
    text = "[" * 63 + '1, -2.5, "\\ud83d\\ude00", {"a": null, "b": ' + "1" * 300 + "}" + "]" * 63
    assert parse_json(text) == json.loads(text)
    assert parse_json("[1e999, Infinity]", lenient=True) == [float("inf")] * 2


@pytest.mark.parametrize(
    "name", ["..", "../x", "/x", "a/../../x", "C:\\x", "a\0b", "\\x", 3, "out"]
)
def test_names_cannot_leave_their_folder(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="no name of something in the folder"):
        inside(folder, name, folder / "modules.json")
    assert inside(folder, "1_Pooling", folder / "modules.json") == folder / "1_Pooling"
    assert inside(folder, "", folder / "modules.json") == folder


def test_values_in_messages_are_short_and_visible() -> None:
    for value in ("\x1b[2J" * 999, ["\ud800"] * 999, {"a": "b" * 9999}, 10**300):
        text = shown(value)
        assert len(text) <= 200 and text.isprintable()
