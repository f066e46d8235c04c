"""chrF++ and BLEU as rewards: pairs of texts in, sentence scores in [0, 1] out.

They are the rewards that arXiv 2605.14366 compares with its semantic one. The numbers are
sacrebleu's sentence scores over 100, with its defaults for sentences. BLEU's tokens are 13a's, or
our `units` where the anchor is written without spaces, as in evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from grpo_jax.structs import Rollout
from grpo_jax.text.scripts import units, written_without_spaces

METRICS = ("chrf", "bleu")


class LexicalSimilarity:
    """chrF++ or BLEU of completions against their prompt's anchor.

    Args:
      metric: "chrf", chrF++ (Popović 2017: 6 character and 2 word orders, beta 2), or "bleu",
        BLEU-4 with exponential smoothing over the orders that the completion is long enough for.

    Raises:
      ValueError: another metric.
    """

    def __init__(self, metric: str) -> None:
        if metric not in METRICS:
            options = ", ".join(("cosine", *METRICS))
            raise ValueError(f"reward.metric: got {metric!r}, wanted one of {options}.")
        self.metric = metric

    def start(
        self, texts: list[str], anchors: list[str], rollout: Rollout | None = None
    ) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
        """Scores P * G texts, the G of an anchor next to each other.

        Args:
          texts, anchors: P * G and P sanitised texts.
          rollout: not read; the token ids say nothing about these metrics.

        Returns:
          A function that computes float32 [P, G] in [0, 1], and bool [P, G], False: these metrics
          can read every text.
        """
        G = len(texts) // len(anchors)

        def compute() -> tuple[np.ndarray, np.ndarray]:
            rows = [
                against(self.metric, anchor, texts[p * G : (p + 1) * G])
                for p, anchor in enumerate(anchors)
            ]
            return np.stack(rows), np.zeros((len(anchors), G), bool)

        return compute


def against(metric: str, anchor: str, texts: Sequence[str]) -> np.ndarray:
    """Sentence scores of texts against one anchor: float32 [N] in [0, 1].

    The anchor's n-grams are counted once, and equal texts are scored once. An empty text gets 0.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    split = metric == "bleu" and written_without_spaces([anchor])
    cut = _joined_units if split else str
    # sacrebleu keeps the n-grams of a corpus's references; ours is a corpus of one sentence.
    references = [[cut(anchor)]]
    scorer: CHRF | BLEU
    if metric == "chrf":
        scorer = CHRF(word_order=2, references=references)
    else:
        tokenize = "none" if split else "13a"
        scorer = BLEU(tokenize=tokenize, effective_order=True, force=True, references=references)
    distinct = {text: scorer.corpus_score([cut(text)], None).score for text in dict.fromkeys(texts)}
    scores = np.array([distinct[text] for text in texts]) / 100.0
    return np.clip(scores, 0.0, 1.0).astype(np.float32)


def _joined_units(text: str) -> str:
    return " ".join(units(text))
