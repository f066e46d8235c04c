"""Text <-> token ids: a thin adapter over the tokenizer of a model folder (transformers, no torch).

What it adds is what training depends on: which ids end a generation, which one of them ends a
training target, and a prompt that is either the chat template's or plain.

A folder with tokenizer.json loads as transformers loads it. One that has only a sentencepiece BPE
model is converted here (text/pieces.py), because transformers 5 encodes leading spaces otherwise
than sentencepiece does; `save` then writes the tokenizer.json too, so that whoever loads the
exported folder gets the ids that it was trained with.

Chat templates that put today's date into the prompt get the 26th of July 2024, the date that
Llama's own templates fall back to: a prompt must not depend on the day.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.text.measures import encodable
from grpo_jax.text.pieces import (
    add_ends,
    add_listed,
    as_control,
    build_bpe,
    content_of,
    read_model,
)
from grpo_jax.text.strict import inside, library_errors, read_json, shown

_SENTENCEPIECE = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "spm.model")
_VOCABULARIES = ("tokenizer.json", *_SENTENCEPIECE, "vocab.json", "vocab.txt")
_CONFIG = "tokenizer_config.json"
_FILES = (
    *_VOCABULARIES, _CONFIG, "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TODAY = datetime.date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_NOW_CALL = re.compile(r"strftime_now\s*\(")


def load_pretrained(folder: Path) -> Any:
    """The transformers tokenizer of a folder; no network, no remote code.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: it cannot be read, or not so that it gives its authors' ids.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise FileNotFoundError(
            f"{folder}: no tokenizer ({', '.join(_VOCABULARIES)}); copy the model's tokenizer files"
        )
    _check(folder)
    file = _only_sentencepiece(folder)
    if file is None:
        pretrained = _from_pretrained(folder, folder)
    elif converted := _converted(folder, file):
        with tempfile.TemporaryDirectory() as scratch:
            copies = Path(scratch)
            for source in _present(folder):
                shutil.copyfile(source, copies / source.name)
            for name, content in converted.items():
                (copies / name).write_text(content, encoding="utf-8")
            pretrained = _from_pretrained(copies, folder)
    else:
        pretrained = _from_pretrained(folder, folder)
        _check_unigram(pretrained, file)
    if not pretrained.is_fast:
        raise ValueError(
            f"{folder}: {type(pretrained).__name__} has no form that the tokenizers library runs; "
            "save the tokenizer as tokenizer.json with the library that it comes from"
        )
    return pretrained


