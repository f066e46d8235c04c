"""Scores of a rollout: texts in, `Rewards` on device out.

The host measures lengths, repetition and language and runs the frozen encoder (jitted, in length
buckets); one jitted function turns all of it into terms and a total. Anchor embeddings are computed
once a row. Every string has a defined reward: odd text is sanitised, and a completion
without a visible character scores 0 in every term.

An encoder with the policy's tokenizer reads a rollout's token ids on the device while the host
works on the texts. Only completions that the tokenizer would spell otherwise go through text.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import config
from grpo_jax.rewards import terms
from grpo_jax.structs import Array, Rewards, Rollout, Row
from grpo_jax.text.measures import is_empty, repeated_share, sanitise
from grpo_jax.text.scripts import units


class TextEncoder(Protocol):
    """What we need of an encoder; the hub's encoders are."""

    def embed(self, texts: list[str]) -> np.ndarray: ...  # float32 [N, D]


@runtime_checkable
class TokenEncoder(TextEncoder, Protocol):
    """An encoder that reads token ids too: hub.SentenceEncoder, whose methods these are."""

    def shares_tokenizer(self, folder: Path) -> bool: ...

    def embed_ids(self, ids: Array, lengths: np.ndarray) -> Callable[[], np.ndarray]: ...

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray: ...


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

    def reads_tokens(self, folder: Path) -> bool:
        """Whether `score` may be given the rollout of a policy with the tokenizer in `folder`."""
        return isinstance(self.encoder, TokenEncoder) and self.encoder.shares_tokenizer(folder)

    def score(
        self, texts: list[str], rows: list[Row], tau: float, rollout: Rollout | None = None
    ) -> Rewards:
        """Score P * G completions, the G of a prompt next to each other.

        Args:
          texts: P * G decoded completions.
          rows: the prompts' P rows, which hold the anchors.
          tau: threshold of the semantic term, below 1.
          rollout: what the texts were decoded from, where `reads_tokens` allows it: the same
            rewards, sooner. Best with its arrays on the device; this process's rows only.

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
        vectors = self._start_embedding(texts, rollout)
        pieces = [units(text) for text in texts]
        lengths = np.array([len(piece) for piece in pieces], np.float32).reshape(shape)
        on_grid = partial(np.reshape, shape=shape)
        measures = (
            on_grid(np.asarray(self.gate(texts), bool)),
            lengths / self._expected_lengths(rows, lengths),
            on_grid(np.array([repeated_share(piece) for piece in pieces], np.float32)),
            on_grid(np.array([not is_empty(text) for text in texts])),
        )
        anchors = self._anchor_embeddings(rows)
        return self._score(vectors().reshape(*shape, -1), anchors, *measures, np.float32(tau))

    def _start_embedding(
        self, texts: list[str], rollout: Rollout | None
    ) -> Callable[[], np.ndarray]:
        """Sets the device to work where it has the ids; the result waits for float32 [N, D]."""
        if rollout is None:
            return lambda: embed(self.encoder, texts)
        assert isinstance(self.encoder, TokenEncoder)
        encoder, T = self.encoder, rollout.ids.shape[-1]
        lengths = np.asarray(rollout.mask).sum(-1).reshape(-1)
        lengths = lengths - np.asarray(rollout.ended).reshape(-1)  # without the EOS
        vectors = encoder.embed_ids(rollout.ids.reshape(-1, T), lengths)

        def wait() -> np.ndarray:
            same = encoder.same_tokens(texts, np.asarray(rollout.ids).reshape(-1, T), lengths)
            out = vectors()
            if others := np.flatnonzero(~same).tolist():
                out[others] = embed(encoder, [texts[i] for i in others])
            return out

        return wait

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
