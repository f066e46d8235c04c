"""A language made in code: parallel text for the smoke test, without a download.

A sentence is subject, verb, object; each word class is closed, and source and target words
correspond one to one, in order. Target words are English; source words are invented, and no two of
a class share their first letter, so that a two-layer byte model picks them up within minutes.
Rows of one group share subject and object, so a held-out group holds pairs of words never seen
together.
"""

from __future__ import annotations

import itertools
import random

SUBJECTS = {
    "bako": "farmer", "dimu": "teacher", "fela": "doctor", "guro": "sailor",
    "kiva": "baker", "lopa": "singer", "muzi": "hunter", "nedo": "painter",
}  # fmt: skip
VERBS = {
    "rasti": "finds", "selku": "makes", "torpa": "wants", "vimbo": "likes",
    "wolti": "keeps", "yankra": "sells", "zulpi": "brings", "hapso": "needs",
}  # fmt: skip
OBJECTS = {
    "azun": "bread", "ebir": "water", "ilom": "paper", "okas": "horses",
    "umet": "flowers", "jorin": "money", "quvel": "books", "xadut": "apples",
}  # fmt: skip
_SEED = 20260


def pairs() -> list[dict[str, str]]:
    """Every sentence of the language, shuffled: rows with source, target and group."""
    rows = []
    for subject, verb, thing in itertools.product(SUBJECTS, VERBS, OBJECTS):
        target = f"{SUBJECTS[subject]} {VERBS[verb]} {OBJECTS[thing]}"
        group = f"{subject}-{thing}"
        rows.append({"source": f"{subject} {verb} {thing}", "target": target, "group": group})
    random.Random(_SEED).shuffle(rows)
    return rows


def retention() -> list[str]:
    """Plain text with the target language's words in other orders: one passage a line."""
    draw = random.Random(_SEED + 1)
    subjects, verbs, things = (list(words.values()) for words in (SUBJECTS, VERBS, OBJECTS))
    return [
        f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(things)} and "
        f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(things)}"
        for _ in range(200)
    ]


def target_words() -> list[str]:
    """Every word of the target language, sorted."""
    return sorted({*SUBJECTS.values(), *VERBS.values(), *OBJECTS.values()})
