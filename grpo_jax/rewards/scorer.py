"""Scores of a rollout: texts in, `Rewards` on device out.

The host measures lengths, repetition and language and runs the frozen encoder (jitted, in length
buckets); one jitted function turns all of it into terms and a total. Anchor embeddings are computed
once a row. Every string has a defined reward: odd text is sanitised, and a completion
without a visible character scores 0 in every term.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import config
from grpo_jax.rewards import terms
from grpo_jax.structs import Array, Rewards, Row
from grpo_jax.text.measures import is_empty, repeated_share, sanitise
from grpo_jax.text.scripts import units


class TextEncoder(Protocol):
    """What we need of an encoder; the hub's encoders are."""

    def embed(self, texts: list[str]) -> np.ndarray: ...  # float32 [N, D]


def term_weights(cfg: config.Reward) -> dict[str, float]:
    """The weight of each term that a configuration uses, negative for a penalty."""
    weights = {"semantic": cfg.semantic_weight, "language": cfg.language_weight}
    penalties = {"length": cfg.length_weight, "repetition": cfg.repetition_weight}
    return weights | {name: -weight for name, weight in penalties.items() if weight > 0}


def build_score(cfg: config.Reward) -> Callable[..., Rewards]:
    """Jit the device part of the reward: embeddings and measures in, `Rewards` out."""
    weights = term_weights(cfg)

    @jax.jit
    def score(
        completions: Array,  # float32 [P, G, D]
        anchors: Array,  # float32 [P, D]
        language: Array,  # bool [P, G]
        length_ratio: Array,  # float32 [P, G]
        repetition: Array,  # float32 [P, G]
        visible: Array,  # bool [P, G], False for an empty completion
        tau: Array,  # float32 []
    ) -> Rewards:
        similarity = terms.cosine(completions, anchors) * visible
        values = {
            "semantic": terms.semantic(similarity, tau),
            "language": language.astype(jnp.float32),
            "length": terms.length_penalty(length_ratio, cfg.max_length_ratio),
            "repetition": terms.repetition_penalty(repetition, cfg.max_repetition),
        }
        values = {name: values[name] * visible for name in weights}
        return Rewards(terms.combine(values, weights, cfg.hard_gate), values, similarity)

    return score


