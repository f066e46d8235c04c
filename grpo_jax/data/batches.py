"""Which rows a step sees, and how they become arrays: pure functions, on the host.

In: examples and a step number. Out: `PromptBatch` for sampling, `TrainBatch` for supervised steps.
Lengths are padded up to one of three buckets, so that few shapes are ever compiled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from grpo_jax.data.corpus import Example
from grpo_jax.structs import PromptBatch, TrainBatch


def take(
    n_rows: int,
    batch_size: int,
    seed: int,
    step: int,
    process_index: int = 0,
    process_count: int = 1,
) -> np.ndarray:
    """Row numbers of one step's batch, or of this process's part of it.

    Row by row the stream runs through one permutation of all rows after another, so that each
    epoch sees each row once; a batch may cross the border between two. Processes take
    consecutive parts, and together exactly the batch that one process would take.

    Args:
      n_rows: rows in the split; batch_size: rows a step, over all processes.
      step: counted from 0.
    Returns:
      int32 [batch_size / process_count].
    Raises:
      ValueError: no rows, or a batch that the processes cannot share equally.
    """
    if n_rows < 1 or batch_size < 1:
        raise ValueError(f"a batch of {batch_size} rows from {n_rows}: both must be at least 1")
    if batch_size % process_count:
        raise ValueError(
            f"a batch of {batch_size} rows cannot be shared by {process_count} processes: "
            f"make it a multiple of {process_count}"
        )
    local = batch_size // process_count
    positions = step * batch_size + process_index * local + np.arange(local)
    epochs, places = np.divmod(positions, n_rows)
    rows = np.empty(local, np.int32)
    for epoch in range(epochs[0], epochs[-1] + 1):
        here = epochs == epoch
        rows[here] = _permutation(n_rows, seed, epoch)[places[here]]
    return rows


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Rows 0..n-1 in an order fixed by (seed, epoch) for good: NumPy's own shuffles may change."""
    start = _scramble(np.array([seed % 2**64], np.uint64))
    start = _scramble(start + np.uint64(epoch))
    return np.argsort(_scramble(start ^ np.arange(n, dtype=np.uint64)), kind="stable")


def _scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that scatters neighbours (splitmix64, Steele et al., OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def in_order(n_rows: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """All rows once, in order and in batches of one size, so that one program serves them all.

    Yields:
      Row numbers int [batch_size], and how many of them count: a last, smaller batch repeats its
      rows.
    """
    for start in range(0, n_rows, batch_size):
        count = min(batch_size, n_rows - start)
        yield start + np.arange(batch_size) % count, count


def bucket(n: int, limit: int) -> int:
    """The smallest of limit/4, limit/2 and limit, each rounded up to a multiple of 8, that holds n.

    Raises:
      ValueError: n is above the limit.
    """
    for parts in (4, 2, 1):
        size = -(-limit // (8 * parts)) * 8
        if n <= size:
            return size
    raise ValueError(f"{n} tokens do not fit the limit of {limit}")


def prompt_batch(
    examples: Sequence[Example],
    indices: np.ndarray,
    limit: int,
    global_indices: np.ndarray | None = None,
) -> PromptBatch:
    """Pads the prompts of `indices` to their bucket.

    Args:
      indices: int [P]; limit: tokens, as in `data.max_prompt_length`.
      global_indices: every process's indices, where there are several: the bucket must hold
        the longest prompt of all, for all processes must agree on the shape.
    Returns:
      PromptBatch with ids int32 [P, S], S = bucket.
    """
    prompts = [examples[i].prompt_ids for i in indices]
    everyone = indices if global_indices is None else global_indices
    width = bucket(max(len(examples[i].prompt_ids) for i in everyone), limit)
    ids, lengths = _pad(prompts, width)
    rows = [examples[i].row for i in indices]
    return PromptBatch(np.asarray(indices, np.int32), ids, lengths, rows)


def sft_batch(
    examples: Sequence[Example],
    indices: np.ndarray,
    prompt_limit: int,
    completion_limit: int,
    global_indices: np.ndarray | None = None,
) -> TrainBatch:
    """Prompts with their reference completions: G = 1, every advantage 1.

    Held-out targets may be longer than the limit; their first `completion_limit` tokens count.

    Returns:
      TrainBatch with prompt_ids int32 [P, S], ids int32 [P, 1, T], mask bool [P, 1, T] and
      advantages float32 [P, 1]; S and T are buckets.
    Raises:
      ValueError: an example has no target text.
    """
    prompts = prompt_batch(examples, indices, prompt_limit, global_indices)
    for i in indices:
        if not examples[i].completion_ids:
            raise ValueError(
                f"row {i} has no target text to train on: {examples[i].row.source!r:.60}"
            )
    everyone = indices if global_indices is None else global_indices
    longest = max(len(examples[i].completion_ids) for i in everyone)
    width = bucket(min(longest, completion_limit), completion_limit)
    ids, lengths = _pad([examples[i].completion_ids[:completion_limit] for i in indices], width)
    mask = np.arange(width) < lengths[:, None]
    return TrainBatch(
        prompt_ids=prompts.ids,
        prompt_lengths=prompts.lengths,
        ids=ids[:, None],
        mask=mask[:, None],
        advantages=np.ones((len(ids), 1), np.float32),
    )


def _pad(sequences: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequences padded on the right: ids int32 [N, width] and lengths int32 [N]."""
    ids = np.zeros((len(sequences), width), np.int32)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return ids, np.array([len(sequence) for sequence in sequences], np.int32)
