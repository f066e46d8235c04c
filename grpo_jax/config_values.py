"""Which values a field may take: types and tables, and the lines that say what is wrong."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, get_args, get_origin, get_type_hints

from grpo_jax.config import Arm
from grpo_jax.config_dicts import did_you_mean

DTYPES = ("float32", "bfloat16")
POOLING = ("mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj",  # Phi-3
    "all-linear",
)  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "on_nonfinite": ("stop", "skip"),
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
    "model.remat_policy": ("full", "dots"),
    "encoder.dtype": DTYPES,
    "encoder.pooling": ("", *POOLING),
    "data.on_bad_row": ("error", "skip"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
    "optimizer.moment_dtype": DTYPES,
    "grpo.kl_estimator": ("k1", "k2", "k3"),
    "grpo.loss_type": ("grpo", "bnpo", "dr_grpo", "dapo"),
    "grpo.importance_sampling_level": ("token", "sequence"),
    "grpo.advantage": ("group", "rloo", "gdpo"),
    "grpo.scale_rewards": ("group", "batch", "none"),
    "reward.anchor": ("target", "source", "shuffled"),
    "reward.metric": ("cosine", "chrf", "bleu"),
    "export.dtype": (*DTYPES, "float16"),
}

# Intervals in the usual notation; None is left alone where the field is optional. Names that start
# with "sft." or "optimizer." hold for every section of that kind.
RANGES: dict[str, str] = {
    "seed": "[0, 2147483647]",
    "model.lora.rank": "[0, inf)",
    "model.lora.alpha": "(0, inf)",
    "model.lora.dropout": "[0, 1)",
    "encoder.max_length": "[1, inf)",
    "encoder.batch_size": "[1, inf)",
    "data.dev_fraction": "[0, 1)",
    "data.test_fraction": "[0, 1)",
    "data.max_rows": "[0, inf)",
    "data.cold_start_rows": "[0, inf)",
    "data.max_prompt_length": "[1, inf)",
    "data.max_completion_length": "[2, inf)",  # one token and the EOS
    "data.seed": "[0, 2147483647]",
    "optimizer.learning_rate": "(0, inf)",
    "optimizer.warmup_ratio": "[0, 1)",
    "optimizer.weight_decay": "[0, inf)",
    "optimizer.b1": "[0, 1)",
    "optimizer.b2": "[0, 1)",
    "optimizer.eps": "(0, inf)",
    "optimizer.max_grad_norm": "[0, inf)",
    "sft.batch_size": "[1, inf)",
    "sft.epochs": "(0, inf)",
    "sft.max_steps": "[0, inf)",
    "sft.gradient_accumulation_steps": "[1, inf)",
    "sft.eval_every": "[0, inf)",
    "grpo.prompts_per_step": "[1, inf)",
    "grpo.num_generations": "[2, inf)",  # a group of one has no advantage
    "grpo.lanes": "[0, inf)",
    "grpo.epochs": "(0, inf)",
    "grpo.max_steps": "[0, inf)",
    "grpo.sampling.temperature": "(0, inf)",  # greedy groups are all alike
    "grpo.sampling.top_k": "[0, inf)",
    "grpo.sampling.top_p": "(0, 1]",
    "grpo.sampling.min_p": "[0, 1)",
    "grpo.beta": "[0, inf)",
    "grpo.epsilon": "(0, 1)",
    "grpo.epsilon_high": "(0, inf)",
    "grpo.delta": "(1, inf)",
    "grpo.importance_sampling_cap": "(0, inf)",
    "grpo.num_iterations": "[1, inf)",
    "grpo.num_minibatches": "[1, inf)",
    "grpo.gradient_accumulation_steps": "[1, inf)",
    "grpo.eval_every": "[0, inf)",
    "grpo.forgetting_budget": "(0, inf)",
    "self_sft.prompts": "[0, inf)",
    "self_sft.prompts_per_step": "[1, inf)",
    "self_sft.num_generations": "[1, inf)",
    "self_sft.keep": "[1, inf)",
    "self_sft.min_reward": "[0, inf)",
    "interpolate.weight": "[0, 1]",
    "forgetting.every": "[0, inf)",
    "forgetting.rows": "[1, inf)",
    "reward.semantic_weight": "[0, inf)",
    "reward.language_weight": "[0, inf)",
    "reward.length_weight": "[0, inf)",
    "reward.repetition_weight": "[0, inf)",
    "reward.tau": "[0, 1)",
    "reward.tau_quantile": "[0, 1]",
    "reward.max_length_ratio": "[1, inf)",
    "reward.min_length_ratio": "[0, 1)",
    "reward.max_repetition": "[0, 1)",
    "evaluation.max_rows": "[1, inf)",
    "evaluation.batch_size": "[1, inf)",
    "evaluation.bootstrap": "[1, inf)",
    "evaluation.max_retention_rows": "[1, inf)",
    "evaluation.max_retention_length": "[2, inf)",
    "evaluation.max_task_rows": "[0, inf)",
    "evaluation.max_task_length": "[2, inf)",
    "evaluation.max_answer_length": "[1, inf)",
    "evaluation.preference.max_rows": "[0, inf)",
    "evaluation.preference.temperature": "[0, inf)",
    "evaluation.preference.max_tokens": "[1, inf)",
    "evaluation.preference.timeout": "(0, inf)",
    "evaluation.preference.retries": "[0, inf)",
    "evaluation.preference.concurrency": "[1, inf)",
    "checkpoint.every": "[1, inf)",
    "checkpoint.keep": "[1, inf)",
    "log.every": "[1, inf)",
    "log.samples_every": "[1, inf)",
    "log.samples": "[0, inf)",
    "log.profile_steps": "[0, inf)",
}


def value_problems(cfg: Any) -> list[str]:
    """A line for each value outside its table's; the types must be right."""
    return [problem for name, value in _leaves(cfg) for problem in _value_problems(name, value)]


