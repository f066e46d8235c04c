"""The judge: a second encoder, so that the reward's own encoder does not mark its own work.

A folder in, an object with `.embed(texts) -> float32 [N, D]` out; `rewards.similarity` turns it
into cosines. Nothing is downloaded and no code out of a folder is run.
"""

from __future__ import annotations

import json
from pathlib import Path

from grpo_jax import hub
from grpo_jax.assets.judge import Judge


def load_judge(path: str, batch_size: int = 64) -> hub.SentenceEncoder | Judge:
    """Load the judge: USE-multilingual as `asset:use-multilingual-judge` stores it, or any encoder.

    Args:
      path: a local folder whose config.json says what it holds.
      batch_size: texts at a time, for a sentence-transformers folder.

    Raises:
      FileNotFoundError: no such folder, or a file in it is missing.
      ValueError: config.json cannot be read, or the weights do not fit it.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"encoder.judge: {path} is not a model folder ({file.name} is missing). Name a "
            "sentence-transformers folder, or 'asset:use-multilingual-judge'."
        )
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"encoder.judge: {file} is not a model's config.json: {error}") from error
    return (
        Judge(path) if kind == "use-multilingual" else hub.load_encoder(path, batch_size=batch_size)
    )
