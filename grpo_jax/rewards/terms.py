"""The reward as pure array functions: cosines and text measures in, one number a completion out.

    R = w_sem R_sim + w_lang R_lang - w_len p_len - w_rep p_rep        (never below 0)

R_sim and R_lang are arXiv 2605.14366's, with weights 1.5 and 1.0. The two penalties and the hard
gate come from arXiv 2605.29502 (SG-SRL). Where we deviate: both penalties rise linearly to 1 at
fixed points, so that a weight is the most that a term can cost; the additive form is floored at
0 as SG-SRL's is, because an empty completion (reward 0) must never beat a poor one; and a text
that is too short can be made to cost something too.

SG-SRL itself, gate * max(s - 0.20 p_len - 0.05 p_rep, 0), is semantic_weight 1, language_weight 0,
length_weight 0.2, repetition_weight 0.05, hard_gate, tau 0, max_length_ratio 2.5, max_repetition
0.15 and the anchor "source", which measures lengths against the batch's median.
"""

from __future__ import annotations

import chex
import jax.numpy as jnp

from grpo_jax.structs import Array


def semantic(similarity: Array, tau: Array | float) -> Array:
    """Thresholded similarity: 0 if s <= tau, else (s - tau) / (1 - tau), in [0, 1].

    Args:
      similarity: float32 [...], cosine, chrF++ or BLEU s of completion and anchor.
      tau: below 1; the least adequacy worth a reward (arXiv 2605.14366, section on the reward).
    """
    return jnp.clip((similarity - tau) / (1.0 - tau), 0.0, 1.0)


def length_penalty(ratio: Array, max_ratio: float, min_ratio: float = 0.0) -> Array:
    """What a length costs that is far from the expected one, in [0, 1].

    0 up to max_ratio, 1 from twice that, linear between (SG-SRL: 2.5 and 5). And, with min_ratio
    above 0, from there down to 1 at no text at all, linear too. The papers have no such lower end,
    but a cosine hardly falls when words are left out (0.895 without a fifth of them under
    all-MiniLM-L6-v2, against 0.861 for all of them in another order), so that leaving out what one
    cannot translate pays. BLEU has its brevity penalty (Papineni et al. 2002) for that reason;
    ours is linear, so that its slope is the same for every text.

    Args:
      ratio: float32 [...], length of the completion over the expected length, in text units.
      max_ratio: the longest ratio that costs nothing, at least 1.
      min_ratio: the shortest ratio that costs nothing, below 1; 0 leaves short texts alone.
    """
    long = jnp.clip(ratio / max_ratio - 1.0, 0.0, 1.0)
    return jnp.maximum(long, jnp.clip(1.0 - ratio / min_ratio, 0.0, 1.0)) if min_ratio else long


def repetition_penalty(share: Array, max_share: float) -> Array:
    """0 up to max_share, 1 when every 4-gram is a repeat, linear between, in [0, 1].

    Args:
      share: float32 [...], share of the 4-grams that occurred before.
      max_share: the largest share that costs nothing, below 1.
    """
    return jnp.clip((share - max_share) / (1.0 - max_share), 0.0, 1.0)


def combine(terms: dict[str, Array], weights: dict[str, float], hard_gate: bool) -> Array:
    """Weighted sum of the terms, floored at 0; with `hard_gate` the wrong language zeroes it.

    Args:
      terms: float32 [P, G] each; must hold "language" if `hard_gate`.
      weights: one a term, negative for a penalty.
      hard_gate: multiply the sum by terms["language"].

    Returns:
      float32 [P, G].
    """
    chex.assert_equal_shape(list(terms.values()))
    total = jnp.maximum(sum(weights[name] * value for name, value in terms.items()), 0.0)
    return total * terms["language"] if hard_gate else total


def cosine(completions: Array, anchors: Array) -> Array:
    """Cosine of each completion with the anchor of its prompt, in [-1, 1].

    A vector of length 0, or one that is not finite, is similar to nothing: its cosine is 0.

    Args:
      completions: float32 [P, G, D].
      anchors: float32 [P, D].

    Returns:
      float32 [P, G].
    """
    chex.assert_rank([completions, anchors], [3, 2])
    dots = jnp.einsum("PGD,PD->PG", completions, anchors)
    norms = jnp.linalg.norm(completions, axis=-1) * jnp.linalg.norm(anchors, axis=-1)[:, None]
    usable = jnp.isfinite(dots) & jnp.isfinite(norms) & (norms > 1e-12)
    return jnp.where(usable, jnp.clip(dots / jnp.where(usable, norms, 1.0), -1.0, 1.0), 0.0)
