"""The structs that cross rooms: every array with its dtype and shape.

Letters: P prompts, G completions of one prompt (a group), B = P * G rows, S prompt length,
T completion length. Prompts and completions are padded on the right; lengths and masks say what
counts, never the id of the padding.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


class Row(NamedTuple):
    """One example of a dataset, as text."""

    source: str
    target: str  # '' when the data is monolingual
    group: str  # rows of one group never straddle a split


class PromptBatch(NamedTuple):
    """P prompts, tokenized; a pure function of (seed, step, process). Lives on the host."""

    indices: np.ndarray  # int32 [P], row numbers in the training split
    ids: np.ndarray  # int32 [P, S]
    lengths: np.ndarray  # int32 [P]
    rows: list[Row]  # P


class Rollout(NamedTuple):
    """What the sampler returns."""

    ids: Array  # int32 [P, G, T], 0 behind the end
    mask: Array  # bool [P, G, T], True up to and including the first EOS
    logps: Array  # float32 [P, G, T], under softmax(logits / temperature), 0 where masked
    ended: Array  # bool [P, G], False for a completion cut off at T


class Rewards(NamedTuple):
    """Scores of a rollout; `terms` are unweighted, `total` is their weighted sum."""

    total: Array  # float32 [P, G]
    terms: dict[str, Array]  # float32 [P, G] each
    similarity: Array  # float32 [P, G], the metric itself, before its threshold
    unread: Array  # bool [P, G], where the encoder failed on a text; all else is 0 there


class TrainBatch(NamedTuple):
    """One update's worth of tokens. SFT is the case G = 1 with the reference text as completion."""

    prompt_ids: Array  # int32 [P, S]
    prompt_lengths: Array  # int32 [P]
    ids: Array  # int32 [P, G, T]
    mask: Array  # bool [P, G, T], which tokens carry loss
    advantages: Array  # float32 [P, G]
    old_logps: Array | None = None  # float32 [P, G, T]; None means on-policy
    ref_logps: Array | None = None  # float32 [P, G, T]; None means beta = 0
    beta: Array | None = None  # float32 [P, G], weight of the KL; None: as configured


class TrainState(NamedTuple):
    """What an update changes, and all that a checkpoint holds of the learner."""

    step: Array  # int32 []
    params: dict  # the trainable tree: the whole model, or a LoRA adapter
    opt_state: tuple
