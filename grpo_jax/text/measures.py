"""Small measures of a text, shared by rewards and evaluation: strings in, strings and numbers out.

Model output is arbitrary Unicode. `sanitise` makes any Python string fit for a tokenizer, and
`is_empty` and `repeated_share` are defined for every string.
"""

from __future__ import annotations

import re
import unicodedata

MAX_CHARS = 20_000  # far beyond any encoder's window; keeps a runaway text from stalling a step

_SURROGATES = re.compile("[\ud800-\udfff]")
_UNSAFE = re.compile("[\x00\ud800-\udfff]")


def sanitise(text: str, most: int = MAX_CHARS) -> str:
    """Makes `text` encodable: NUL and lone surrogates become U+FFFD; at most `most` characters."""
    return _UNSAFE.sub("\ufffd", text[:most])


def is_odd(text: str) -> bool:
    """True for a text that `sanitise` has to change: NULs, lone surrogates, an endless one."""
    return sanitise(text) != text


def encodable(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which no tokenizer takes; nothing else changes."""
    return _SURROGATES.sub("\ufffd", text)


def is_empty(text: str) -> bool:
    """True when nothing would be visible: only spaces, controls and zero-width characters."""
    return all(unicodedata.category(char)[0] in "ZC" for char in text)


def repeated_share(units: list[str], n: int = 4) -> float:
    """Share of the n-grams of `units` that occurred before, in [0, 1).

    Fewer than n units hold no n-gram and give 0. "a b a b a b" at n = 2: ab ba ab ba ab, so 3 / 5.
    """
    total = len(units) - n + 1
    if total < 1:
        return 0.0
    distinct = {tuple(units[i : i + n]) for i in range(total)}
    return 1.0 - len(distinct) / total
