"""Tasks that tell what a model still can do: multiple choice, reading, following a format.

In: task specifications, and the model as two functions over texts, `likelihood` and `generate`.
Out: metrics with confidence intervals, and every item, so that arms can be compared item by item.

    multiple_choice:FILE   acc, acc_norm, acc_bytes, defined as in lm-evaluation-harness, 0 to 1
    reading:FILE           em, f1 and their mean avg, 0 to 100, as SQuAD's and CMRC's scripts say
    format                 format_rate, instruction_rate (evals/instructions.py), 0 to 1

FILE is a path or asset:NAME; evals/task_files.py says what may be in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.data.splits import uniform
from grpo_jax.evals.answers import cmrc_scores, squad_scores
from grpo_jax.evals.completion import Generate, fill
from grpo_jax.evals.instructions import FormatPrompt, format_prompts
from grpo_jax.evals.likelihood import Score
from grpo_jax.evals.metrics import (
    Statistic,
    bootstrap_intervals,
    paired_bootstrap,
)
from grpo_jax.evals.task_files import Choice, Question, read_choices, read_questions
from grpo_jax.text.scripts import written_without_spaces

KINDS = ("multiple_choice", "reading", "format")
NO_ANSWER = 'If the text does not answer the question, write "unanswerable".'

Likelihood = Callable[[Sequence[tuple[str, str]]], list[Score]]
Item = dict[str, Any]  # "scores": {metric: number}, and what was asked and answered


class Prompts(NamedTuple):
    """How questions are put to the model; the names in braces are replaced."""

    multiple_choice: str  # {question}; an answer follows it behind a space
    reading: str  # {context}, {question}
    max_new_tokens: int  # of an answer that is generated


class Task(NamedTuple):
    name: str  # its kind, and behind a slash its file's name
    kind: str
    rows: Sequence[Choice] | Sequence[Question] | Sequence[FormatPrompt]


def load_tasks(
    specs: Sequence[str], max_rows: int, seed: int, resolve: Callable[[str], str] = str
) -> list[Task]:
    """Reads the files of all tasks.

    Args:
      specs: "multiple_choice:FILE", "reading:FILE" or "format".
      max_rows: questions a task, drawn by seed and text, so that fewer are part of more; 0: all.
      resolve: turns "asset:NAME" into a local path.

    Raises:
      ValueError, FileNotFoundError: what is wrong with a specification or a file, and where.
    """
    tasks: dict[str, Task] = {}
    for spec in specs:
        kind, _, path = spec.partition(":")
        if kind not in KINDS or (kind == "format") == bool(path):
            raise ValueError(
                f"evaluation.tasks: got {spec!r}, wanted multiple_choice:FILE, reading:FILE or "
                "format"
            )
        name = kind
        rows: Sequence[Any] = format_prompts()
        if path:
            name = f"{kind}/{Path(path.removeprefix('asset:')).stem}"
            read: Any = read_choices if kind == "multiple_choice" else read_questions
            rows = read(resolve(path))
        if name in tasks:
            raise ValueError(f"evaluation.tasks: {name} is there twice; rename one of the files")
        if not rows:
            raise ValueError(f"evaluation.tasks: {spec} holds no questions")
        rows = sorted(rows, key=lambda row: uniform(_identity(row), seed))
        tasks[name] = Task(name, kind, rows[: max_rows or None])
    return list(tasks.values())


def _identity(row: Choice | Question | FormatPrompt) -> str:
    return row.prompt if isinstance(row, FormatPrompt) else repr(row)


def run_tasks(
    tasks: Sequence[Task],
    likelihood: Likelihood,
    generate: Generate,
    prompts: Prompts,
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """Puts all tasks to one model.

    Args:
      tasks: of `load_tasks`.
      likelihood, generate: the model; see evals.likelihood and evals.completion.
      prompts: the wording.
      bootstrap: resamples behind each 95% interval; seed: of the resampling.

    Returns:
      {task: {"metrics": {metric: {"value", "low", "high"}}, "items": [...]}}, JSON-ready.
    """
    out: dict[str, dict[str, Any]] = {}
    for task in tasks:
        rows: Any = task.rows
        if task.kind == "multiple_choice":
            items = multiple_choice(rows, likelihood, prompts.multiple_choice)
        elif task.kind == "reading":
            items = reading(rows, generate, prompts.reading, prompts.max_new_tokens)
        else:
            items = formats(rows, generate, prompts.max_new_tokens)
        metrics = bootstrap_intervals(task_statistics(items), bootstrap, seed)
        out[task.name] = {"metrics": metrics, "items": items}
    return out


def task_statistics(items: Sequence[Item]) -> dict[str, Statistic]:
    """The items' scores, for `metrics.bootstrap_intervals` and `metrics.paired_bootstrap`."""

    def mean(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    return {
        name: Statistic(np.array([[item["scores"][name], 1.0] for item in items]), mean)
        for name in items[0]["scores"]
    }


def compare_tasks(
    first: Mapping[str, Mapping[str, Any]],
    second: Mapping[str, Mapping[str, Any]],
    bootstrap: int,
    seed: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Paired bootstrap of two arms' `run_tasks` results, on the tasks that both have.

    Returns:
      {task: {metric: {"difference": second - first, "low", "high", "p"}}}.

    Raises:
      ValueError: an arm was asked other questions.
    """
    out = {}
    for name in first:
        if name not in second:
            continue
        pair = [side[name]["items"] for side in (first, second)]
        asked, other = ([item["question"] for item in items] for items in pair)
        if asked != other:
            raise ValueError(f"task {name}: the two arms were asked different questions")
        one, two = map(task_statistics, pair)
        out[name] = paired_bootstrap(one, two, bootstrap, seed)
    return out


def multiple_choice(rows: Sequence[Choice], likelihood: Likelihood, prompt: str) -> list[Item]:
    """Takes the likeliest choice for the model's answer.

    acc compares summed log-probs, acc_norm log-probs a character, acc_bytes log-probs a UTF-8 byte
    of the choice, as lm-evaluation-harness 0.4 does; of equal ones the first is taken.
    """
    contexts = [prompt.replace("{question}", row.question) for row in rows]
    pairs = [
        (context, f" {choice}")
        for context, row in zip(contexts, rows, strict=True)
        for choice in row.choices
    ]
    logprobs = iter([score.logprob for score in likelihood(pairs)])
    items = []
    for row in rows:
        found = np.array([next(logprobs) for _ in row.choices])
        lengths = {
            "acc": np.ones(len(found)),
            "acc_norm": np.array([len(choice) for choice in row.choices]),
            "acc_bytes": np.array([len(choice.encode()) for choice in row.choices]),
        }
        picked = {name: int(np.argmax(found / length)) for name, length in lengths.items()}
        items.append(
            {
                "question": row.question,
                "choices": list(row.choices),
                "gold": row.answer,
                "logprobs": found.tolist(),
                "scores": {name: float(i == row.answer) for name, i in picked.items()},
            }
        )
    return items


def reading(
    rows: Sequence[Question], generate: Generate, prompt: str, max_new_tokens: int
) -> list[Item]:
    """Answers questions about texts; the first line of a completion is the answer.

    Where the answers of all rows together are written without spaces, they are scored as CMRC's
    are, and otherwise as SQuAD's.
    """
    without_spaces = written_without_spaces([a for row in rows for a in row.answers])
    score = cmrc_scores if without_spaces else squad_scores
    some_unanswerable = any(not row.answers for row in rows)
    asked = [
        fill(
            f"{prompt}\n{NO_ANSWER}" if some_unanswerable else prompt,
            {"context": row.context, "question": row.question},
        )
        for row in rows
    ]
    found = generate(asked, max_new_tokens, ("\n",))
    items = []
    for row, answer in zip(rows, found, strict=True):
        em, f1 = (100.0 * x for x in score(answer, row.answers))
        items.append(
            {
                "question": row.question,
                "gold": list(row.answers),
                "answer": answer,
                "scores": {"em": em, "f1": f1, "avg": (em + f1) / 2},
            }
        )
    return items


def formats(rows: Sequence[FormatPrompt], generate: Generate, max_new_tokens: int) -> list[Item]:
    """Follows verifiable instructions (IFEval, arXiv 2311.07911; its strict accuracies).

    format_rate counts prompts all of whose instructions hold, instruction_rate the instructions
    that hold, a prompt's share each.
    """
    found = generate([row.prompt for row in rows], max_new_tokens, ())
    items = []
    for row, answer in zip(rows, found, strict=True):
        checks = {rule.name: rule.check(answer) for rule in row.instructions}
        share = sum(checks.values()) / len(checks)
        items.append(
            {
                "question": row.prompt,
                "answer": answer,
                "checks": checks,
                "scores": {"format_rate": float(share == 1.0), "instruction_rate": share},
            }
        )
    return items
