"""What lm-evaluation-harness's own model class, torch underneath, makes of a random tiny llama.

    python tests/golden/make_tasks.py     # tasks.json; needs torch, lm_eval, torchmetrics

log-likelihoods, rolling log-likelihoods, greedy generations and a multiple-choice task are computed
by lm_eval.models.huggingface.HFLM on make_hub's llama; exact match and F1 by torchmetrics' SQuAD.
The functions that need neither are what the tests import.
"""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
_LONG = "".join(random.Random(3).choices("abc def ghi.\n", k=700))
PAIRS = [
    ["The sea is", " wide"],
    ["The sea is", " blue and wide"],
    ["The sea is ", "wide"],  # the space goes to the continuation
    ["", "no context"],
    ["x", " y"],
    [_LONG[:300], " cut on the left"],
    [_LONG[:110], _LONG[110:190]],  # together longer than the model's 128 positions
    ["The sea is", "\u00e9t\u00e9 \u0f0b"],
    ["<|bos|>The sea is", " wide"],
    ["A much longer prompt than the others.", "08"],  # what greedy decoding says
]
TEXTS = ["A short text.", _LONG[:128], _LONG[:129], _LONG, "x"]
GENERATIONS = [
    ["The sea is wide, and the sea is blue.", {"until": ["W", "=="], "max_gen_toks": 24}],
    ["A bee flies from flower to flower, and", {"max_gen_toks": 24, "temperature": 0.7}],
    ["A much longer prompt than the others.", {"until": "\n", "max_gen_toks": 24}],
    [_LONG[:200], {"until": ["_V", "\n\n"], "max_gen_toks": 80}],  # two rounds, cut on the left
    ["Twice as long as what is drawn at once", {"max_gen_toks": 80, "top_p": 0.9}],
]
for _, _arguments in GENERATIONS:
    _arguments["do_sample"] = False
SQUAD = [
    ["The Cat, sat!", ["a cat"]],
    ["Paris", ["paris.", "in Paris"]],
    ["the the city of New York New", ["New York City", "NYC"]],
    ["", ["something"]],
    ["42", ["forty-two"]],
]


def choices() -> list[dict]:
    """Multiple-choice rows whose choices differ in characters, bytes and tokens."""
    draw = random.Random(1)
    words = [
        "sea",
        "\u00e9t\u00e9",
        "a longer choice",
        "no",
        "\u0f56\u0f7c\u0f51",
        "wide",
        "forty two",
    ]
    return [
        {
            "question": f"What is number {i} of {draw.randrange(100)}?",
            "choices": draw.sample(words, 2 + i % 2 * 2),
            "answer": draw.randrange(2),
        }
        for i in range(24)
    ]


PROMPT = "Question: {question}\nAnswer:"
TASK = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
"""


def write_task(folder: Path) -> None:
    """The rows of `choices` as a task of lm_eval."""
    file = folder / "choices.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in choices()), encoding="utf-8")
    (folder / "tiny_choices.yaml").write_text(TASK.replace("FILE", str(file)), encoding="utf-8")


def _requests(kind: str, arguments: list) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, tuple(a), i) for i, a in enumerate(arguments)]


def main() -> None:
    import lm_eval
    import make_hub  # beside this script
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from torchmetrics.functional.text import squad
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_hub.write_decoder(folder / "llama", "llama")
        write_task(folder)
        lm = HFLM(
            AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32).eval(),
            tokenizer=AutoTokenizer.from_pretrained(folder / "llama"),
            batch_size=2,
            device="cpu",
        )
        assert lm.max_length == 128
        results = lm_eval.simple_evaluate(
            lm, tasks=["tiny_choices"], task_manager=TaskManager(include_path=str(folder))
        )["results"]["tiny_choices"]
        golden = {
            "loglikelihood": lm.loglikelihood(_requests("loglikelihood", PAIRS)),
            "rolling": lm.loglikelihood_rolling(
                _requests("loglikelihood_rolling", [[text] for text in TEXTS])
            ),
            "generations": lm.generate_until(_requests("generate_until", GENERATIONS)),
            "tiny_choices": {k: results[f"{k},none"] for k in ("acc", "acc_norm", "acc_bytes")},
        }
    golden["squad"] = []
    for i, (answer, golds) in enumerate(SQUAD):
        target = {"answers": {"answer_start": [0] * len(golds), "text": golds}, "id": str(i)}
        found = squad([{"prediction_text": answer, "id": str(i)}], [target])
        golden["squad"].append([float(found["exact_match"]), float(found["f1"])])
    text = json.dumps(golden, indent=1)
    (HERE / "tasks.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
