"""`python -m grpo_jax.hub MODEL --data=FILE`: what a model makes of a language.

    python -m grpo_jax.hub asset:all-minilm-l6-v2 --data=asset:oromo-english

prints what the model is, how its tokenizer cuts the text and, for an encoder, whether it tells
matched pairs from mismatched ones. An empty --source_field describes the target language alone.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np

from grpo_jax import config
from grpo_jax.hub.describe import describe


def samples(data: str, source_field: str, target_field: str, rows: int) -> list:
    """At most `rows` target texts or (source, target) pairs of a data file, in a fixed draw.

    Raises:
      FileNotFoundError, ValueError: see `data.sources.read_rows`; rows below 1.
    """
    from grpo_jax.assets import resolve
    from grpo_jax.data.sources import read_rows

    if rows < 1:
        raise ValueError(f"--rows: got {rows}, wanted at least 1")
    section = config.Data(source_field=source_field or target_field, target_field=target_field)
    found, _ = read_rows(resolve(data), section)
    order = np.random.default_rng(0).permutation(len(found))[:rows]
    if not source_field:
        return [found[i].target for i in order]
    return [(found[i].source, found[i].target) for i in order]


def main(arguments: list[str] | None = None) -> int:
    """Print the description; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.hub", description="What a model makes of a language."
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, asset:NAME or a hub id")
    parser.add_argument("--data", default="", help="FILE.jsonl (tsv, ...) or DATASET:SPLIT")
    parser.add_argument("--source_field", default="source", help="'': the target language alone")
    parser.add_argument("--target_field", default="target")
    parser.add_argument("--rows", type=int, default=512, help="at most so many texts")
    flags = parser.parse_args(arguments)
    try:
        texts = []
        if flags.data:
            texts = samples(flags.data, flags.source_field, flags.target_field, flags.rows)
        print(describe(flags.model, texts))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
