"""Row order as a pure function, and rows as padded arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.data import batches, corpus
from grpo_jax.structs import Row


@given(
    n=st.integers(1, 50),
    batch=st.integers(1, 12),
    seed=st.integers(-5, 2**63),
    steps=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_every_row_once(n, batch, seed, steps):
    stream = np.concatenate([batches.take(n, batch, seed, step) for step in range(steps)])
    for start in range(0, len(stream) - n + 1, n):
        assert sorted(stream[start : start + n]) == list(range(n))


@given(
    n=st.integers(1, 50),
    local=st.integers(1, 6),
    processes=st.integers(1, 5),
    step=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_processes_partition_the_global_batch(n, local, processes, step):
    batch = local * processes
    parts = [batches.take(n, batch, 3, step, i, processes) for i in range(processes)]
    np.testing.assert_array_equal(np.concatenate(parts), batches.take(n, batch, 3, step))


def test_order_is_pure_and_shuffled():
    first = batches.take(1000, 100, 0, 4)
    np.random.seed(7)
    np.testing.assert_array_equal(first, batches.take(1000, 100, 0, 4))
    assert first.dtype == np.int32
    steps = [[(0, step) for step in range(10)], [(0, step) for step in range(10, 20)]]
    steps.append([(1, step) for step in range(10)])
    one, two, reseeded = (np.concatenate([batches.take(1000, 100, *s) for s in e]) for e in steps)
    for a, b in ((one, two), (one, reseeded), (one, np.arange(1000))):
        assert np.mean(a == b) < 0.02  # expected: one row in a thousand stays in place
    assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.1
    # Golden: a run resumed with a newer NumPy must go on in the same order.
    assert batches.take(10, 10, 0, 0).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]


def test_batches_that_cannot_be():
    with pytest.raises(ValueError, match="6 rows cannot be shared by 4 processes"):
        batches.take(10, 6, 0, 0, 0, 4)
    with pytest.raises(ValueError, match="4 rows from 0"):
        batches.take(0, 4, 0, 0)


def test_buckets():
    assert [batches.bucket(n, 96) for n in (1, 24, 25, 48, 49, 96)] == [24, 24, 48, 48, 96, 96]
    assert [batches.bucket(n, 50) for n in (1, 16, 17, 32, 33, 50)] == [16, 16, 32, 32, 56, 56]
    assert batches.bucket(5, 5) == 8
    with pytest.raises(ValueError, match="97 tokens do not fit the limit of 96"):
        batches.bucket(97, 96)


def example(prompt, completion):
    return corpus.Example(Row("s" * prompt, "t" * completion, "g"), [7] * prompt, [9] * completion)


def test_prompt_batch_pads_on_the_right():
    examples = [example(3, 1), example(20, 1), example(9, 1)]
    batch = batches.prompt_batch(examples, np.array([2, 0]), 64)
    assert batch.ids.shape == (2, 16) and batch.ids.dtype == np.int32
    assert batch.lengths.tolist() == [9, 3] and batch.indices.tolist() == [2, 0]
    assert batch.ids.sum(axis=1).tolist() == [63, 21] and batch.ids[1, :4].tolist() == [7, 7, 7, 0]
    assert batch.rows == [examples[2].row, examples[0].row]
    # Another process holds the long prompt: this one pads to the same shape.
    shared = batches.prompt_batch(examples, np.array([2, 0]), 64, np.array([2, 0, 1]))
    assert shared.ids.shape == (2, 32)


def test_sft_batch():
    examples = [example(3, 5), example(4, 70), example(2, 0)]
    batch = batches.sft_batch(examples, np.array([0, 1]), 32, 32)
    assert batch.prompt_ids.shape == (2, 8) and batch.prompt_lengths.tolist() == [3, 4]
    assert batch.ids.shape == batch.mask.shape == (2, 1, 32)
    assert batch.mask.dtype == np.bool_ and batch.mask.sum(axis=(1, 2)).tolist() == [5, 32]
    assert (batch.ids[batch.mask] == 9).all() and (batch.ids[~batch.mask] == 0).all()
    assert batch.advantages.tolist() == [[1.0], [1.0]] and batch.old_logps is None
    with pytest.raises(ValueError, match="row 2 has no target text"):
        batches.sft_batch(examples, np.array([2]), 32, 32)


@pytest.mark.parametrize(("rows", "size"), [(5, 2), (4, 2), (1, 4), (3, 8)])
def test_in_order_counts_every_row_once_in_batches_of_one_size(rows, size):
    found = list(batches.in_order(rows, size))
    assert all(len(indices) == size and max(indices) < rows for indices, _ in found)
    assert [i for indices, count in found for i in indices[:count]] == list(range(rows))
