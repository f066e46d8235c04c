"""Prompts whose answers a program can check: does the model still follow instructions?

In the manner of IFEval (Zhou et al., arXiv 2311.07911): a simple subject, and one or two rules
about the form of the answer, never about its content. The prompts are made here, the same 96 ones
every time; a quarter of them have two rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import NamedTuple

from grpo_jax.text.measures import is_empty
from grpo_jax.text.scripts import script_shares, units

SUBJECTS = (
    "a rainy day in a city", "how bread is baked", "the sea at night", "a visit to a market",
    "why people keep dogs", "how a bicycle works", "a long train journey", "a first day at school",
    "what a doctor does", "how rivers begin", "a small village", "the life of a bee",
    "how to plant a tree", "a football match", "the use of maps", "what winter is like",
    "how paper is made", "a walk in a forest", "cooking for friends", "learning a language",
    "how clocks measure time", "birds in autumn", "an old house", "the moon",
)  # fmt: skip
_WORDS = ("morning", "water", "people", "small", "always", "begin")
_ENDINGS = ("That is all.", "I hope this helps.", "The end.")
_SCRIPTS = {"Russian": "Cyrillic", "Greek": "Greek", "Arabic": "Arabic", "Chinese": "Han"}
_FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
_BULLET = re.compile(r"^\s*[*-]\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_LEAST = 0.9  # share of the units in the script that was asked for


class Instruction(NamedTuple):
    """A rule about the form of an answer."""

    name: str
    text: str  # the sentence that asks for it
    holds: Callable[[str], bool]

    def check(self, answer: str) -> bool:
        """Whether the rule holds for an answer; no rule holds for an empty one."""
        return not is_empty(answer) and self.holds(answer.strip())


class FormatPrompt(NamedTuple):
    """What the model is asked, and the rules that its answer is checked against."""

    prompt: str
    instructions: tuple[Instruction, ...]


def format_prompts() -> list[FormatPrompt]:
    """All prompts: each subject four times, each time with another rule."""
    prompts = []
    for number, subject in enumerate(SUBJECTS * 4):
        rules = _rules(number)
        first = rules[number % len(rules)]
        chosen: tuple[Instruction, ...] = (first,)
        if number % 3 == 2:
            others = [rule for rule in rules if _together(first.name, rule.name)]
            if others:
                chosen = (first, others[number // 3 % len(others)])
        asked = " ".join(rule.text for rule in chosen)
        prompts.append(FormatPrompt(f"Write a short text about {subject}. {asked}", chosen))
    return prompts


def _rules(number: int) -> list[Instruction]:
    """Every rule, with parameters that change with the number."""
    count = 2 + number % 4
    limit = 20 + 10 * (number % 4)
    word = _WORDS[number % len(_WORDS)]
    ending = _ENDINGS[number % len(_ENDINGS)]
    language, script = list(_SCRIPTS.items())[number % len(_SCRIPTS)]
    return [
        Instruction(
            "json", "Give your whole answer as a JSON object, with nothing around it.", _is_json
        ),
        Instruction(
            "bullets",
            f"Your answer must contain exactly {count} bullet points, each on a line that begins "
            'with "* ".',
            lambda answer: len(_BULLET.findall(answer)) == count,
        ),
        Instruction(
            "lowercase",
            "Your whole answer must be in lower case letters; no capital letters are allowed.",
            lambda answer: answer == answer.lower() and answer != answer.upper(),
        ),
        Instruction(
            "uppercase",
            "Your whole answer must be in CAPITAL LETTERS.",
            lambda answer: answer == answer.upper() and answer != answer.lower(),
        ),
        Instruction(
            "keyword",
            f'Use the word "{word}" at least twice.',
            lambda answer: units(answer).count(word) >= 2,
        ),
        Instruction(
            "forbidden",
            'Do not use the word "the" anywhere.',
            lambda answer: "the" not in units(answer),
        ),
        Instruction(
            "ending",
            f'End your answer with exactly these words: "{ending}" Nothing may follow them.',
            lambda answer: answer.strip('" ').endswith(ending),
        ),
        Instruction(
            "quotation",
            "Put your whole answer between double quotation marks.",
            lambda answer: len(answer) > 2 and answer[0] == answer[-1] == '"',
        ),
        Instruction(
            "words",
            f"Use fewer than {limit} words.",
            lambda answer: len(answer.split()) < limit,
        ),
        Instruction("commas", "Do not use any commas.", lambda answer: "," not in answer),
        Instruction(
            "sentences",
            f"Your answer must have exactly {count} sentences.",
            lambda answer: len(_SENTENCE_END.findall(answer)) == count,
        ),
        Instruction(
            "title",
            "Begin with a title in double angular brackets, such as <<a title>>.",
            lambda answer: re.match(r"<<[^\n<>]+>>", answer) is not None,
        ),
        Instruction(
            "language",
            f"Write your whole answer in {language}; no other language is allowed.",
            lambda answer: script_shares(answer).get(script, 0.0) >= _LEAST,
        ),
    ]


_FREE = ("keyword", "forbidden", "words", "commas", "sentences")  # rules about running text
_SHAPE = ("lowercase", "quotation", "title", "bullets")


def _together(first: str, second: str) -> bool:
    """Whether two rules can hold for one natural answer."""
    pair = {first, second}
    shaped, free = pair & set(_SHAPE), pair & set(_FREE)
    return len(shaped) == len(free) == 1 and pair != {"bullets", "sentences"}


def _is_json(answer: str) -> bool:
    """A JSON object; a code fence around it is forgiven, as IFEval does."""
    fenced = _FENCE.fullmatch(answer)
    try:
        return isinstance(json.loads(fenced[1] if fenced else answer), dict)
    except ValueError:
        return False
