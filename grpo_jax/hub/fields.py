"""Strict reading of a config.json: whatever would compute differently is refused.

A field is either read, required to have the one value we implement, known to change nothing, or
off (null, false, 0, empty). Anything else is an error: a model that loads must compute the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grpo_jax.hub.folder import read_json

# Bookkeeping, training-only settings and token ids: nothing that a forward pass depends on.
_NEUTRAL = {
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
    "attention_dropout", "attention_probs_dropout_prob", "bos_token_id", "classifier_dropout",
    "cls_token_id", "directionality", "dtype", "eos_token_id", "finetuning_task",
    "gradient_checkpointing", "hidden_dropout_prob", "id2label", "initializer_range",
    "is_llama_config", "label2id", "mask_token_id", "max_window_layers", "model_type",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sep_token_id",
    "sliding_window", "tokenizer_class", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


class Fields:
    """The fields of a config.json, ticked off as they are read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.values: dict[str, Any] = read_json(file)
        if not isinstance(self.values, dict):
            raise ValueError(f"{file}: not a JSON object")
        self.read = set(_NEUTRAL)
        self.problems: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.problems.append(f"{name}: got {value!r}, wanted a positive integer")
            return 1
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            self.problems.append(f"{name}: got {value!r}, wanted a positive number")
            return 1.0
        return float(value)

    def require(self, name: str, wanted: Any) -> None:
        """The field, where present, must have the one value that we implement."""
        if (value := self.get(name, wanted)) != wanted:
            self.problems.append(f"{name}: got {value!r}, only {wanted!r} is implemented")

    def finish(self) -> None:
        unread = {k: v for k, v in self.values.items() if k not in self.read and v}
        unread = {k: v for k, v in unread.items() if not k.startswith("pooler_")}
        self.problems += [
            f"{k}: {v!r} is not a field we know; remove it if it changes nothing in the computation"
            for k, v in unread.items()
        ]
        if self.problems:
            raise ValueError(f"{self.file}: cannot be loaded:\n  " + "\n  ".join(self.problems))

    def kind(self, known: tuple[str, ...]) -> str:
        kind = self.get("model_type")
        if kind not in known:
            raise ValueError(
                f"{self.file}: model_type {kind!r} is not supported here; wanted one of "
                f"{', '.join(known)}"
            )
        return kind
