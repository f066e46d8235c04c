"""Rows into train, dev and test, by group, with duplicates and leaks taken out.

In: rows. Out: three lists and a report of what was dropped. A row's split depends on its group,
the seed and the fractions alone: not on the other rows, their order, the machine or the run.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from grpo_jax import config
from grpo_jax.structs import Row


class Splits(NamedTuple):
    train: list[Row]
    dev: list[Row]
    test: list[Row]
    report: dict[str, int]  # duplicates, leaks, and rows of each split


def split_rows(
    rows: Sequence[Row],
    cfg: config.Data,
    dev: Sequence[Row] | None = None,
    test: Sequence[Row] | None = None,
) -> Splits:
    """Splits `rows` by the hash of their group; `dev` and `test` with files of their own stay so.

    A duplicate has the source and the target of an earlier row of its file. A leak is a training
    row with the source, the target or the given group of a dev or test row, or a dev row with
    those of a test row. Texts are compared without case, width and spacing. What is held out
    stays; the row on the training side is dropped.
    """
    rows, *copies = _without_duplicates(rows)
    named = {"train": rows, "dev": [], "test": []}
    if dev is None or test is None:
        dev_end = cfg.dev_fraction if dev is None else 0.0
        test_end = dev_end + (cfg.test_fraction if test is None else 0.0)
        named["train"] = []
        for row in rows:
            place = uniform(row.group, cfg.seed)
            name = "dev" if place < dev_end else "test" if place < test_end else "train"
            named[name].append(row)
    for name, own in (("dev", dev), ("test", test)):
        if own is not None:
            named[name], *more = _without_duplicates(own)
            copies += more
    by_group = bool(cfg.group_field)
    kept_dev = _without_leaks(named["dev"], named["test"], by_group)
    kept_train = _without_leaks(named["train"], kept_dev + named["test"], by_group)
    report = {
        "duplicates": sum(copies),
        "train_leaks": len(named["train"]) - len(kept_train),
        "dev_leaks": len(named["dev"]) - len(kept_dev),
        "train_rows": len(kept_train),
        "dev_rows": len(kept_dev),
        "test_rows": len(named["test"]),
    }
    return Splits(kept_train, kept_dev, named["test"], report)


def uniform(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed only, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def normalise(text: str) -> str:
    """The text without what makes equal texts look different: case, width, spacing."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _without_duplicates(rows: Sequence[Row]) -> tuple[list[Row], int]:
    """The first row of each (source, target), and how many were dropped."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        first.setdefault((normalise(row.source), normalise(row.target)), row)
    return list(first.values()), len(rows) - len(first)


def _without_leaks(rows: list[Row], held_out: Iterable[Row], by_group: bool) -> list[Row]:
    """The rows that share neither source nor target (nor group) with any held-out row."""
    held_out = list(held_out)
    sources = {normalise(row.source) for row in held_out}
    targets = {normalise(row.target) for row in held_out} - {""}
    groups = {row.group for row in held_out} if by_group else set()
    return [
        row
        for row in rows
        if normalise(row.source) not in sources
        and normalise(row.target) not in targets
        and row.group not in groups
    ]
