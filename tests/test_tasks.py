"""Retention tasks: right answers are counted as lm_eval, SQuAD, CMRC and IFEval count them."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from golden import make_hub, make_tasks

from grpo_jax.config import Sampling
from grpo_jax.evals.answers import cmrc_scores, squad_scores
from grpo_jax.evals.completion import fill, text_completions
from grpo_jax.evals.instructions import FormatPrompt, Instruction, _rules, format_prompts
from grpo_jax.evals.likelihood import Score
from grpo_jax.evals.task_files import Choice, Question, read_choices, read_questions
from grpo_jax.evals.tasks import (
    NO_ANSWER,
    Prompts,
    compare_tasks,
    formats,
    load_tasks,
    multiple_choice,
    reading,
    run_tasks,
)
from grpo_jax.hub.decoder import load_decoder
from grpo_jax.rollout.sampler import build_sampler

GOLDEN = json.loads((Path(make_tasks.__file__).parent / "tasks.json").read_text("utf-8"))


BO = "\u0f56\u0f7c\u0f51\u0f0b"  # a Tibetan syllable
SEA, AND_SKY = "\u043c\u043e\u0440\u0435", " \u0438 \u043d\u0435\u0431\u043e"  # Russian

# Multiple choice


def test_three_ways_to_pick() -> None:
    """Sums say the short one, characters the long one, bytes the one of few letters in many."""
    row = Choice("Q", ("ab", "abcdefgh", "\u0f56\u0f56\u0f56\u0f56"), 1)
    logprobs = {" ab": -2.0, " abcdefgh": -3.5, " \u0f56\u0f56\u0f56\u0f56": -2.4}
    asked = []

    def likelihood(pairs):
        asked.extend(pairs)
        return [Score(logprobs[continuation], False, 1) for _, continuation in pairs]

    [item] = multiple_choice([row], likelihood, "Question: {question}\nAnswer:")
    # a character: -1, -0.4375, -0.6; a byte: -1, -0.4375, -0.2
    assert item["scores"] == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0}
    assert asked[0] == ("Question: Q\nAnswer:", " ab")
    assert item["logprobs"] == [-2.0, -3.5, -2.4]


def test_read_choices(tmp_path: Path) -> None:
    file = tmp_path / "mmlu.jsonl"
    lines = [
        {"question": "1?", "choices": ["a", "b"], "answer": 1, "subject": "x"},
        {"question": "2?", "choices": ["a", "b", "c"], "answer": "C"},
    ]
    file.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert read_choices(file) == [Choice("1?", ("a", "b"), 1), Choice("2?", ("a", "b", "c"), 2)]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "?", "choices": ["a"], "answer": 1}', "index or the letter of one of the 1"),
        ('{"question": "?", "choices": ["a"], "answer": true}', "answer is True"),
        ('{"question": "?", "choices": ["a", ""], "answer": 0}', "wanted a question and a list"),
        ('{"choices": ["a"], "answer": 0}', "wanted a question"),
        ("[1]", "a JSON list, wanted an object"),
        ("{", "not JSON"),
    ],
)
def test_malformed_choices(tmp_path: Path, line: str, message: str) -> None:
    good = '{"question": "?", "choices": ["a"], "answer": 0}\n'
    (tmp_path / "c.jsonl").write_text(good + line, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"c\.jsonl:2: .*{message}"):
        read_choices(tmp_path / "c.jsonl")


# Reading


def test_squad_equals_torchmetrics() -> None:
    found = [[100 * x for x in squad_scores(*row)] for row in make_tasks.SQUAD]
    np.testing.assert_allclose(found, GOLDEN["squad"], atol=1e-4)


@pytest.mark.parametrize(
    "answer, golds, em, f1",
    [
        # CMRC's script: the longest common run, 2 * run / (both lengths); punctuation is nothing
        ("\u5317\u4eac\u5927\u5b66\u3002", ["\u5317\u4eac\u5927\u5b66"], 1, 1),
        ("\u5728\u5317\u4eac", ["\u5317\u4eac\u5e02"], 0, 4 / 6),
        ("\u5317\u6d77\u4eac", ["\u5317\u4eac"], 0, 2 / 5),  # both characters, no run of two
        ("1998\u5e74", ["1998 \u5e74", "98"], 1, 1),
        ("\u4e0a\u6d77", ["\u5317\u4eac", "\u5e7f\u5dde"], 0, 0),
        (f"{BO}\u0f66\u0f90\u0f51", [f"{BO}\u0f61\u0f72\u0f42"], 0, 2 / 4),  # syllables
        ("", ["\u5317\u4eac"], 0, 0),
    ],
)  # fmt: skip
def test_cmrc_scores(answer: str, golds: list[str], em: float, f1: float) -> None:
    assert cmrc_scores(answer, golds) == pytest.approx((em, f1))


@pytest.mark.parametrize("answer, right", [("", 1), ("Unanswerable.", 1), ("Paris", 0)])
def test_a_question_without_answer(answer: str, right: float) -> None:
    assert squad_scores(answer, []) == cmrc_scores(answer, []) == (right, right)


def test_reading_prompts_and_scores() -> None:
    rows = [
        Question("It {question} rains.", "What?", ("it rains", "rain")),
        Question("Sun.", "Who?", ()),
    ]
    asked = []

    def generate(prompts, max_new_tokens, stops):
        asked.append((list(prompts), max_new_tokens, stops))
        return ["it rains now", "unanswerable"]

    items = reading(rows, generate, "{context} {question}", 9)
    assert asked == [
        ([f"It {{question}} rains. What?\n{NO_ANSWER}", f"Sun. Who?\n{NO_ANSWER}"], 9, ("\n",))
    ]
    assert items[0]["scores"] == pytest.approx({"em": 0.0, "f1": 80.0, "avg": 40.0})
    assert items[1]["scores"] == {"em": 100.0, "f1": 100.0, "avg": 100.0}
    asked.clear()
    with pytest.raises(ValueError, match="zip"):  # one question, two answers
        reading(rows[:1], generate, "{question}", 9)
    assert asked == [(["What?"], 9, ("\n",))]  # every question has an answer: no word of refusal


SQUAD_FILE = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "C",
                    "qas": [
                        {
                            "id": "1",
                            "question": "Q1",
                            "answers": [{"text": "a", "answer_start": 0}],
                        },
                        {"id": "2", "question": "Q2", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}
CMRC_FILE = [
    {
        "context_text": "C",
        "context_id": "x",
        "qas": [
            {"query_text": "Q1", "query_id": "1", "answers": ["a"]},
            {"query_text": "Q2", "query_id": "2", "answers": []},
        ],
    }
]
LINES = [
    {"context": "C", "question": "Q1", "answers": {"text": ["a"], "answer_start": [0]}},
    {"context": "C", "question": "Q2", "answers": []},
]


@pytest.mark.parametrize(
    "name, content",
    [
        ("squad.json", json.dumps(SQUAD_FILE)),
        ("cmrc.json", json.dumps(CMRC_FILE)),
        ("lines.jsonl", "\n".join(map(json.dumps, LINES))),
    ],
)
def test_read_questions(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    found = read_questions(tmp_path / name)
    assert found == [Question("C", "Q1", ("a",)), Question("C", "Q2", ())]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.jsonl", '{"context": "C", "question": "Q"}', "x.jsonl:1: wanted the texts context"),
        ("x.jsonl", '{"context": "C", "question": "Q", "answers": [""]}', "wanted the texts"),
        ("x.json", '[{"qas": [{"query_text": "Q", "answers": ["a"]}]}]', "paragraph 0: wanted"),
        ("x.json", "{", "x.json: not a JSON file"),
    ],
)
def test_malformed_questions(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / name)


# Formats

RIGHT_AND_WRONG = {
    "json": (['{"a": 1}', '```json\n{"a": [1]}\n```'], ["[1]", 'Here: {"a": 1}', "{a: 1}"]),
    "bullets": (["* a\n* b", "So:\n- a\n* b"], ["* a", "* a\n* b\n* c", "a * b * c"]),
    "lowercase": (["all low, 1."], ["All low", "123"]),
    "uppercase": (["ALL HIGH"], ["ALL high", "123"]),
    "keyword": (["Morning after morning"], ["one morning", "mornings mornings"]),
    "forbidden": (["a sea, other"], ["by The sea"]),
    "ending": (["So. That is all.", '"So. That is all."'], ["That is all. Bye"]),
    "quotation": (['"so"'], ['"so', 'so "so"', '"']),
    "words": (["word " * 19], ["word " * 20]),
    "commas": (["a; b"], ["a, b"]),
    "sentences": (["One. Two!", "A 3.5 b? So..."], ["One.", "One. Two. Three."]),
    "title": (["<<Sea>>\nIt is"], ["Sea", "The <<Sea>>", "<<>>"]),
    "language": ([SEA + AND_SKY], ["the sea", f"{SEA} and sky"]),
}  # fmt: skip


@pytest.mark.parametrize("rule", _rules(0), ids=lambda rule: rule.name)
def test_every_rule(rule: Instruction) -> None:
    right, wrong = RIGHT_AND_WRONG[rule.name]
    assert [rule.check(text) for text in right] == [True] * len(right)
    assert [rule.check(text) for text in wrong] == [False] * len(wrong)
    assert not rule.check("") and not rule.check(" \n")


def test_format_prompts() -> None:
    prompts = format_prompts()
    assert len({row.prompt for row in prompts}) == len(prompts) == 96
    assert sum(len(row.instructions) == 2 for row in prompts) == 24
    assert {rule.name for row in prompts for rule in row.instructions} == set(RIGHT_AND_WRONG)
    assert all(rule.text in row.prompt for row in prompts for rule in row.instructions)


def test_format_rates() -> None:
    yes, no = (Instruction(n, n, lambda _, v=v: v) for n, v in (("yes", True), ("no", False)))
    rows = [FormatPrompt("both", (yes, no)), FormatPrompt("one", (yes,))]
    items = formats(rows, lambda prompts, *_: ["x"] * len(prompts), 9)
    assert [item["scores"] for item in items] == [
        {"format_rate": 0.0, "instruction_rate": 0.5},
        {"format_rate": 1.0, "instruction_rate": 1.0},
    ]
    assert items[0]["checks"] == {"yes": True, "no": False}


# All together


def test_tasks_from_file_to_paired_test(tmp_path: Path) -> None:
    make_tasks.write_task(tmp_path)
    lines = [{"context": "C", "question": f"Q{i}", "answers": ["yes"]} for i in range(20)]
    (tmp_path / "read.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    specs = ("multiple_choice:asset:choices", f"reading:{tmp_path / 'read.jsonl'}", "format")

    def resolve(path: str) -> str:
        return str(tmp_path / "choices.jsonl") if path.startswith("asset:") else path

    tasks = load_tasks(specs, 12, 0, resolve)
    assert [task.name for task in tasks] == ["multiple_choice/choices", "reading/read", "format"]
    assert [len(task.rows) for task in tasks] == [12, 12, 12]
    assert list(tasks[0].rows) == list(load_tasks(specs, 20, 0, resolve)[0].rows[:12])
    assert list(tasks[0].rows) != list(load_tasks(specs, 12, 1, resolve)[0].rows)
    assert len(load_tasks(specs, 0, 0, resolve)[2].rows) == 96
    prompts = Prompts("{question}", "{context} {question}", 8)

    def run(said: str) -> dict:
        def likelihood(pairs):
            return [Score(-float(len(continuation)), False, 1) for _, continuation in pairs]

        return run_tasks(tasks, likelihood, lambda p, *_: [said] * len(p), prompts, 200, 0)

    first, second = run("no"), run("yes")
    assert first["reading/read"]["metrics"]["em"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert second["reading/read"]["metrics"]["em"]["value"] == 100.0
    acc = first["multiple_choice/choices"]["metrics"]["acc"]
    assert acc["low"] <= acc["value"] <= acc["high"] and acc["low"] < acc["high"]
    assert len(first["format"]["items"]) == 12
    found = compare_tasks(first, second, 200, 0)
    assert found["reading/read"]["f1"]["difference"] == 100.0
    assert found["reading/read"]["f1"]["p"] < 0.05
    assert found["multiple_choice/choices"]["acc"]["p"] == 1.0
    json.dumps(first)
    second["format"]["items"][0]["question"] = "another"
    with pytest.raises(ValueError, match="task format: the two arms were asked different"):
        compare_tasks(first, second, 200, 0)


@pytest.mark.parametrize("spec", ["multiple_choice", "format:x.jsonl", "choice:x.jsonl", ""])
def test_unknown_tasks(spec: str) -> None:
    with pytest.raises(ValueError, match="wanted multiple_choice:FILE, reading:FILE or format"):
        load_tasks((spec,), 0, 0)


def test_task_files_that_do_not_do(tmp_path: Path) -> None:
    empty = tmp_path / "x.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="holds no questions"):
        load_tasks((f"reading:{empty}",), 0, 0)
    with pytest.raises(ValueError, match="format is there twice"):
        load_tasks(("format", "format"), 0, 0)
    with pytest.raises(FileNotFoundError):
        load_tasks((f"multiple_choice:{tmp_path / 'none.jsonl'}",), 0, 0)


def test_generate_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts in and out on a random llama: the same as the policy's own greedy generation."""
    make_hub.write_decoder(tmp_path / "llama", "llama")
    policy = load_decoder(tmp_path / "llama")
    eos_ids, key = policy.tokenizer.eos_ids, jax.random.key(0)
    sample = build_sampler(policy.model, Sampling(temperature=0.0), 16, eos_ids)

    def draw(ids, lengths, call):
        found = sample({"params": policy.params}, ids, lengths, key, num_generations=1)
        return found.ids[:, 0], found.mask[:, 0], found.ended[:, 0]

    generate = text_completions(policy.tokenizer, draw, 2, max_length=64, chat=False)
    prompts = ["The sea is wide and", "x", "The sea"]
    wanted = policy.generate(prompts, max_new_tokens=40, chat=False)
    assert generate(prompts, 40, ()) == wanted  # three rounds of 16, the last cut
    stop = wanted[0][5]
    assert generate(prompts[:1], 40, (stop,)) == [wanted[0].split(stop)[0].strip()]
    generate(["long " * 20], 16, ())
    assert "1 of 1 prompts are longer than 48 tokens" in caplog.text
    with pytest.raises(ValueError, match="64 new tokens leave no room"):
        generate(prompts, 64, ())


def test_fill_is_one_pass() -> None:
    assert fill("{a} {b} {c}", {"a": "{b}", "b": r"\1"}) == r"{b} \1 {c}"
