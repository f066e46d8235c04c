"""Completions of any length with stop strings, out of a sampler of a fixed length.

In: prompts as token ids (or texts) and a function that draws a few tokens for a batch of them. Out:
completions. The few tokens are drawn again and again, behind a longer and longer prompt, until a
completion ends, has its stop string or is long enough; so a batch of short answers does not wait
for a limit that none of them comes near.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from grpo_jax.evals.likelihood import rows_at_a_time
from grpo_jax.structs import Array
from grpo_jax.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

ROUND = 64  # tokens drawn at one time

# draw(prompt_ids int32 [P, S], prompt_lengths int32 [P], number of the call)
# -> ids int32 [P, T], mask bool [P, T], ended bool [P]; the fields of a Rollout with G = 1 dropped.
Draw = Callable[[np.ndarray, np.ndarray, int], tuple[Array, Array, Array]]
Generate = Callable[[Sequence[str], int, Sequence[str]], list[str]]


def complete(
    prompts: Sequence[Sequence[int]],
    draw: Draw,
    batch_size: int,
    max_new_tokens: int,
    stopped: Callable[[list[int]], bool],
) -> list[list[int]]:
    """One completion a prompt.

    Args:
      prompts: token ids, none empty.
      draw: draws T tokens a prompt; see Draw. The number of the call is for its key.
      batch_size: prompts at a time, up to likelihood.ROW_TOKENS tokens each.
      max_new_tokens: longest completion.
      stopped: whether a completion holds all that is wanted of it, although it has not ended.

    Returns:
      The completions' ids, with the EOS where they ended, in the order of the prompts.
    """
    out: list[list[int]] = [[] for _ in prompts]
    pending = list(range(len(prompts)))
    call = 0
    while pending:
        pending.sort(key=lambda i: (-len(prompts[i]) - len(out[i]), i))
        following: list[int] = []
        while pending:
            longest = len(prompts[pending[0]]) + len(out[pending[0]])
            width = max(32, 1 << (longest - 1).bit_length())
            count = rows_at_a_time(batch_size, width)
            batch, pending = pending[:count], pending[count:]
            ids, lengths = np.zeros((count, width), np.int32), np.ones(count, np.int32)
            for row, i in enumerate(batch):
                text = [*prompts[i], *out[i]]
                ids[row, : len(text)], lengths[row] = text, len(text)
            tokens, mask, ended = (np.asarray(x) for x in draw(ids, lengths, call))
            call += 1
            for row, i in enumerate(batch):
                out[i] = (out[i] + tokens[row][mask[row]].tolist())[:max_new_tokens]
                if not (ended[row] or len(out[i]) >= max_new_tokens or stopped(out[i])):
                    following.append(i)
        pending = following
    return out


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings; '' is none."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces {NAME} by values[NAME], in one pass, so that braces inside the values stay text."""
    pattern = "|".join(re.escape(f"{{{name}}}") for name in values)
    return re.sub(pattern, lambda match: values[match[0][1:-1]], template)


def text_completions(
    tokenizer: Tokenizer, draw: Draw, batch_size: int, max_length: int, chat: bool
) -> Generate:
    """`complete` for texts: the function generate(prompts, max_new_tokens, stops).

    Args:
      draw, batch_size: see `complete`.
      max_length: tokens of prompt and completion; longer prompts lose their beginning.
      chat: wrap prompts in the chat template.

    Returns:
      generate: completions without special tokens and without white space at their ends, cut at
      the first stop string behind that white space.
    """

    def generate(prompts: Sequence[str], max_new_tokens: int, stops: Sequence[str]) -> list[str]:
        room = max_length - max_new_tokens
        if room < 1:
            raise ValueError(
                f"{max_new_tokens} new tokens leave no room for a prompt in {max_length}"
            )
        rows = [tokenizer.encode_prompt(prompt, chat=chat) for prompt in prompts]
        if cut := sum(len(row) > room for row in rows):
            _log.warning(
                "%d of %d prompts are longer than %d tokens and lost their beginning",
                cut, len(rows), room,
            )  # fmt: skip

        def stopped(ids: list[int]) -> bool:
            text = tokenizer.decode([ids])[0]
            return cut_at(text, stops) != text

        found = complete([row[-room:] for row in rows], draw, batch_size, max_new_tokens, stopped)
        return [cut_at(text, stops).strip() for text in tokenizer.decode(found)]

    return generate
