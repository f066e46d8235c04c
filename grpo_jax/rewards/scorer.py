"""Scores of a rollout: texts in, `Rewards` on device out.

The host measures lengths, repetition and language, and the similarity of each completion with its
row's anchor comes from the frozen encoder (embedding.py) or from n-grams (lexical.py); one jitted
function turns all of it into terms and a total. Every string has a defined reward: odd text is
sanitised, and a completion without a visible character scores 0 in every term, as does one on which
the encoder fails.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import config
from grpo_jax.rewards import terms
from grpo_jax.rewards.anchors import build_anchor
from grpo_jax.rewards.embedding import EncoderSimilarity, TextEncoder, TokenEncoder, similarity
from grpo_jax.rewards.lexical import LexicalSimilarity
from grpo_jax.structs import Array, Rewards, Rollout, Row
from grpo_jax.text.measures import is_empty, repeated_share, sanitise
from grpo_jax.text.scripts import units


def term_weights(cfg: config.Reward) -> dict[str, float]:
    """The weight of each term, negative for a penalty.

    A term of weight 0 costs nothing and is there all the same: what is not rewarded is worth
    watching, arms that reward different things stay comparable, and a hard gate reads the language.
    """
    return {
        "semantic": cfg.semantic_weight,
        "language": cfg.language_weight,
        "length": -cfg.length_weight,
        "repetition": -cfg.repetition_weight,
    }


def build_score(cfg: config.Reward) -> Callable[..., Rewards]:
    """Jit the device part of the reward: similarities and measures in, `Rewards` out."""
    weights = term_weights(cfg)

    @jax.jit
    def score(
        similarity: Array,  # float32 [P, G]
        unread: Array,  # bool [P, G], True where the encoder has no vector
        language: Array,  # bool [P, G]
        length_ratio: Array,  # float32 [P, G]
        repetition: Array,  # float32 [P, G]
        visible: Array,  # bool [P, G], False for an empty completion
        tau: Array,  # float32 []
    ) -> Rewards:
        unread, visible = unread & visible, visible & ~unread
        similarity = similarity * visible
        values = {
            "semantic": terms.semantic(similarity, tau),
            "language": language.astype(jnp.float32),
            "length": terms.length_penalty(
                length_ratio, cfg.max_length_ratio, cfg.min_length_ratio
            ),
            "repetition": terms.repetition_penalty(repetition, cfg.max_repetition),
        }
        values = {name: values[name] * visible for name in weights}
        return Rewards(terms.combine(values, weights, cfg.hard_gate), values, similarity, unread)

    return score


class Scorer:
    """The reward of a run: a metric, an anchor for each row, a language gate and the weights.

    Args:
      encoder: `.embed(list of N texts) -> float32 [N, D]`. With reward.metric "chrf" or "bleu" only
        `similarity` runs it, which is for evaluation.
      gate: `gate(list of N texts) -> bool [N]`, True for text in the wanted language.
      cfg: the config's reward section.
      anchor_of: the text that a row's completions are compared with, from `build_anchor`; needed
        for reward.anchor = "shuffled", which depends on all rows.
      gather: joins float32 [P, G] of every process along P, in the order of the processes. The
        source-anchored length term needs it for the median of the whole batch; then every process
        must call `score` at the same time with as many rows. Left out, a process sees its own.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        gate: Callable[[list[str]], np.ndarray],
        cfg: config.Reward,
        anchor_of: Callable[[Row], str] | None = None,
        gather: Callable[[np.ndarray], np.ndarray] = lambda values: values,
    ) -> None:
        self.encoder, self.gate, self.cfg = encoder, gate, cfg
        self.anchor_of = anchor_of or build_anchor(cfg.anchor)
        self.gather = gather
        self.weights = term_weights(cfg)
        self._score = build_score(cfg)
        self._metric = (
            EncoderSimilarity(encoder) if cfg.metric == "cosine" else LexicalSimilarity(cfg.metric)
        )

    def similarity(self, texts: list[str], anchors: list[str]) -> np.ndarray:
        """Cosine of each text with its anchor under the reward's encoder: float32 [N]."""
        return similarity(self.encoder, texts, anchors)

    def similarity_to_anchor(self, texts: list[str], rows: list[Row]) -> np.ndarray:
        """What `score` calls similarity, alone, for calibrating tau: float32 [N], N = P * G.

        The run's metric of each text with its row's anchor; 0 for an empty text.

        Args:
          texts, rows: as for `score`.

        Raises:
          ValueError: the counts do not fit, or a row lacks the anchor text.
        """
        if not texts and not rows:
            return np.zeros(0, np.float32)
        self._check_counts(texts, rows)
        texts = [sanitise(text) for text in texts]
        found, _ = self._metric.start(texts, self._anchors(rows))()
        found = np.asarray(found).reshape(-1)
        return np.where([is_empty(text) for text in texts], np.float32(0), found)

    def reads_tokens(self, folder: Path) -> bool:
        """Whether `score` may be given the rollout of a policy with the tokenizer in `folder`."""
        if self.cfg.metric != "cosine" or not isinstance(self.encoder, TokenEncoder):
            return False
        return self.encoder.shares_tokenizer(folder)

    def score(
        self, texts: list[str], rows: list[Row], tau: float, rollout: Rollout | None = None
    ) -> Rewards:
        """Score P * G completions, the G of a prompt next to each other.

        Args:
          texts: P * G decoded completions.
          rows: the prompts' P rows, which have the anchors.
          tau: threshold of the semantic term, below 1.
          rollout: what the texts were decoded from, where `reads_tokens` allows it: the same
            rewards, sooner. Best with its arrays on the device; this process's rows only.

        Returns:
          Rewards on device, [P, G] each; its terms are those of `term_weights`.

        Raises:
          ValueError: the counts do not fit, tau >= 1, or a row lacks the anchor text.
        """
        self._check_counts(texts, rows)
        if not tau < 1.0:
            raise ValueError(f"reward.tau: got {tau}, wanted a similarity below 1.")
        shape = (len(rows), len(texts) // len(rows))
        texts = [sanitise(text) for text in texts]
        anchors = self._anchors(rows)
        similarities = self._metric.start(texts, anchors, rollout)
        pieces = [units(text) for text in texts]
        lengths = np.array([len(piece) for piece in pieces], np.float32).reshape(shape)
        on_grid = partial(np.reshape, shape=shape)
        measures = (
            on_grid(np.asarray(self.gate(texts), bool)),
            lengths / self._expected_lengths(anchors, lengths),
            on_grid(np.array([repeated_share(piece) for piece in pieces], np.float32)),
            on_grid(np.array([not is_empty(text) for text in texts])),
        )
        return self._score(*similarities(), *measures, np.float32(tau))

    def _check_counts(self, texts: list[str], rows: list[Row]) -> None:
        if not rows or len(texts) % len(rows):
            raise ValueError(f"score: got {len(texts)} texts for {len(rows)} rows, wanted P * G.")

    def _anchors(self, rows: list[Row]) -> list[str]:
        """The rows' anchor texts, sanitised: P."""
        texts = [sanitise(self.anchor_of(row)) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if is_empty(text):
                kind = "source" if self.cfg.anchor == "source" else "target"
                raise ValueError(
                    f"reward.anchor = {self.cfg.anchor!r} compares completions with a {kind}, but "
                    f"{row} has none. Drop such rows, or set reward.anchor = 'source' to train "
                    "without references."
                )
        return texts

    def _expected_lengths(self, anchors: list[str], lengths: np.ndarray) -> np.ndarray:
        """Units a completion should have: float32 [P, 1], at least 1.

        Against a reference, its length; anchored on the source, the batch's median (SG-SRL), for
        units of two languages do not compare. Empty completions are no part of the median.
        """
        if self.cfg.anchor == "source":
            everyone = self.gather(lengths)
            written = everyone[everyone > 0]
            expected = np.full(len(anchors), np.median(written) if written.size else 1.0)
        else:
            expected = np.array([len(units(anchor)) for anchor in anchors])
        return np.maximum(expected.astype(np.float32), 1.0)[:, None]


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
