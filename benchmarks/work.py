"""The work: models, prompts, texts, tasks and targets, the same for every program.

Only the standard library is imported at the top, because workers in the peers' environments
import this module too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

PAD, EOS, UNKNOWN, FIRST_WORD = 0, 1, 2, 3  # ids; every other id is a word, "w3", "w4", ...


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes. The family is Qwen3 where there is q- and k-norm, else llama."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool = True
    family: str = "qwen3"

    def matrices(self) -> int:
        """Weights of the layers' matrices, which every token is multiplied with."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    def parameters(self) -> int:
        """All weights, norms left out."""
        return self.matrices() + self.vocab * self.hidden * (1 if self.tied else 2)


SIZES = {
    "tiny": Shape(2, 64, 4, 2, 16, 128, 1024),
    "S": Shape(4, 256, 8, 4, 32, 768, 32_000),
    "M": Shape(12, 768, 12, 4, 64, 2048, 32_000),
    "S-152k": Shape(4, 256, 8, 4, 32, 768, 151_936),
    "tiny-4k": Shape(2, 64, 4, 2, 16, 128, 4096),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49_152, family="llama"),
    "qwen3-1.7b": Shape(28, 2048, 16, 8, 128, 6144, 151_936),
    "qwen3-4b": Shape(36, 2560, 32, 8, 128, 9728, 151_936),
}


@dataclass(frozen=True)
class Sampling:
    """Texts in, texts out: `prompts` prompts, `generations` completions of each."""

    prompts: int = 4
    generations: int = 8
    prompt_length: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    mean_length: int = 0  # > 0: rows end by themselves, geometrically, with this mean


@dataclass(frozen=True)
class Step:
    """One whole GRPO step: sample, decode, reward, reference log-probs, one AdamW update."""

    prompts: int = 4
    generations: int = 8
    prompt_length: int = 64
    max_new_tokens: int = 64
    temperature: float = 1.0
    mean_length: int = 0  # as of Sampling
    beta: float = 0.04
    loss_type: str = "grpo"
    learning_rate: float = 1e-6
    max_grad_norm: float = 1.0
    remat: bool = True  # of ours, which is no slower with it
    remat_policy: str = "dots"
    checkpointing: bool = False  # TRL's gradient checkpointing, which is faster without
    micro_batches: int = 1  # of ours: gradient accumulation, for memory


@dataclass(frozen=True)
class Encoding:
    """The semantic reward: texts and their references in, one cosine a text out."""

    texts: int = 256
    generations: int = 8  # texts that share a reference
    mean_tokens: int = 24
    min_tokens: int = 6
    max_tokens: int = 64
    batch_size: int = 32  # of both encoders


@dataclass(frozen=True)
class Memory:
    """Peak memory of the log-probs and of the update, by vocabulary."""

    prompts: int = 4
    generations: int = 8
    prompt_length: int = 64
    max_new_tokens: int = 128
    beta: float = 0.04
    remat: bool = True
    part: str = "update"  # or "logps"


@dataclass(frozen=True)
class Limits:
    """How near decode comes to the memory bandwidth, and the update to the arithmetic peak."""

    prompts: tuple[int, ...] = (4,)  # batches to try; the best is reported
    generations: int = 8
    prompt_length: int = 64
    max_new_tokens: int = 64
    remat: bool = True
    copy_bytes: int = 256 * 2**20
    matmul: int = 2048


@dataclass(frozen=True)
class Task:
    """One row of the table: what to do, at which sizes, against whom."""

    kind: str  # the field's type below, in lower case
    work: Any
    sizes: tuple[str, ...]
    peers: tuple[str, ...]


TASKS = {
    "sampling": Task("sampling", Sampling(), ("S", "M"), ("transformers", "tunix")),
    "sampling_top_p": Task("sampling", Sampling(top_p=0.9), ("S", "M"), ("transformers", "tunix")),
    "sampling_lengths": Task(
        "sampling",
        Sampling(generations=32, max_new_tokens=128, mean_length=32),
        ("S", "M"),
        ("ours-fixed", "ours-batches", "transformers", "tunix"),
    ),
    "grpo_step": Task("step", Step(), ("S", "M"), ("trl", "tunix")),
    "grpo_step_lengths": Task(
        "step", Step(max_new_tokens=128, mean_length=32), ("S", "M"), ("ours-padded",)
    ),
    "encoder": Task("encoding", Encoding(), ("minilm",), ("sentence-transformers",)),
    "encoder_step": Task("encoding", Encoding(texts=32), ("minilm",), ("sentence-transformers",)),
    "memory_logps": Task("memory", Memory(part="logps"), ("S", "S-152k"), ()),
    "memory_update": Task("memory", Memory(), ("S", "S-152k"), ()),
    "limits": Task("limits", Limits(), ("S", "M"), ()),
}

