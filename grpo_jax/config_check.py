"""`validate`: the resolved Config in, nothing or one error that lists every problem out.

Runs before any file is read. The tables say which values a field may take; the functions below
them hold the rules that tie fields together.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, get_args, get_origin, get_type_hints

from grpo_jax.config import STAGES, Config, did_you_mean

DTYPES = ("float32", "bfloat16")
POOLING = ("mean", "cls", "max", "weightedmean", "lasttoken", "mean_sqrt_len_tokens")
LINEARS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    "qkv_proj", "gate_up_proj",  # Phi-3
    "all-linear",
)  # fmt: skip

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": DTYPES,
    "model.param_dtype": DTYPES,
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
    "reward.anchor": ("target", "source"),
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
    "grpo.num_iterations": "[1, inf)",
    "grpo.num_minibatches": "[1, inf)",
    "grpo.gradient_accumulation_steps": "[1, inf)",
    "grpo.eval_every": "[0, inf)",
    "reward.semantic_weight": "[0, inf)",
    "reward.language_weight": "[0, inf)",
    "reward.length_weight": "[0, inf)",
    "reward.repetition_weight": "[0, inf)",
    "reward.tau": "[0, 1)",
    "reward.tau_quantile": "[0, 1]",
    "reward.max_length_ratio": "[1, inf)",
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
}


def validate(cfg: Config) -> None:
    """Checks every value and every rule that two fields must keep together.

    Raises:
      ValueError: one message with a line for each problem: the field, what it got, what is wanted.
    """
    problems = _type_problems(cfg)
    if not problems:  # the rules below rely on the types
        for name, value in _leaves(cfg):
            problems += _value_problems(name, value)
        problems += _run_problems(cfg) + _data_problems(cfg) + _learning_problems(cfg)
        problems += _evaluation_problems(cfg)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "\n  ".join(problems)
        raise ValueError(f"the configuration has {len(problems)} {noun}:\n  {lines}")


def _leaves(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            found += _leaves(value, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, value))
    return found


def _type_problems(section: Any, prefix: str = "") -> list[str]:
    """Values of the wrong type, and attributes that a config file invented by a misspelling."""
    problems = []
    hints = get_type_hints(type(section))
    for name in vars(section):
        if name not in hints:
            problems.append(f"{prefix}{name}: no such field{did_you_mean(name, hints)}")
    for name, hint in hints.items():
        value = getattr(section, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if isinstance(value, hint):
                problems += _type_problems(value, f"{prefix}{name}.")
            else:
                problems.append(f"{prefix}{name}: got {value!r}, wanted a {hint.__name__} section")
        elif not _fits(value, hint):
            problems.append(f"{prefix}{name}: got {value!r}, wanted {describe(hint)}")
    return problems


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)
    kinds = get_args(hint) or (hint,)  # Optional[int] -> (int, NoneType)
    if float in kinds:
        kinds += (int,)
    return type(value) in kinds  # exact: True is no number


def describe(hint: Any) -> str:
    """A field's type in words, for messages: 'an integer or None'."""
    if get_origin(hint) is tuple:
        return "a tuple of strings"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    names[type(None)] = "None"
    return " or ".join(names[kind] for kind in get_args(hint) or (hint,))


def _value_problems(name: str, value: Any) -> list[str]:
    """The problem of one value by the tables above: at most one line."""
    key = re.sub(r"^recover\.", "", name)
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


def _run_problems(cfg: Config) -> list[str]:
    problems = []
    for stage in cfg.stages:
        if stage not in STAGES:
            near = did_you_mean(stage, STAGES)
            problems.append(f"stages: got {stage!r}, wanted some of {', '.join(STAGES)}{near}")
    known = [s for s in cfg.stages if s in STAGES]
    if not cfg.stages:
        problems.append(f"stages: got none, wanted some of {', '.join(STAGES)}")
    elif known != [s for s in STAGES if s in known]:
        problems.append(
            f"stages: got {', '.join(known)}, wanted each once and in this order: "
            f"{', '.join(STAGES)}"
        )
    sizes = [cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor]
    for name, size in zip(("data", "fsdp", "tensor"), sizes, strict=True):
        if size != -1 and size < 1:
            problems.append(
                f"mesh.{name}: got {size}, wanted a number of devices, or -1 for the rest"
            )
    if sizes.count(-1) > 1:
        problems.append(f"mesh: got -1 for {sizes.count(-1)} axes, wanted it for at most one")
    if not cfg.model.path:
        problems.append("model.path: got '', wanted a folder, a hub id or asset:NAME")
    if not cfg.encoder.path and {"grpo", "evaluate"} & set(cfg.stages):
        problems.append(
            "encoder.path: got '', wanted a folder, a hub id or asset:NAME (GRPO is rewarded and "
            "evaluation measured by the encoder)"
        )
    trained = STAGES[:3]
    for arm in cfg.export.arms:
        if arm not in trained:
            near = did_you_mean(arm, trained)
            problems.append(f"export.arms: got {arm!r}, wanted some of {', '.join(trained)}{near}")
    if cfg.encoder.prompt_name and cfg.encoder.prompt is not None:
        problems.append(
            f"encoder.prompt: got {cfg.encoder.prompt!r} beside encoder.prompt_name = "
            f"{cfg.encoder.prompt_name!r}, wanted one of the two"
        )
    if cfg.encoder.judge and cfg.encoder.judge == cfg.encoder.path:
        problems.append(
            f"encoder.judge: got {cfg.encoder.judge!r}, which is encoder.path; wanted another "
            "encoder, since a judge that gave the reward proves nothing, or ''"
        )
    return problems