class Scorer:
    """The reward of a run: a frozen encoder, a language gate and the weights.

    Args:
      encoder: `.embed(list of N texts) -> float32 [N, D]`.
      gate: `gate(list of N texts) -> bool [N]`, True for text in the wanted language.
      cfg: the config's reward section.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        gate: Callable[[list[str]], np.ndarray],
        cfg: config.Reward,
    ) -> None:
        if cfg.anchor not in ("target", "source"):
            raise ValueError(f"reward.anchor: got {cfg.anchor!r}, wanted 'target' or 'source'.")
        self.encoder, self.gate, self.cfg = encoder, gate, cfg
        self.weights = term_weights(cfg)
        self._score = build_score(cfg)
        self._anchors: dict[str, np.ndarray] = {}

    def similarity(self, texts: list[str], anchors: list[str]) -> np.ndarray:
        """Cosine of each text with its anchor under the reward's encoder: float32 [N]."""
        return similarity(self.encoder, texts, anchors)

    def score(self, texts: list[str], rows: list[Row], tau: float) -> Rewards:
        """Score P * G completions, the G of a prompt next to each other.

        Args:
          texts: P * G decoded completions.
          rows: the prompts' P rows, which hold the anchors.
          tau: threshold of the semantic term, below 1.

        Returns:
          Rewards on device, float32 [P, G]; terms of weight 0 other than "semantic" and
          "language" are left out.

        Raises:
          ValueError: the counts do not fit, tau >= 1, or a row lacks the anchor text.
        """
        if len(texts) % len(rows):
            raise ValueError(f"score: got {len(texts)} texts for {len(rows)} rows, wanted P * G.")
        if not tau < 1.0:
            raise ValueError(f"reward.tau: got {tau}, wanted a cosine below 1.")
        shape = (len(rows), len(texts) // len(rows))
        texts = [sanitise(text) for text in texts]
        pieces = [units(text) for text in texts]
        lengths = np.array([len(piece) for piece in pieces], np.float32).reshape(shape)
        on_grid = partial(np.reshape, shape=shape)
        return self._score(
            embed(self.encoder, texts).reshape(*shape, -1),
            self._anchor_embeddings(rows),
            on_grid(np.asarray(self.gate(texts), bool)),
            lengths / self._expected_lengths(rows, lengths),
            on_grid(np.array([repeated_share(piece) for piece in pieces], np.float32)),
            on_grid(np.array([not is_empty(text) for text in texts])),
            np.float32(tau),
        )

    def _anchor_embeddings(self, rows: list[Row]) -> np.ndarray:
        """float32 [P, D]; encodes only what was not seen before, for every row comes each epoch."""
        texts = [sanitise(getattr(row, self.cfg.anchor)) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if is_empty(text):
                raise ValueError(
                    f"reward.anchor = {self.cfg.anchor!r} compares completions with the row's "
                    f"{self.cfg.anchor}, but {row} has none. Drop such rows, or set "
                    "reward.anchor = 'source' to train without references."
                )
        fresh = [text for text in dict.fromkeys(texts) if text not in self._anchors]
        if fresh:
            self._anchors.update(zip(fresh, embed(self.encoder, fresh), strict=True))
        return np.stack([self._anchors[text] for text in texts])

    def _expected_lengths(self, rows: list[Row], lengths: np.ndarray) -> np.ndarray:
        """Units a completion should have: float32 [P, 1], at least 1.

        Against a reference, its length; anchored on the source, the batch's median (SG-SRL), for
        units of two languages do not compare.
        """
        if self.cfg.anchor == "target":
            expected = np.array([len(units(sanitise(row.target))) for row in rows])
        else:
            written = lengths[lengths > 0]
            expected = np.full(len(rows), np.median(written) if written.size else 1.0)
        return np.maximum(expected.astype(np.float32), 1.0)[:, None]


def embed(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Embed texts, each distinct one once: float32 [N, D]. Samples of a group often coincide."""
    places: dict[str, int] = {}
    rows = [places.setdefault(sanitise(text), len(places)) for text in texts]
    return np.asarray(encoder.embed(list(places)), np.float32)[rows]


def similarity(encoder: TextEncoder, texts: list[str], anchors: list[str]) -> np.ndarray:
    """Cosine of each text with its anchor: float32 [N], 0 where either is empty."""
    if len(texts) != len(anchors):
        raise ValueError(f"similarity: got {len(texts)} texts and {len(anchors)} anchors.")
    if not texts:
        return np.zeros(0, np.float32)
    both = embed(encoder, [*texts, *anchors])
    cosine = terms.cosine(both[: len(texts), None], both[len(texts) :])[:, 0]
    pairs = zip(texts, anchors, strict=True)
    visible = [not is_empty(text) and not is_empty(anchor) for text, anchor in pairs]
    return np.asarray(cosine * np.array(visible), np.float32)


def within_group_stats(rewards: Rewards) -> dict[str, float]:
    """Metrics of a batch of rewards under TRL's names.

    Spreads are standard deviations within a group (ddof = 1, 0 for a group of one), averaged over
    the groups, since that is the signal GRPO learns from; TRL's rewards/<term>/std is the batch's.

    Returns:
      reward, reward_std, rewards/<term>/mean, rewards/<term>/std, frac_reward_zero_std (the share
      of groups whose rewards all coincide) and similarity.
    """
    total = np.asarray(rewards.total, np.float64)
    stats = {
        "reward": float(total.mean()),
        "reward_std": _spread(total),
        "frac_reward_zero_std": float((np.ptp(total, axis=1) < 1e-6).mean()),
        "similarity": float(np.asarray(rewards.similarity, np.float64).mean()),
    }
    for name, values in rewards.terms.items():
        term = np.asarray(values, np.float64)
        stats[f"rewards/{name}/mean"] = float(term.mean())
        stats[f"rewards/{name}/std"] = _spread(term)
    return stats


def _spread(values: np.ndarray) -> float:
    """Mean over the groups of the standard deviation within a group."""
    return float(values.std(axis=1, ddof=1).mean()) if values.shape[1] > 1 else 0.0