def _leaves(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, value))
    return found


def type_problems(section: Any, prefix: str = "") -> list[str]:
    """A line for each value of the wrong type, and each attribute that is a misspelt field."""
    problems = []
    hints = get_type_hints(type(section))
    for name in vars(section):
        if name not in hints:
            problems.append(f"{prefix}{name}: no such field{did_you_mean(name, hints)}")
    for name, hint in hints.items():
        value = getattr(section, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if isinstance(value, hint):
                problems += type_problems(value, f"{prefix}{name}.")
            else:
                problems.append(f"{prefix}{name}: got {value!r}, wanted a {hint.__name__} section")
        elif not _fits(value, hint):
            problems.append(f"{prefix}{name}: got {value!r}, wanted {describe(hint)}")
        elif hint == tuple[Arm, ...]:
            for place, row in enumerate(value):
                problems += type_problems(row, f"{prefix}{name}[{place}].")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return isinstance(value, tuple) and all(isinstance(v, kind) for v in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)
    kinds = get_args(hint) or (hint,)  # Optional[int] -> (int, NoneType)
    if float in kinds:
        kinds += (int,)
    return type(value) in kinds  # exact: True is no number


def describe(hint: Any) -> str:
    """A field's type in words, for messages: 'an integer or None'."""
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return "a tuple of strings" if kind is str else f"a tuple of {kind.__name__} rows"
    if get_origin(hint) is dict:
        return "a dict of dotted fields"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    names[type(None)] = "None"
    return " or ".join(names[kind] for kind in get_args(hint) or (hint,))


def _value_problems(name: str, value: Any) -> list[str]:
    """The problem of one value by the tables above: at most one line."""
    key = re.sub(r"^(recover|self_sft)\.(?=sft\.)", "", name)
    key = re.sub(r"^.*(?=optimizer\.)", "", key)
    if key in CHOICES and value not in CHOICES[key]:
        options = ", ".join(CHOICES[key])
        near = did_you_mean(value, CHOICES[key])
        return [f"{name}: got {value!r}, wanted one of {options}{near}"]
    if key in RANGES and value is not None and not _inside(value, RANGES[key]):
        return [f"{name}: got {value!r}, wanted a number in {RANGES[key]}"]
    return []


def _inside(value: float, interval: str) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below and not math.isnan(value)