def _evaluation_problems(cfg: Config) -> list[str]:
    evaluation = cfg.evaluation
    problems = []
    if evaluation.preference.base_url:
        from grpo_jax.evals.preference import check_preference  # not needed to start quickly

        wrong = check_preference(evaluation.preference)
        problems += [f"evaluation.preference.{problem}" for problem in wrong]
    for name, value, wanted in (
        ("choice_prompt", evaluation.choice_prompt, ("{question}",)),
        ("reading_prompt", evaluation.reading_prompt, ("{context}", "{question}")),
    ):
        if missing := [field for field in wanted if field not in value]:
            problems.append(f"evaluation.{name}: got {value!r}, which lacks {', '.join(missing)}")
    if evaluation.max_answer_length >= evaluation.max_task_length:
        problems.append(
            f"evaluation.max_answer_length: got {evaluation.max_answer_length}, wanted less than "
            f"max_task_length = {evaluation.max_task_length}, so that a question fits too"
        )
    return problems


def _data_problems(cfg: Config) -> list[str]:
    data, stages = cfg.data, set(cfg.stages)
    problems = []
    if not data.train and stages - {"export"}:
        problems.append("data.train: got '', wanted a file, a folder, a hub id or asset:NAME")
    if data.dev_fraction + data.test_fraction >= 1:
        problems.append(
            f"data.dev_fraction + data.test_fraction: got {data.dev_fraction} + "
            f"{data.test_fraction}, wanted less than 1, so that rows are left for training"
        )
    if {"sft", "grpo", "recover"} & stages and not data.dev and data.dev_fraction == 0:
        problems.append(
            "data.dev_fraction: got 0 and no data.dev; training needs dev rows, set one"
        )
    if "evaluate" in stages and not data.test and data.test_fraction == 0:
        problems.append("data.test_fraction: got 0 and no data.test; evaluation needs one of them")
    if not data.source_field:
        problems.append("data.source_field: got '', wanted the name of a field of the rows")
    if not data.target_field and not data.target_optional:
        problems.append(
            "data.target_field: got '', wanted the name of a field of the rows, or "
            "data.target_optional=True for monolingual rows"
        )
    if "{source}" not in data.prompt:
        problems.append(f"data.prompt: got {data.prompt!r}, wanted a text with {{source}} in it")
    if data.system and not data.chat:
        problems.append(
            "data.system: a system message needs the chat template; set data.chat=True or write "
            "it into data.prompt"
        )
    if "grpo" in stages and cfg.reward.anchor == "target" and data.target_optional:
        problems.append(
            "reward.anchor: 'target' compares with the target text, but data.target_optional lets "
            "rows without one in; set reward.anchor=source or data.target_optional=False"
        )
    return problems


def _learning_problems(cfg: Config) -> list[str]:
    grpo, problems = cfg.grpo, _lora_problems(cfg)
    parts = grpo.num_minibatches * grpo.gradient_accumulation_steps
    if parts > 0 and grpo.prompts_per_step % parts:
        problems.append(
            f"grpo.prompts_per_step: got {grpo.prompts_per_step}, wanted a multiple of "
            f"num_minibatches * gradient_accumulation_steps = {parts}"
        )
    for name, sft in (("sft", cfg.sft), ("recover.sft", cfg.recover.sft)):
        steps = sft.gradient_accumulation_steps
        if steps > 0 and sft.batch_size % steps:
            problems.append(
                f"{name}.batch_size: got {sft.batch_size}, wanted a multiple of "
                f"{name}.gradient_accumulation_steps = {steps}"
            )
    high = grpo.epsilon if grpo.epsilon_high is None else grpo.epsilon_high
    if grpo.delta is not None and grpo.delta <= 1 + high:
        problems.append(
            f"grpo.delta: got {grpo.delta}, wanted more than 1 + epsilon_high = {1 + high}"
        )
    if "grpo" in cfg.stages and cfg.reward.semantic_weight + cfg.reward.language_weight <= 0:
        problems.append(
            "reward.semantic_weight and reward.language_weight: got 0 for both, so nothing is "
            "rewarded; wanted at least one above 0"
        )
    return problems


def _lora_problems(cfg: Config) -> list[str]:
    lora, problems = cfg.model.lora, []
    linears = ", ".join(LINEARS)
    for target in lora.targets if lora.rank else ():
        if target not in LINEARS:
            near = did_you_mean(target, LINEARS)
            problems.append(f"model.lora.targets: got {target!r}, wanted some of {linears}{near}")
    if lora.rank and not lora.targets:
        problems.append(f"model.lora.targets: got none, wanted some of {linears}")
    if "all-linear" in lora.targets and len(lora.targets) > 1:
        problems.append(
            "model.lora.targets: got all-linear and other names; wanted one or the other"
        )
    if lora.path and not lora.rank:
        problems.append(
            "model.lora.path: an adapter to start from needs model.lora.rank and alpha as in its "
            "adapter_config.json; set them, or merge the adapter into the model first"
        )
    return problems
