"""Unicode scripts, and text cut into units that make sense in any of them.

In: text. Out: the script of a character, the scripts of a text, and its units: words where a
script separates words, syllables in Tibetan, single characters where nothing separates anything
(Han, Thai, Khmer ...). ROUGE-L, repetition, lengths and the language gate count units, so that
they mean the same for English, Tibetan and Chinese.

Python's unicodedata has no script property; the names that it has begin with the script.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

COMMON = "Common"  # digits, punctuation, symbols, spaces: no script of their own

_NOT_A_SCRIPT = {"Modifier", "Combining", "Variation", ""}  # "MODIFIER LETTER APOSTROPHE"
_RENAMED = {"Cjk": "Han", "Ideographic": "Han", "Katakana-Hiragana": "Katakana"}
_TWO_WORDS = {"Old", "New", "Tai"}  # "OLD TURKIC", "TAI THAM": one word says too little
_UNSPACED = {
    "Han", "Hiragana", "Katakana", "Bopomofo", "Thai", "Lao", "Khmer", "Myanmar", "Javanese",
    "Balinese", "Tai Le", "Tai Tham", "Tai Viet", "New Tai", "Yi",
}  # fmt: skip
_ZERO_WIDTH_SPACE = "\u200b"
_PLAIN_APOSTROPHES = {0x2019: "'", 0x02BC: "'"}  # as in don't, and in Oromo's ka'aa


@cache
def script_of(char: str) -> str:
    """The script of one letter or mark, e.g. "Latin", "Han", "Tibetan"; "Common" for the rest.

    Compatibility forms count as what they stand for: a full-width A is Latin.
    """
    if unicodedata.category(char)[0] not in "LM":
        return COMMON
    plain = unicodedata.normalize("NFKC", char)[0]
    words = unicodedata.name(plain, "").title().split() or [""]
    script = " ".join(words[:2]) if words[0] in _TWO_WORDS else words[0]
    return COMMON if script in _NOT_A_SCRIPT else _RENAMED.get(script, script)


class _Classes(dict[int, str]):
    """Code point -> one letter: w(ord), t(ibetan), s(ingle), m(ark), apostrophe or a gap."""

    def __missing__(self, code: int) -> str:
        self[code] = kind = self._classify(chr(code))
        return kind

    @staticmethod
    def _classify(char: str) -> str:
        if char == "'":
            return char
        category = unicodedata.category(char)
        if category[0] == "M" or (category == "Cf" and char != _ZERO_WIDTH_SPACE):
            return "m"
        if category[0] not in "LN":
            return " "
        script = script_of(char)
        return "t" if script == "Tibetan" else "s" if script in _UNSPACED else "w"


_CLASSES = _Classes()
_UNIT = re.compile(r"w[wm]*(?:'w[wm]*)*|t[tm]*|sm*")


def units(text: str) -> list[str]:
    """Cuts text into case-folded words, syllables or characters; punctuation is left out.

    `units("It's 3 ཀ་ཁ 中文")` is `["it's", "3", "ཀ", "ཁ", "中", "文"]`. Compatibility forms and the
    typographic apostrophes are made plain first, so that equal words compare equal.
    """
    text = unicodedata.normalize("NFKC", text).casefold().translate(_PLAIN_APOSTROPHES)
    return [text[m.start() : m.end()] for m in _UNIT.finditer(text.translate(_CLASSES))]


def script_shares(text: str) -> dict[str, float]:
    """The share of each script among the units that have letters; {} if none has.

    Units and not letters are counted, so that one Latin name in a Tibetan or Chinese sentence
    weighs as much as one syllable or character, and not as its seven letters.
    """
    return shares_of(units(text))


def shares_of(pieces: Sequence[str]) -> dict[str, float]:
    """`script_shares` of a text that has been cut into units."""
    counts = Counter(script_of(piece[0]) for piece in pieces)
    counts.pop(COMMON, None)
    total = sum(counts.values())
    return {script: count / total for script, count in counts.most_common()}


def written_without_spaces(texts: Sequence[str]) -> bool:
    """True when `units` finds over twice as many pieces as there are stretches between spaces."""
    words = sum(len(text.split()) for text in texts)
    return sum(len(units(text)) for text in texts) > 2 * words
