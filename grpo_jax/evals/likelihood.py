"""How likely a model finds given continuations of given contexts.

In: pairs of token ids (or of texts) and a jitted program. Out: one `Score` a pair, in their order.
A context that several continuations share, as the answers of one question do, is computed once.
The definitions are lm-evaluation-harness's, so that its tasks and ours give the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.learn.logps import token_choices
from grpo_jax.models.decoder import Decoder, head
from grpo_jax.structs import Array
from grpo_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

ROW_TOKENS = 512  # a batch of longer rows has proportionally fewer of them
_GROUP = 8  # continuations of one context that are computed together, at most

Pair = tuple[Sequence[int], Sequence[int]]  # token ids: context, continuation
Compute = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[Array, Array]]


class Score(NamedTuple):
    """What a model makes of one continuation."""

    logprob: float  # nats, summed over its tokens
    is_greedy: bool  # greedy decoding would have produced it
    tokens: int


def build_likelihood(model: Decoder) -> Callable[..., tuple[Array, Array]]:
    """The jitted function likelihood(params, prompt_ids, prompt_lengths, ids, mask).

    Args of the function:
      params: the model's.
      prompt_ids: int32 [P, S] contexts, padded on the right; prompt_lengths: int32 [P].
      ids: int32 [P, G, T] continuations, padded on the right; mask: bool [P, G, T].

    Returns:
      The function's results: log-prob float32 [P, G], summed where the mask is True, and bool
      [P, G], whether every such token is the likeliest one.
    """

    def likelihood(
        params: dict, prompt_ids: Array, prompt_lengths: Array, ids: Array, mask: Array
    ) -> tuple[Array, Array]:
        arguments = (prompt_ids, prompt_lengths, ids)
        hidden: Any = model.apply({"params": params}, *arguments, method="predict")
        cap = model.config.final_logit_softcapping
        logps, best = token_choices(hidden, head(params), ids, mask, cap, model.rows)
        return jnp.sum(logps, -1), jnp.all(best | ~jnp.asarray(mask), -1)

    return jax.jit(likelihood)


def score(pairs: Sequence[Pair], compute: Compute, batch_size: int, max_length: int) -> list[Score]:
    """Scores of all pairs, computed in batches of few shapes.

    Args:
      pairs: contexts and continuations, none empty. What is too long together loses the beginning
        of its context.
      compute: `build_likelihood`'s function with its parameters given; host arrays in, arrays out.
      batch_size: contexts at a time, up to ROW_TOKENS tokens each.
      max_length: tokens that the model may read; the last one of a continuation is never read.

    Raises:
      ValueError: an empty context or continuation, or a continuation above max_length.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            raise ValueError(
                f"pairs[{i}]: {len(context)} tokens of context and {len(continuation)} to score; "
                f"wanted at least 1 of each and at most {max_length} to score"
            )
        kept = context[-(max_length + 1 - len(continuation)) :]
        groups.setdefault(tuple(kept), []).append(i)
    batches: dict[tuple[int, int, int], list[tuple[tuple[int, ...], list[int]]]] = {}
    for kept, members in groups.items():
        for start in range(0, len(members), _GROUP):
            part = members[start : start + _GROUP]
            longest = max(len(pairs[i][1]) for i in part)
            shape = (_size(len(kept), 32), _size(len(part), 1), _size(longest, 4))
            batches.setdefault(shape, []).append((tuple(kept), part))
    out: dict[int, Score] = {}
    for shape, rows in sorted(batches.items(), reverse=True):  # what needs most memory comes first
        out.update(_score_shape(shape, rows, pairs, compute, batch_size))
    return [out[i] for i in range(len(pairs))]


def _score_shape(
    shape: tuple[int, int, int],
    rows: list[tuple[tuple[int, ...], list[int]]],
    pairs: Sequence[Pair],
    compute: Compute,
    batch_size: int,
) -> Iterator[tuple[int, Score]]:
    """(pair number, Score) of all rows, which share the shape (S, G, T)."""
    S, G, T = shape
    count = rows_at_a_time(batch_size, S + G * T)
    for start in range(0, len(rows), count):
        batch = rows[start : start + count]
        contexts, lengths = np.zeros((count, S), np.int32), np.ones(count, np.int32)
        ids, mask = np.zeros((count, G, T), np.int32), np.zeros((count, G, T), bool)
        for row, (context, members) in enumerate(batch):
            contexts[row, : len(context)], lengths[row] = context, len(context)
            for place, i in enumerate(members):
                continuation = pairs[i][1]
                ids[row, place, : len(continuation)] = continuation
                mask[row, place, : len(continuation)] = True
        logprobs, greedy = (np.asarray(x) for x in compute(contexts, lengths, ids, mask))
        for row, (_, members) in enumerate(batch):
            for place, i in enumerate(members):
                found = (float(logprobs[row, place]), bool(greedy[row, place]))
                yield i, Score(*found, len(pairs[i][1]))


def rows_at_a_time(batch_size: int, tokens: int) -> int:
    """Rows of so many tokens that are computed together: fewer where they exceed ROW_TOKENS."""
    return max(1, batch_size * ROW_TOKENS // max(ROW_TOKENS, tokens))


def _size(n: int, least: int) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def rolling_windows(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Cuts a long text so that each token is scored once, with as much context as there is room.

    Args:
      ids: the text's tokens; prefix: the token that stands before the first.
      max_length: tokens that the model may read.

    Returns:
      (context, continuation) pairs; all but the last fill the model with scored tokens, and the
      last one fills it up with context. [] for an empty text.
    """
    windows: list[Pair] = []
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        context = ids[max(0, end - max_length - 1) : start] if start else [prefix]
        windows.append((list(context), list(ids[start:end])))
    return windows


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a context and its continuation, cut where the context's own ids end.

    The two are encoded as one text; white space at the context's end goes to the continuation,
    where tokenizers want it.
    """
    bare = context.rstrip()
    whole, start = encode(context + continuation), encode(bare)
    return start, whole[len(start) :]


def text_likelihood(
    tokenizer: Tokenizer, compute: Compute, batch_size: int, max_length: int
) -> Callable[[Sequence[tuple[str, str]]], list[Score]]:
    """`score` for texts: the function likelihood([(context, continuation), ...]).

    Contexts are plain text, behind the tokenizer's BOS if it has one; see `score` for errors.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode_prompt(text, chat=False)

    def likelihood(texts: Sequence[tuple[str, str]]) -> list[Score]:
        pairs = [encode_pair(encode, *text) for text in texts]
        cut = sum(len(a) + len(b) > max_length + 1 for a, b in pairs)
        if cut:
            _log.warning(
                "%d of %d questions are longer than %d tokens and lost their beginning",
                cut, len(pairs), max_length,
            )  # fmt: skip
        return score(cast(Sequence[Pair], pairs), compute, batch_size, max_length)

    return likelihood