# The same tasks on an accelerator: larger models and batches, so that the device has work to do.
GPU_TASKS = {
    "sampling": dataclasses.replace(
        TASKS["sampling"], work=Sampling(prompts=32), sizes=("smollm2-135m", "qwen3-1.7b")
    ),
    "sampling_top_p": dataclasses.replace(
        TASKS["sampling_top_p"],
        work=Sampling(prompts=32, top_p=0.9),
        sizes=("smollm2-135m", "qwen3-1.7b"),
    ),
    "sampling_lengths": dataclasses.replace(
        TASKS["sampling_lengths"],
        work=Sampling(prompts=64, max_new_tokens=128, mean_length=32),
        sizes=("smollm2-135m", "qwen3-1.7b"),
    ),
    "grpo_step": dataclasses.replace(
        TASKS["grpo_step"],
        work=Step(prompts=16, max_new_tokens=256, checkpointing=True),
        sizes=("smollm2-135m", "qwen3-1.7b"),
    ),
    "grpo_step_lengths": dataclasses.replace(
        TASKS["grpo_step_lengths"],
        work=Step(prompts=16, max_new_tokens=256, mean_length=64),
        sizes=("smollm2-135m", "qwen3-1.7b"),
    ),
    "encoder": dataclasses.replace(TASKS["encoder"], work=Encoding(texts=1024, batch_size=128)),
    "encoder_step": dataclasses.replace(TASKS["encoder_step"], work=Encoding(texts=128)),
    "memory_logps": TASKS["memory_logps"],
    "memory_update": TASKS["memory_update"],
    "limits": dataclasses.replace(
        TASKS["limits"],
        work=Limits(prompts=(4, 16, 32, 64), max_new_tokens=256, copy_bytes=2**31, matmul=8192),
        sizes=("smollm2-135m", "qwen3-1.7b"),
    ),
}

# Tunix has no plain llama with this shape's tied head in its Qwen3 class, so it sits that size out.
UNSUPPORTED = {("smollm2-135m", "tunix")}

# (task, size, peer) -> (how many times as fast, share of the peer's peak memory at most).
TARGETS: dict[tuple[str, str, str], tuple[float, float | None]] = {
    ("sampling", "S", "transformers"): (4.0, None),
    ("sampling", "S", "tunix"): (4.0, None),
    ("sampling", "M", "transformers"): (2.5, None),
    ("sampling", "M", "tunix"): (2.0, None),
    ("sampling_top_p", "S", "transformers"): (4.0, None),
    ("sampling_top_p", "S", "tunix"): (10.0, None),
    ("sampling_top_p", "M", "transformers"): (4.0, None),
    ("sampling_top_p", "M", "tunix"): (10.0, None),
    ("sampling_lengths", "S", "ours-fixed"): (2.0, None),
    ("sampling_lengths", "M", "ours-fixed"): (2.0, None),
    ("grpo_step", "S", "trl"): (4.0, 0.5),
    ("grpo_step", "S", "tunix"): (3.0, 0.5),
    ("grpo_step", "M", "trl"): (2.0, 0.5),
    ("grpo_step", "M", "tunix"): (2.0, 0.5),
    ("encoder", "minilm", "sentence-transformers"): (1.0, None),
}


def rewards(texts: list[str]) -> list[float]:
    """The whole step's reward: the text's length. Cheap, deterministic, and it differs by row."""
    return [len(text) / 100.0 for text in texts]


def word(index: int) -> str:
    return f"w{index}"


def prompt_ids(shape: Shape, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of exactly `length` random words."""
    import numpy as np

    draw = np.random.default_rng(seed)
    return draw.integers(FIRST_WORD, shape.vocab, (count, length)).tolist()


def prompt_texts(ids: list[list[int]]) -> list[str]:
    """The texts that the model's tokenizer reads as these ids."""
    return [" ".join(word(i) for i in row) for row in ids]


def stop_ids(shape: Shape, mean_length: int) -> list[int]:
    """Ids that end a row: one EOS, or so many that a row ends with probability 1 / mean_length.

    A model with small random weights draws nearly uniformly from its vocabulary. If a share 1 / m
    of the ids ends a row, lengths are geometric with mean m by the model's own draws, and no
    program needs to be told when to stop. Programs draw for themselves: they have the
    distribution of lengths in common and not the lengths, so compare tokens a second.
    """
    if not mean_length:
        return [EOS]
    return [EOS, *range(shape.vocab - round(shape.vocab / mean_length) + 1, shape.vocab)]


def override(tasks: dict[str, Task], settings: list[str]) -> dict[str, Task]:
    """Applies TASK.FIELD=VALUE settings; a tuple's values are separated by commas.

    Raises:
      ValueError: no such task or field, or a value of another type.
    """
    tasks = dict(tasks)
    for setting in settings:
        path, _, text = setting.partition("=")
        name, _, field = path.partition(".")
        if name not in tasks or field not in (fields := _fields(tasks[name].work)):
            known = {n: sorted(_fields(t.work)) for n, t in tasks.items()}
            raise ValueError(f"--set={setting}: wanted TASK.FIELD=VALUE with one of {known}")
        try:
            value = _parse(text, fields[field])
        except ValueError as error:
            raise ValueError(f"--set={setting}: {error}") from error
        work = dataclasses.replace(tasks[name].work, **{field: value})
        tasks[name] = dataclasses.replace(tasks[name], work=work)
    return tasks


def _fields(work: Any) -> dict[str, Any]:
    return {f.name: getattr(work, f.name) for f in dataclasses.fields(work)}


def _parse(text: str, like: Any) -> Any:
    if isinstance(like, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(f"got {text!r}, wanted true or false")
        return text.lower() == "true"
    if isinstance(like, tuple):
        return tuple(int(part) for part in text.split(","))
    return type(like)(text)
