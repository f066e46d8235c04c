"""Which pairs are worth learning from: checks of a text and its English that assets share."""

from __future__ import annotations

import re
import unicodedata

# First and last character of a writing system, by the languages that are told by it.
SCRIPTS = {"dz": ("\u0f00", "\u0fff"), "ug": ("\u0600", "\u06ff")}

_TSHEG = "\u0f0b"  # between the syllables of a Tibetan or Dzongkha word
_ENGLISH = frozenset(
    "the of to and is in a you for that are or this with can be on by as not if from it your an "
    "will which when then at use has have was does also all".split()
)


def letters(text: str) -> str:
    """The letters of a text with the marks that belong to them; no digits, signs or spaces."""
    return "".join(c for c in text if unicodedata.category(c)[0] in "LM" or c == _TSHEG)


def words(text: str) -> list[str]:
    """What stands between spaces; in Tibetan writing, which has few, the syllables."""
    return text.replace(_TSHEG, " ").split()


def mostly_english(text: str) -> bool:
    """Whether a quarter of the words, and at least two of them, are English function words."""
    found = re.findall(r"[^\W\d_]+", text.lower())
    hits = sum(word in _ENGLISH for word in found)
    return hits >= 2 and hits >= len(found) / 4


def is_pair(source: str, target: str, language: str) -> bool:
    """Whether `source` is a text of the language, and not what `target` says in English.

    Formulas, numbers and signs are no text; equal letters are a text left in English. Of a
    language in SCRIPTS, half of the letters must be of its script.
    """
    kept = [letters(text) for text in (source, target)]
    wordy = all(
        2 * len(some) >= len(text) > 0 for some, text in zip(kept, (source, target), strict=True)
    )
    if not wordy or kept[0].casefold() == kept[1].casefold() or mostly_english(source):
        return False
    if language not in SCRIPTS:
        return True
    first, last = SCRIPTS[language]
    return 2 * sum(first <= c <= last for c in kept[0]) >= len(kept[0])
