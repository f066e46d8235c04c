"""The corpus of a run: rows read, split, ordered, tokenized and counted, once at start-up.

In: `config.Data` and a tokenizer. Out: lists of `Example`s for cold start, GRPO, dev and test,
and a report of what was read and what was left out. Every process builds the same corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from grpo_jax import config
from grpo_jax.data.sources import read_rows
from grpo_jax.data.splits import normalise, split_rows, uniform
from grpo_jax.structs import Row
from grpo_jax.text.tokenizer import Tokenizer

_LISTED = 20  # skipped rows quoted in the report; all are counted


class Example(NamedTuple):
    row: Row
    prompt_ids: list[int]
    completion_ids: list[int]  # the target and the EOS; [] without a target


class Corpus(NamedTuple):
    cold_start: list[Example]  # for SFT; every one has a target, so [] if the data has none
    train: list[Example]  # for GRPO; the same rows as `cold_start` if cold_start_rows is 0
    dev: list[Example]
    test: list[Example]
    report: dict[str, Any]  # counts, and "skipped_rows": descriptions of the first few


def load_corpus(
    cfg: config.Data, tokenizer: Tokenizer, resolve: Callable[[str], str] = str
) -> Corpus:
    """Builds the corpus.

    Each split comes in an order fixed by the seed and each row's text, so that the first n rows
    are a sample of all, and `max_rows` takes a subset of what a larger `max_rows` would take.

    Args:
      resolve: turns "asset:NAME" into a local path and leaves other paths alone.
    Raises:
      FileNotFoundError, ValueError: data missing, malformed or empty; see `sources.read_rows`.
    """
    if "{source}" not in cfg.prompt:
        raise ValueError(
            f"data.prompt {cfg.prompt!r} has no {{source}}: put it where the source text belongs"
        )
    read: dict[str, list[Row]] = {}
    skipped: list[str] = []
    for name, path in (("train", cfg.train), ("dev", cfg.dev), ("test", cfg.test)):
        if path or name == "train":
            read[name], faults = read_rows(_given(path, name, resolve), cfg)
            skipped += faults
    splits = split_rows(read["train"], cfg, read.get("dev"), read.get("test"))

    encode = _Encoder(cfg, tokenizer)
    train = list(islice(encode(splits.train, training=True), cfg.max_rows or None))
    dev, test = list(encode(splits.dev)), list(encode(splits.test))
    report: dict[str, Any] = {
        "rows": sum(map(len, read.values())),
        "skipped": len(skipped),
        **splits.report,
        "long_prompts": encode.long_prompts,
        "long_completions": encode.long_completions,
    }
    for name, examples in (("train", train), ("dev", dev), ("test", test)):
        if not examples:
            raise ValueError(_empty(name, cfg, report))
    cold_start, train = _partition(train, cfg.cold_start_rows)
    report |= {
        "cold_start_examples": len(cold_start),
        "train_examples": len(train),
        "dev_examples": len(dev),
        "test_examples": len(test),
        "skipped_rows": skipped[:_LISTED],
    }
    return Corpus(cold_start, train, dev, test, report)


def load_test_set(
    path: str, cfg: config.Data, tokenizer: Tokenizer, seen: Iterable[Example]
) -> list[Example]:
    """A further test set, read and prompted as `cfg` says, without the rows of `seen`.

    Raises:
      FileNotFoundError, ValueError: missing, malformed, or nothing is left.
    """
    known = {normalise(text) for example in seen for text in example.row[:2] if text}
    rows = [
        row
        for row in read_rows(path, cfg)[0]
        if normalise(row.source) not in known and normalise(row.target) not in known
    ]
    examples = list(_Encoder(cfg, tokenizer)(rows))
    if not examples:
        raise ValueError(
            f"evaluation.out_of_domain: {path} has no row that fits data.max_prompt_length="
            f"{cfg.max_prompt_length} and is not a training row"
        )
    return examples


def _given(path: str, name: str, resolve: Callable[[str], str]) -> str:
    if not path:
        raise ValueError(f"data.{name} is empty: name a file, a folder, a hub id or an asset")
    return resolve(path)


class _Encoder:
    """Rows into examples, in their seeded order; counts the rows that are too long, and drops them.

    Only a training target must fit its limit: held-out references are what they are.
    """

    def __init__(self, cfg: config.Data, tokenizer: Tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        self.long_prompts = self.long_completions = 0

    def __call__(self, rows: Iterable[Row], training: bool = False) -> Iterator[Example]:
        cfg, tokenizer = self.cfg, self.tokenizer
        for row in sorted(rows, key=lambda row: uniform(f"{row.source}\0{row.target}", cfg.seed)):
            text = cfg.prompt.replace("{source}", row.source)
            prompt = tokenizer.encode_prompt(text, system=cfg.system, chat=cfg.chat)
            completion = [*tokenizer.encode(row.target), tokenizer.eos_id] if row.target else []
            if len(prompt) > cfg.max_prompt_length:
                self.long_prompts += 1
            elif training and len(completion) > cfg.max_completion_length:
                self.long_completions += 1
            else:
                yield Example(row, prompt, completion)


def _partition(train: list[Example], cold_start_rows: int) -> tuple[list[Example], list[Example]]:
    """(cold start, GRPO): disjoint, or the same rows if cold_start_rows is 0."""
    with_target = [i for i, example in enumerate(train) if example.completion_ids]
    if not cold_start_rows:
        return [train[i] for i in with_target], train
    cold = with_target[:cold_start_rows]
    rest = set(range(len(train))).difference(cold)
    if len(cold) < cold_start_rows or not rest:
        raise ValueError(
            f"data.cold_start_rows={cold_start_rows} leaves no training rows for GRPO: there are "
            f"{len(train)}, {len(with_target)} of them with a target. Lower it, or set it to 0 to "
            "use all rows for both."
        )
    return [train[i] for i in cold], [train[i] for i in sorted(rest)]


def _empty(name: str, cfg: config.Data, report: dict[str, Any]) -> str:
    """Why a split has no rows, and what to do about it."""
    rows = report[f"{name}_rows"]
    if rows:
        return (
            f"data: all {rows} {name} rows are longer than data.max_prompt_length="
            f"{cfg.max_prompt_length} or data.max_completion_length={cfg.max_completion_length} "
            "tokens: raise the limit that they exceed, or shorten data.prompt"
        )
    if not report["rows"]:
        return (
            f"data.train {cfg.train!r} has no usable rows ({report['skipped']} were malformed and "
            "skipped): check the file and data.source_field, data.target_field"
        )
    hint = (
        "bring more rows"
        if name == "train"
        else f"raise data.{name}_fraction, or name a file in data.{name}"
    )
    return (
        f"data: the {name} split is empty: {report['rows']} rows read, {report['duplicates']} "
        f"duplicates and {report['train_leaks'] + report['dev_leaks']} leaks dropped, "
        f"dev_fraction {cfg.dev_fraction}, test_fraction {cfg.test_fraction}; {hint}"
    )
