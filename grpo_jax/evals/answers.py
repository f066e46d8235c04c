"""Whether an answer about a text is right: exact match and F1, as SQuAD and CMRC define them.

Both compare with every answer that annotators gave, and the best counts. A question that the text
does not answer has none; then only a refusal is right.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from grpo_jax.text.scripts import units

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_REFUSAL = ["unanswerable"]


def squad_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 over words, 0 to 1 (Rajpurkar et al. 2016, 2018).

    Compared are lower-case words without ASCII punctuation and English articles. Words of an
    answer count as often as they stand in both texts, in any order.
    """
    return _best(_words(answer), [_words(gold) for gold in golds], _shared_words)


def cmrc_scores(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 over characters, 0 to 1 (CMRC 2018, Cui et al. 2019).

    For scripts without spaces. Compared are text.scripts' units without punctuation: characters of
    Han, Thai ..., syllables of Tibetan, words of other scripts. F1 counts the longest run of units
    that both have.
    """
    return _best(units(answer), [units(gold) for gold in golds], _longest_run)


def _best(
    answer: list[str], golds: list[list[str]], overlap: Callable[[list[str], list[str]], int]
) -> tuple[float, float]:
    if not golds:
        right = float(not answer or answer == _REFUSAL)
        return right, right
    scores = []
    for gold in golds:
        if not (answer and gold):
            scores.append((float(answer == gold),) * 2)
            continue
        # 2 P R / (P + R) with P = shared / answer and R = shared / gold
        f1 = 2 * overlap(answer, gold) / (len(answer) + len(gold))
        scores.append((float(answer == gold), f1))
    return max(em for em, _ in scores), max(f1 for _, f1 in scores)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _shared_words(first: list[str], second: list[str]) -> int:
    return sum((Counter(first) & Counter(second)).values())


def _longest_run(first: list[str], second: list[str]) -> int:
    """Length of the longest common substring, by rows of run lengths that end at each place."""
    longest, above = 0, [0] * (len(second) + 1)
    for unit in first:
        row = [0] * (len(second) + 1)
        for place, other in enumerate(second):
            if unit == other:
                row[place + 1] = above[place] + 1
        longest, above = max(longest, *row), row
    return longest
