"""Text <-> token ids: a thin adapter over the tokenizer of a model folder (transformers, no torch).

What it adds is what training depends on: which ids end a generation, which one of them ends a
training target, and a prompt that is either the chat template's or plain.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_pretrained(folder: Path) -> Any:
    """The transformers tokenizer of a folder; no network, no remote code.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      ValueError: it cannot be read.
    """
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise FileNotFoundError(
            f"{folder}: no tokenizer ({', '.join(_VOCABULARIES)}); copy the model's tokenizer files"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the Rust reader raises bare Exception
        raise ValueError(f"{folder}: the tokenizer cannot be read: {error}") from error


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
        self.vocab_size: int = max(pretrained.get_vocab().values()) + 1
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
                f"{folder}: eos_token_id {outside} of generation_config.json is outside the "
                f"tokenizer's vocabulary of {self.vocab_size}"
            )
        self.eos_id: int = self.eos_ids[0]
        probe = pretrained("a")["input_ids"]
        bos = pretrained.bos_token_id
        self._bos: list[int] = [bos] if bos is not None and probe[0] == bos else []

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read a model folder's tokenizer.

        Raises:
          FileNotFoundError, ValueError: no tokenizer there, or not a usable one.
        """
        return cls(load_pretrained(Path(folder)), Path(folder))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._pretrained.chat_template)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids, nothing added; text that looks like a special token stays text."""
        return self._pretrained(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]

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
        return self._pretrained(rendered, add_special_tokens=False)["input_ids"]

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

        Raises:
          FileNotFoundError: the folder that it was loaded from is gone.
        """
        files = [self._folder / name for name in _FILES if (self._folder / name).is_file()]
        if not files:
            raise FileNotFoundError(f"{self._folder}: the tokenizer's files are gone; restore them")
        for file in files:
            shutil.copyfile(file, Path(folder) / file.name)

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

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._pretrained.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generation,
                enable_thinking=False,  # Qwen3: answer without a chain of thought
            )
        except TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ValueError(
                f"{self._folder}: the chat template refuses messages of {roles}: {error}"
            ) from error

    def _turn_end(self) -> int | None:
        """The special token that the chat template puts behind an assistant's message."""
        if not self.has_chat_template:
            return None
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "\u2603"}]
        behind = self._render(turns, False).rpartition("\u2603")[2]
        special = set(self._pretrained.all_special_ids)
        special |= set(self._pretrained.added_tokens_decoder)
        ids = self._pretrained(behind, add_special_tokens=False)["input_ids"]
        return next((i for i in ids if i in special), None)


def _generation_eos(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, always as a list."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    try:
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); fetch the file again") from error
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
