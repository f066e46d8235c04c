"""Choose the right meaning of four: multiple choice out of WordNet, for what a model has kept.

In: WordNet's data and index files (`wndb(5)`). Out: rows {"question", "choices", "answer"}. Asked
is the first sense of common words (tagged in WordNet's corpus); the three wrong meanings are first
senses of other common words of the same part of speech.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_WORD = re.compile(r"[a-z]{3,}")  # no names, phrases or abbreviations
_CHOICES = 4


def first_sense(line: str) -> tuple[str, int] | None:
    """(word, offset of its first sense) in a line of an index file; None for an uncommon word.

    'abet v 1 2 @ + 1 1 02549211' has one pointer list, then the number of senses, of those that are
    tagged in the corpus, and the senses' offsets, the commonest first.
    """
    fields = line.split()
    if line.startswith(" ") or not fields or not _WORD.fullmatch(fields[0]):
        return None
    pointers = int(fields[3])
    tagged, offset = fields[4 + pointers + 1], fields[4 + pointers + 2]
    return (fields[0], int(offset)) if int(tagged) > 0 else None


def gloss(line: str) -> str:
    """The first definition of a synset: 'learn again' of '... | learn again; "He relearned"'."""
    return re.split(r'[;"]', line.partition(" | ")[2], maxsplit=1)[0].strip(" :,-")


def questions(folder: Path) -> list[dict[str, Any]]:
    """All questions, in an order that mixes subjects but never changes.

    Args:
      folder: WordNet's `dict` folder with data.* and index.* of its four parts of speech.

    Returns:
      Rows as evals.task_files.read_choices reads them. A meaning that has the word in it is not
      asked for, and no two choices are the same.
    """
    rows = []
    for part, name in _PARTS.items():
        glosses = _glosses(folder / f"data.{part}")
        index = (folder / f"index.{part}").read_text(encoding="utf-8").splitlines()
        senses = [sense for line in index if (sense := first_sense(line)) is not None]
        asked = sorted(
            {word: glosses[offset] for word, offset in senses if glosses.get(offset)}.items(),
            key=lambda item: _hash(f"{part} {item[0]}"),
        )
        for place, (word, meaning) in enumerate(asked):
            if word[:4] in meaning.lower():  # "learner: someone who learns": too easy
                continue
            others: list[str] = []
            step = 1
            while len(others) < _CHOICES - 1 and step < len(asked):
                other = asked[(place + step) % len(asked)][1]
                if other != meaning and other not in others:
                    others.append(other)
                step += 1
            if len(others) < _CHOICES - 1:
                continue
            answer = _hash(f"answer {part} {word}") % _CHOICES
            choices = [*others[:answer], meaning, *others[answer:]]
            article = "an" if name[0] == "a" else "a"
            question = f'As {article} {name}, what does "{word}" mean?'
            rows.append({"question": question, "choices": choices, "answer": answer})
    return sorted(rows, key=lambda row: _hash(row["question"]))


def _glosses(file: Path) -> dict[int, str]:
    """Definitions by offset; the lines of the licence begin with spaces."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {int(line[:8]): gloss(line) for line in lines if not line.startswith(" ")}


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
