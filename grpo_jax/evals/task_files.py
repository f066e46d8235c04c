"""Files of questions: multiple choice and reading comprehension, in the forms that they come in.

In: a path. Out: rows; the first malformed one is an error with its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.data.sources import read_lines
from grpo_jax.text.strict import parse_json, shown


class Choice(NamedTuple):
    """A question with one right answer among several."""

    question: str
    choices: tuple[str, ...]
    answer: int


class Question(NamedTuple):
    """A question about a text."""

    context: str
    question: str
    answers: tuple[str, ...]  # any of them is right; () where the text does not answer it


def read_choices(path: str | Path) -> list[Choice]:
    """Reads multiple choice: jsonl with question, choices and answer, as in MMLU's own rows.

    answer is the index of the right choice, or its letter. Other fields are not looked at.

    Raises:
      FileNotFoundError, ValueError: no such file, or a malformed row, by its line.
    """
    rows = []
    for place, fields in _json_lines(Path(path)):
        question, choices, answer = (fields.get(k) for k in ("question", "choices", "answer"))
        if isinstance(answer, str) and len(answer) == 1:
            answer = ord(answer.upper()) - ord("A")
        texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not (isinstance(question, str) and question and texts and isinstance(choices, list)):
            raise ValueError(
                f"{place}: wanted a question and a list of choices, got {shown(fields, 80)}"
            )
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{place}: answer is {shown(fields.get('answer'))}, wanted the index or the letter "
                f"of one of the {len(choices)} choices"
            )
        rows.append(Choice(question, tuple(choices), answer))
    return rows


def read_questions(path: str | Path) -> list[Question]:
    """Reads reading comprehension, in one of these forms:

      SQuAD 1.1, 2.0 and CMRC 2018 as SQuAD: {"data": [{"paragraphs": [{"context", "qas"}]}]},
      CMRC 2018's own: [{"context_text", "qas": [{"query_text", "answers"}]}],
      jsonl: {"context", "question", "answers"}, with answers a list of texts or {"text": [...]}.

    A question without answers is one that the text does not answer.

    Raises:
      FileNotFoundError, ValueError: no such file, or what is missing in it.
    """
    path = Path(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return [_question(*row) for row in _json_lines(path)]
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    if isinstance(content, dict):
        articles = _objects(path, "data", content.get("data"))
        paragraphs = [
            p for a in articles for p in _objects(path, "paragraphs", a.get("paragraphs", []))
        ]
    else:
        paragraphs = _objects(path, "the file", content)
    rows = []
    for number, paragraph in enumerate(paragraphs):
        context = paragraph.get("context", paragraph.get("context_text"))
        for qa in _objects(path, f"qas of paragraph {number}", paragraph.get("qas", [])):
            question = qa.get("question", qa.get("query_text"))
            found = [] if qa.get("is_impossible") else qa.get("answers")
            fields = {"context": context, "question": question, "answers": found}
            rows.append(_question(f"{path}: paragraph {number}", fields))
    return rows


def _objects(path: Path, name: str, value: Any) -> list[dict[str, Any]]:
    """`value`, which must be a list of objects."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise ValueError(f"{path}: {name} is {shown(value, 80)}, wanted a list of objects")


def _question(place: str, fields: Mapping[str, Any]) -> Question:
    context, question, found = (fields.get(k) for k in ("context", "question", "answers"))
    if isinstance(found, dict):
        found = found.get("text")
    if isinstance(found, list):
        found = [a.get("text") if isinstance(a, dict) else a for a in found]
    right = isinstance(found, list) and all(isinstance(a, str) and a.strip() for a in found)
    if not (isinstance(context, str) and isinstance(question, str) and question and right):
        raise ValueError(
            f"{place}: wanted the texts context and question and a list of answers, got "
            f"{shown(dict(fields), 120)}"
        )
    return Question(context, question, tuple(found or ()))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("FILE:LINE", object) of each line that is not blank.

    Raises:
      FileNotFoundError, ValueError: no such file, or a line that is no JSON object.
    """
    for place, line in read_lines(path):
        try:
            fields = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{place}: not JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{place}: a JSON {type(fields).__name__}, wanted an object")
        yield place, fields
