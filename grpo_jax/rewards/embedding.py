"""Cosines under the frozen sentence encoder: texts or token ids in, similarities out.

The device works while the host goes on: whoever starts it waits for the result later. An encoder
with the policy's tokenizer reads a rollout's token ids before the host has any text. Only
completions that the tokenizer would spell otherwise go through text.
Anchor embeddings are computed once a text. A text on which the encoder fails has the vector 0,
which is similar to nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from grpo_jax.rewards import terms
from grpo_jax.structs import Array, Rollout
from grpo_jax.text.measures import is_empty, sanitise
from grpo_jax.text.strict import one_line, shown

_PLAIN = "a"  # what fails on this fails on everything
_ABOUT_A_TEXT = (ValueError, TypeError, LookupError)  # not: memory, the device, a lost file

_log = logging.getLogger(__name__)


class TextEncoder(Protocol):
    """What we need of an encoder; the hub's encoders are."""

    def embed(self, texts: list[str]) -> np.ndarray: ...  # float32 [N, D]


@runtime_checkable
class TokenEncoder(TextEncoder, Protocol):
    """An encoder on a device, which reads token ids too: hub.SentenceEncoder has these methods."""

    def start(self, texts: list[str]) -> Callable[[], np.ndarray]: ...

    def shares_tokenizer(self, folder: Path) -> bool: ...

    def embed_ids(self, ids: Array, lengths: np.ndarray) -> Callable[[], np.ndarray]: ...

    def same_tokens(self, texts: list[str], ids: np.ndarray, lengths: np.ndarray) -> np.ndarray: ...


def build_cosine() -> Callable[[Array, Array], jax.Array]:
    """Jit `terms.cosine`: float32 [P, G, D] and [P, D] in, [P, G] out."""
    return jax.jit(terms.cosine)


class EncoderSimilarity:
    """Cosine of completions and their prompt's anchor.

    Args:
      encoder: `.embed(list of N texts) -> float32 [N, D]`.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self._cosine = build_cosine()
        self._anchors: dict[str, np.ndarray] = {}

    def start(
        self, texts: list[str], anchors: list[str], rollout: Rollout | None = None
    ) -> Callable[[], tuple[Array, Array]]:
        """Sets the device to work on P * G texts, the G of an anchor next to each other.

        Args:
          texts, anchors: P * G and P sanitised texts.
          rollout: what the texts were decoded from, if the encoder is a `TokenEncoder` that
            shares the policy's tokenizer.

        Returns:
          A function that waits for float32 [P, G] in [-1, 1], and bool [P, G]: where the encoder
          has no vector for the completion or its anchor, so that the cosine is 0.
        """
        vectors = self._start_texts(texts, rollout)
        anchor_vectors = self._start_anchors(anchors)

        def wait() -> tuple[Array, Array]:
            known = anchor_vectors()
            P, D = known.shape
            found = vectors().reshape(P, -1, D)
            return self._cosine(found, known), ~(_usable(found) & _usable(known)[:, None])

        return wait

    def _start_texts(self, texts: list[str], rollout: Rollout | None) -> Callable[[], np.ndarray]:
        """Sets the device to work on the rollout or the texts: waits for float32 [N, D]."""
        if rollout is None:
            return start(self.encoder, texts)
        assert isinstance(self.encoder, TokenEncoder)
        encoder, T = self.encoder, rollout.ids.shape[-1]
        lengths = np.asarray(rollout.mask).sum(-1).reshape(-1)
        lengths = lengths - np.asarray(rollout.ended).reshape(-1)  # without the EOS
        vectors = encoder.embed_ids(rollout.ids.reshape(-1, T), lengths)

        def wait() -> np.ndarray:
            ids = np.asarray(rollout.ids).reshape(-1, T)
            try:
                same = encoder.same_tokens(texts, ids, lengths)
            except _ABOUT_A_TEXT:  # of one text, and `embed` finds out which
                same = np.zeros(len(texts), bool)
            out = vectors()
            if others := np.flatnonzero(~same).tolist():
                out[others] = embed(encoder, [texts[i] for i in others])
            return out

        return wait

    def _start_anchors(self, texts: list[str]) -> Callable[[], np.ndarray]:
        """Waits for float32 [P, D]; every row comes each epoch, but each text is encoded once."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._anchors]
        vectors = start(self.encoder, fresh) if fresh else None

        def wait() -> np.ndarray:
            if vectors is not None:
                self._anchors.update(zip(fresh, vectors(), strict=True))
            return np.stack([self._anchors[text] for text in texts])

        return wait


def embed(encoder: TextEncoder, texts: list[str]) -> np.ndarray:
    """Embed texts, each distinct one once: float32 [N, D]. Samples of a group often coincide.

    A text on which the encoder fails is named in the log and gets the vector 0.

    Raises:
      ValueError, TypeError, LookupError: the encoder fails on a plain word too.
    """
    return start(encoder, texts)()


def start(encoder: TextEncoder, texts: list[str]) -> Callable[[], np.ndarray]:
    """Starts `embed` where the encoder can be started; the result waits, and raises, as it does."""
    places: dict[str, int] = {}
    rows = [places.setdefault(sanitise(text), len(places)) for text in texts]
    distinct = list(places)
    vectors = None
    if isinstance(encoder, TokenEncoder):
        with contextlib.suppress(*_ABOUT_A_TEXT):  # `_vectors` finds out which
            vectors = encoder.start(distinct)
    return lambda: _vectors(encoder, distinct, vectors)[rows]


def _usable(vectors: np.ndarray) -> np.ndarray:
    """bool [...] of float32 [..., D]: vectors that have a cosine with others."""
    return np.isfinite(vectors).all(-1) & vectors.any(-1)


def _vectors(
    encoder: TextEncoder, texts: list[str], started: Callable[[], np.ndarray] | None = None
) -> np.ndarray:
    """float32 [N, D]; a batch that fails is halved until only what cannot be read is left out.

    Args:
      started: waits for the vectors, if the encoder has begun with these texts.
    """
    try:
        return np.asarray(started() if started else encoder.embed(texts), np.float32)
    except _ABOUT_A_TEXT as error:
        if len(texts) > 1:
            half = len(texts) // 2
            parts = [_vectors(encoder, part) for part in (texts[:half], texts[half:])]
            return np.concatenate(parts)
        plain = encoder.embed([_PLAIN])
        reason = f"{type(error).__name__}: {one_line(str(error))}"
        _log.warning("the encoder fails on %s, which scores 0 (%s)", shown(texts[0]), reason)
        return np.zeros_like(plain, np.float32)


def similarity(encoder: TextEncoder, texts: list[str], anchors: list[str]) -> np.ndarray:
    """Cosine of each text with its anchor: float32 [N], 0 where either is empty or unreadable."""
    if len(texts) != len(anchors):
        raise ValueError(f"similarity: got {len(texts)} texts and {len(anchors)} anchors.")
    if not texts:
        return np.zeros(0, np.float32)
    both = embed(encoder, [*texts, *anchors])
    cosine = terms.cosine(both[: len(texts), None], both[len(texts) :])[:, 0]
    pairs = zip(texts, anchors, strict=True)
    visible = [not is_empty(text) and not is_empty(anchor) for text, anchor in pairs]
    return np.asarray(cosine * np.array(visible), np.float32)