def _from_pretrained(folder: Path, named: Path) -> Any:
    """AutoTokenizer on local files; errors name the folder that the user gave."""
    from transformers import AutoTokenizer

    with library_errors(f"{named}: the tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _check(folder: Path) -> None:
    """Reads the small JSON files once, strictly, and refuses names that lead out of the folder.

    transformers reads them itself later; it takes more, and hands what it finds to constructors.
    """
    for name in (_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.json"):
        _json(folder / name)
    config = _json(folder / _CONFIG)
    for key, value in config.items():
        if key.endswith("_files") and value:  # fast_tokenizer_files: one for each version
            for name in value if isinstance(value, list) else [value]:
                inside(folder, name, folder / _CONFIG)
    if config.get("init_inputs"):
        raise ValueError(f"{folder / _CONFIG}: init_inputs are not supported; remove them")
    for key in ("model_max_length", "max_len"):
        if not isinstance(config.get(key, 0), int | float | None):
            raise ValueError(f"{folder / _CONFIG}: {key} is {shown(config[key])}, wanted a number")


def _present(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES if (folder / name).is_file()]


def _only_sentencepiece(folder: Path) -> Path | None:
    """The sentencepiece model of a folder that has no tokenizer.json."""
    if (folder / "tokenizer.json").is_file():
        return None
    return next((folder / n for n in _SENTENCEPIECE if (folder / n).is_file()), None)


def _converted(folder: Path, file: Path) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json for a BPE .model file; {} for a unigram one."""
    model = read_model(file)
    if not model.is_bpe:
        return {}
    config = _json(folder / _CONFIG)
    config = {**model.special, **_json(folder / "special_tokens_map.json"), **config}
    template = str(config.get("chat_template") or "")
    if (folder / "chat_template.jinja").is_file():
        template += (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    try:
        tokenizer = build_bpe(as_control(model.pieces, template))
        add_listed(tokenizer, folder, _json(folder / "added_tokens.json"), config)
        bos, eos = content_of(config.get("bos_token")), content_of(config.get("eos_token"))
        add_ends(
            tokenizer,
            bos if config.get("add_bos_token", True) else None,
            eos if config.get("add_eos_token", False) else None,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        _CONFIG: json.dumps(config, indent=2, ensure_ascii=False) + "\n",
    }


def _check_unigram(pretrained: Any, file: Path) -> None:
    """Raises ValueError where transformers' conversion does not cut as sentencepiece does."""
    from sentencepiece import SentencePieceProcessor

    with library_errors(f"{file}: the sentencepiece model cannot be read"):
        pieces = SentencePieceProcessor(model_file=str(file))
        known = [p for p in map(pieces.id_to_piece, range(pieces.get_piece_size())) if p.isalpha()]
        probe = " ".join(known[:8]).lower()
        got, wanted = pretrained.tokenize(probe), pieces.encode(probe, out_type=str)
    if got != wanted:
        raise ValueError(
            f"{file}: transformers cuts {probe!r} into {got}, sentencepiece into {wanted}; set "
            "tokenizer_class in tokenizer_config.json to the model's own, or add its tokenizer.json"
        )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not valid JSON (wanted an object); fetch the file again")
    return content


class Tokenizer:
    """The policy's tokenizer. Build it with `Tokenizer.load`.

    Attributes:
      vocab_size: ids are below this; the model's embedding must have at least as many rows.
      eos_ids: every id that ends a generation.
      eos_id: the one of them that ends a training target: the chat template's end of turn, or the
        tokenizer's EOS where there is no template.
    """

    def __init__(self, pretrained: Any, folder: Path) -> None:
        self._pretrained = pretrained
        self._folder = folder
        self.vocab_size: int = max(pretrained.get_vocab().values(), default=-1) + 1
        if not self.vocab_size:
            raise ValueError(f"{folder}: the tokenizer's vocabulary is empty")
        turn_end = self._turn_end()
        listed = _generation_eos(folder)
        eos = [turn_end, pretrained.eos_token_id, *listed]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in eos if i is not None))
        if not self.eos_ids:
            raise ValueError(
                f"{folder}: the tokenizer has no end-of-sequence token; set eos_token in "
                "tokenizer_config.json or eos_token_id in generation_config.json"
            )
        if outside := [i for i in self.eos_ids if i >= self.vocab_size]:
            raise ValueError(
                f"{folder}: eos_token_id {shown(outside)} of generation_config.json is outside the "
                f"tokenizer's vocabulary of {self.vocab_size}"
            )
        self.eos_id: int = self.eos_ids[0]
        with library_errors(f"{folder}: the tokenizer cannot encode"):
            probe = pretrained("a")["input_ids"]
        bos = pretrained.bos_token_id
        self._bos: list[int] = [bos] if bos is not None and probe[:1] == [bos] else []

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a model folder's tokenizer.

        Raises:
          FileNotFoundError, ValueError: no tokenizer there, or not a usable one.
        """
        return cls(load_pretrained(Path(folder)), Path(folder))

    @property
    def pretrained(self) -> Any:
        """The transformers tokenizer underneath."""
        return self._pretrained

    @property
    def has_chat_template(self) -> bool:
        return bool(self._pretrained.chat_template)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids, nothing added; text that looks like a special token stays text.

        Raises:
          ValueError: the tokenizer has no ids for it.
        """
        return self._ids(text, split_special_tokens=True)

    def encode_prompt(self, text: str, system: str = "", chat: bool = True) -> list[int]:
        """A prompt that a completion is to follow.

        Args:
          text: the user's turn, or with chat = False the prompt itself.
          system: a system message; '' leaves it to the template.
          chat: wrap in the chat template, ending where the assistant's turn begins.

        Raises:
          ValueError: chat without a template, or a template that refuses the messages.
        """
        if not chat:
            if system:
                raise ValueError("system: a system message needs chat = True")
            return self._bos + self.encode(text)
        if not self.has_chat_template:
            raise ValueError(
                f"{self._folder}: the tokenizer has no chat template; set chat = False (config: "
                "data.chat) to use plain prompts, or add a chat_template.jinja"
            )
        messages = [{"role": "system", "content": system}] if system else []
        rendered = self._render([*messages, {"role": "user", "content": text}], True)
        return self._ids(rendered)

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Rows of ids -> texts, special tokens left out, white space at the ends stripped."""
        return [
            self._pretrained.decode(
                list(row), skip_special_tokens=True, clean_up_tokenization_spaces=False
            ).strip()
            for row in ids
        ]

    def save(self, folder: str | Path) -> None:
        """Copy the tokenizer's files, unchanged, into an existing folder.

        Where sentencepiece BPE was converted, its tokenizer.json is written beside it.

        Raises:
          FileNotFoundError: the folder that it was loaded from is gone.
        """
        files = _present(self._folder)
        if not files:
            raise FileNotFoundError(f"{self._folder}: the tokenizer's files are gone; restore them")
        for file in files:
            shutil.copyfile(file, Path(folder) / file.name)
        if model := _only_sentencepiece(self._folder):
            for name, content in _converted(self._folder, model).items():
                (Path(folder) / name).write_text(content, encoding="utf-8")

    def special_ids(self) -> dict[str, int | list[int]]:
        """bos, eos and pad ids as generation_config.json names them."""
        eos = list(self.eos_ids)
        pad = self._pretrained.pad_token_id
        ids: dict[str, int | list[int]] = {
            "eos_token_id": eos[0] if len(eos) == 1 else eos,
            "pad_token_id": self.eos_id if pad is None else pad,
        }
        if self._pretrained.bos_token_id is not None:
            ids["bos_token_id"] = self._pretrained.bos_token_id
        return ids

    def _ids(self, text: str, **options: bool) -> list[int]:
        text = encodable(text)
        with library_errors(f"{self._folder}: the tokenizer cannot encode {shown(text)}"):
            return self._pretrained(text, add_special_tokens=False, **options)["input_ids"]

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        roles = [message["role"] for message in messages]
        with library_errors(f"{self._folder}: the chat template refuses messages of {roles}"):
            return self._pretrained.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=False,  # Qwen3: answer without a chain of thought
                chat_template=self._template,
                date_string=_TODAY.strftime("%d %b %Y"),  # Llama 3
            )

    @functools.cached_property
    def _template(self) -> str:
        """The chat template with a fixed date where it would read the clock.

        Raises:
          ValueError: it asks for a date in a format that is not written out.
        """
        template = _NOW.sub(
            lambda match: json.dumps(_TODAY.strftime(match[2])),
            self._pretrained.get_chat_template(),
        )
        if _NOW_CALL.search(template):
            raise ValueError(
                f"{self._folder}: the chat template computes a date, so that prompts would change "
                "from day to day; write the date or its format into the template"
            )
        return template

    def _turn_end(self) -> int | None:
        """The special token that the chat template puts behind an assistant's message."""
        if not self.has_chat_template:
            return None
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "\u2603"}]
        behind = self._render(turns, False).rpartition("\u2603")[2]
        special = set(self._pretrained.all_special_ids)
        special |= set(self._pretrained.added_tokens_decoder)
        return next((i for i in self._ids(behind) if i in special), None)


def _generation_eos(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, always as a list."""
    file = folder / "generation_config.json"
    eos = _json(file).get("eos_token_id")
    found = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(i) is not int or i < 0 for i in found):
        raise ValueError(f"{file}: eos_token_id is {shown(eos)}, wanted ids")
    return found
