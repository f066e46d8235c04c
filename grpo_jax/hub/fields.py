"""Strict reading of a config.json: whatever would compute differently is refused.

A field is either read, required to have the one value we implement, known to change nothing, or
off (null, false, 0, empty). Anything else is an error: a model that loads must compute the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo_jax.hub.folder import read_object
from grpo_jax.text.strict import listed, plain, shown

# Bookkeeping, training-only settings and token ids: nothing that a forward pass depends on, in any
# family. What is neutral in one family only is passed to `neutral` by its reader.
_NEUTRAL = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "bos_token_id", "cache_implementation",
    "classifier_dropout", "cls_token_id", "directionality", "dtype", "eos_token_id",
    "finetuning_task", "gradient_checkpointing", "hidden_dropout_prob", "id2label",
    "initializer_range", "is_llama_config", "label2id", "mask_token_id", "model_type",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sep_token_id",
    "tokenizer_class", "torch_dtype", "transformers.js_config", "transformers_version",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


class Fields:
    """The fields of a config.json, ticked off as they are read.

    Args:
      file: the config.json; named in errors.
      values: the fields, where they are a part of the file (text_config); None reads the file.
    """

    def __init__(self, file: Path, values: Any = None) -> None:
        self.file = file
        self.values: dict[str, Any] = read_object(file) if values is None else values
        if not isinstance(self.values, dict):
            raise ValueError(f"{file}: not a JSON object")
        self.read = set(_NEUTRAL)
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """The value; `default` where the field is absent or null."""
        value = self.optional(name)
        return default if value is None else value

    def optional(self, name: str, default: Any = None) -> Any:
        """The value; `default` where the field is absent, None where it is null."""
        self.read.add(name)
        return self.values.get(name, default)

    def integer(self, name: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        """A positive integer up to `most`; absent or null without a default is a problem."""
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            limit = f" up to {most}" if isinstance(value, int) and value > most else ""
            self.problems.append(f"{name}: got {shown(value)}, wanted a positive integer{limit}")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            self.problems.append(f"{name}: got {shown(value)}, wanted a positive number")
            return 1.0
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{name}: got {shown(value)}, wanted true or false")
            return default
        return value

    def require(self, name: str, wanted: Any) -> None:
        """The field, where present, must have the one value that we implement."""
        if (value := self.get(name, wanted)) != wanted:
            self.problems.append(f"{name}: got {shown(value)}, only {wanted!r} is implemented")

    def neutral(self, names: Iterable[str]) -> None:
        """Fields that change nothing in this family."""
        self.read.update(names)

    def finish(self) -> None:
        """Raises ValueError with all problems, fields that nobody has read among them."""
        if self.values.get("quantization_config"):
            self.read.add("quantization_config")
            self.problems.append(
                "quantization_config: quantised weights cannot be trained; take the model's "
                "bfloat16, float16 or float32 weights"
            )
        unread = {k: v for k, v in self.values.items() if k not in self.read and v}
        unread = {k: v for k, v in unread.items() if not k.startswith("pooler_")}
        self.problems += [
            f"{plain(k)}: {shown(v)} is not a field we know; remove it if it changes nothing in "
            "the computation"
            for k, v in unread.items()
        ]
        if self.problems:
            raise ValueError(f"{self.file}: cannot be loaded:\n  " + listed(self.problems))

    def kind(self, known: tuple[str, ...]) -> str:
        """The model_type, if it is one of `known`; otherwise ValueError at once."""
        kind = self.get("model_type")
        if kind not in known:
            raise ValueError(
                f"{self.file}: model_type {shown(kind)} is not supported here; wanted one of "
                f"{', '.join(known)}"
            )
        return kind
