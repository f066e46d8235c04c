"""General English out of WordNet: what a model should not forget while it learns.

In: WordNet's data files (`wndb(5)`): a synset a line, its gloss behind a bar, example sentences in
double quotes. Out: passages of a few example sentences and definitions each, one a line.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

_PARTS = ("noun", "verb", "adj", "adv")
_SENTENCES = 4  # a passage: about 60 tokens
_MIN_WORDS = 6  # shorter examples are phrases


def example_sentences(line: str) -> list[str]:
    """The example sentences in a line of a WordNet data file, as ordinary sentences.

    Args:
      line: a synset, e.g. '... | gain knowledge; "She learned dancing from her sister"'.

    Returns:
      Sentences with a capital letter and a full stop: ['She learned dancing from her sister.'].
    """
    _, _, gloss = line.partition(" | ")
    sentences = []
    for text in re.findall(r'"([^"]+)"', gloss):
        text = text.strip(" ;")
        if len(text.split()) >= _MIN_WORDS:
            stop = "" if text[-1] in ".!?" else "."
            sentences.append(text[0].upper() + text[1:] + stop)
    return sentences


def definition(line: str) -> str:
    """The definition in a line of a WordNet data file as a sentence, or '' without one.

    '... v 01 relearn 0 001 ... | learn again; "..."' gives 'Relearn: learn again.'
    """
    head, bar, gloss = line.partition(" | ")
    text = re.sub(r'"[^"]*"', "", gloss).strip(" ;\n")
    fields = head.split(" ")
    if not bar or not text or len(fields) < 5:
        return ""
    word = re.sub(r"\(.*\)$", "", fields[4]).replace("_", " ")
    return f"{word[0].upper()}{word[1:]}: {text}."


def passages(folder: Path) -> list[str]:
    """Passages of general English, in an order that mixes subjects but never changes.

    Args:
      folder: WordNet's `dict` folder with data.noun, data.verb, data.adj and data.adv.

    Returns:
      Passages of four sentences: three examples of use, one definition.
    """
    examples: dict[str, None] = {}
    glosses: dict[str, None] = {}
    for part in _PARTS:
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                continue  # the licence
            examples.update(dict.fromkeys(example_sentences(line)))
            if text := definition(line):
                glosses[text] = None
    used, defined = sorted(examples, key=_shuffled), sorted(glosses, key=_shuffled)
    step = _SENTENCES - 1
    count = min(len(used) // step, len(defined))
    return [" ".join([*used[i * step : (i + 1) * step], defined[i]]) for i in range(count)]


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
