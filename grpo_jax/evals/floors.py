"""Floors that a trained model must beat: sources in, the hypotheses of two trivial systems out.

`copy_source` answers with the question; `translation_memory` looks up the nearest source sentence
of the training split and answers with its translation.
"""

from __future__ import annotations

import numpy as np

ORDERS = (2, 3, 4)  # characters an n-gram: long enough for alphabets, short enough for Han


def copy_source(sources: list[str]) -> list[str]:
    """The floor of a system that does nothing."""
    return list(sources)


def translation_memory(
    sources: list[str], train_sources: list[str], train_targets: list[str]
) -> list[str]:
    """Translate by look-up: the target of the training source with the highest tf-idf cosine.

    Vectors hold (1 + log tf) log(1 + N / df) of character 2-, 3- and 4-grams of the lower-cased,
    space-normalised text. The training side is an inverted index of plain numpy arrays, so a query
    costs one weighted bincount over the postings of its n-grams.

    Args:
      sources: N queries.
      train_sources, train_targets: M pairs; those without a target are not used.

    Returns:
      N targets; '' where no training source shares an n-gram. Ties go to the earliest row.
    """
    if len(train_sources) != len(train_targets):
        raise ValueError(
            f"translation memory: got {len(train_sources)} sources, {len(train_targets)} targets."
        )
    pairs = [pair for pair in zip(train_sources, train_targets, strict=True) if pair[1].strip()]
    if not pairs or not sources:
        return ["" for _ in sources]
    rows, grams, counts, n_grams = _count_grams([*[source for source, _ in pairs], *sources])
    n_train = len(pairs)
    trained = rows < n_train

    document_frequency = np.bincount(grams[trained], minlength=n_grams)
    idf = np.log1p(n_train / np.maximum(document_frequency, 1))
    weights = (1.0 + np.log(counts)) * idf[grams]
    norms = np.sqrt(np.bincount(rows, weights**2, minlength=n_train + len(sources)))

    # Postings sorted by gram: those of gram g lie in [starts[g], starts[g + 1]).
    by_gram = np.flatnonzero(trained)[np.argsort(grams[trained], kind="stable")]
    posting_rows = rows[by_gram]
    posting_weights = weights[by_gram] / norms[posting_rows]
    starts = np.concatenate([[0], np.cumsum(document_frequency)])
    queries = np.searchsorted(rows, np.arange(n_train, n_train + len(sources) + 1))

    answers = []
    for first, last in zip(queries[:-1], queries[1:], strict=True):
        asked = grams[first:last]
        sizes = document_frequency[asked]
        ends = np.cumsum(sizes)
        if last == first or ends[-1] == 0:
            answers.append("")
            continue
        # All postings of all asked grams at once: arange over several ranges.
        places = np.arange(ends[-1]) + np.repeat(starts[asked] - (ends - sizes), sizes)
        scores = np.repeat(weights[first:last], sizes) * posting_weights[places]
        best = int(np.bincount(posting_rows[places], scores, minlength=n_train).argmax())
        answers.append(pairs[best][1])
    return answers


def _count_grams(texts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Count character n-grams of all texts in one sweep over their code points.

    Returns:
      rows, gram ids and counts of the M distinct (text, gram) pairs, sorted by text, and the number
      of distinct grams.
    """
    padded = [" " + " ".join(text.lower().split()) + " " for text in texts]
    lengths = np.array([len(text) for text in padded])
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32)
    owner = np.repeat(np.arange(len(texts)), lengths)
    found_rows, found_hashes = [], []
    for order in ORDERS:
        if len(codes) < order:
            continue
        ends = len(codes) - order + 1
        hashes = np.full(ends, order, np.uint64)
        for offset in range(order):  # wraps around modulo 2^64; 4-grams hardly ever collide
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[offset : offset + ends]
        inside = owner[:ends] == owner[order - 1 :]
        found_rows.append(owner[:ends][inside])
        found_hashes.append(hashes[inside])
    distinct, gram = np.unique(np.concatenate(found_hashes), return_inverse=True)
    keys = np.concatenate(found_rows) * len(distinct) + gram
    pairs, counts = np.unique(keys, return_counts=True)
    return pairs // len(distinct), pairs % len(distinct), counts, len(distinct)
