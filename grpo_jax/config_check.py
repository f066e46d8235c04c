"""`validate`: the resolved Config in, nothing or one error that lists every problem out.

Runs before any file is read. `config_values` says which values a field may take; the functions here
hold the rules that tie fields together, for the configuration and for each arm's own.
"""

from __future__ import annotations

from grpo_jax.config import STAGES, TRAINING, TROUBLE, Config
from grpo_jax.config_arms import arm_problems, arms_of, settings_of
from grpo_jax.config_dicts import did_you_mean
from grpo_jax.config_values import LINEARS, type_problems, value_problems


def validate(cfg: Config) -> None:
    """Checks every value and every rule that two fields must keep together.

    Raises:
      ValueError: one message with a line for each problem: the field, what it got, what is wanted.
    """
    problems = type_problems(cfg)
    if not problems:  # the rules below rely on the types
        problems = value_problems(cfg) + arm_problems(cfg) + _run_problems(cfg)
        problems += _problems(cfg, _methods(cfg))
    if not problems:
        for arm in cfg.arms:
            own = settings_of(cfg, arm)
            found = type_problems(own) or value_problems(own) + _problems(own, {arm.method})
            problems += [f"arms ({arm.name}): {problem}" for problem in found]
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        lines = "\n  ".join(problems)
        raise ValueError(f"the configuration has {len(problems)} {noun}:\n  {lines}")


def _methods(cfg: Config) -> set[str]:
    """What the run does: training methods and the stages behind them."""
    return {arm.method for arm in arms_of(cfg).values()} | {*cfg.stages} - {*TRAINING}


def _problems(cfg: Config, methods: set[str]) -> list[str]:
    """Rules within the settings that one arm, or the whole run, is made with."""
    found = _data_problems(cfg, methods) + _learning_problems(cfg, methods)
    return found + _evaluation_problems(cfg)


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
        if size < -1:
            problems.append(
                f"mesh.{name}: got {size}, wanted a number of devices, -1 for the rest, or 0 to "
                "have it chosen"
            )
    if sizes.count(-1) > 1:
        problems.append(f"mesh: got -1 for {sizes.count(-1)} axes, wanted it for at most one")
    if not cfg.model.path:
        problems.append("model.path: got '', wanted a folder, a hub id or asset:NAME")
    if not cfg.encoder.path and {"grpo", "self_sft", "evaluate"} & _methods(cfg):
        problems.append(
            "encoder.path: got '', wanted a folder, a hub id or asset:NAME (GRPO is rewarded and "
            "evaluation measured by the encoder)"
        )
    names = [arm.name for arm in cfg.arms] or TRAINING
    for name in cfg.export.arms:
        if name not in names:
            near = did_you_mean(name, names)
            problems.append(f"export.arms: got {name!r}, wanted some of {', '.join(names)}{near}")
    if cfg.encoder.prompt_name and cfg.encoder.prompt is not None:
        problems.append(
            f"encoder.prompt: got {cfg.encoder.prompt!r} beside encoder.prompt_name = "
            f"{cfg.encoder.prompt_name!r}, wanted one of the two"
        )
    if cfg.encoder.path in cfg.encoder.judge:
        problems.append(
            f"encoder.judge: got {cfg.encoder.path!r}, which is encoder.path; wanted other "
            "encoders, since a judge that gave the reward proves nothing"
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


def _data_problems(cfg: Config, methods: set[str]) -> list[str]:
    data = cfg.data
    problems = []
    if not data.train and methods - {"export"}:
        problems.append("data.train: got '', wanted a file, a folder, a hub id or asset:NAME")
    if data.dev_fraction + data.test_fraction >= 1:
        problems.append(
            f"data.dev_fraction + data.test_fraction: got {data.dev_fraction} + "
            f"{data.test_fraction}, wanted less than 1, so that rows are left for training"
        )
    if methods - {"evaluate", "export"} and not data.dev and data.dev_fraction == 0:
        problems.append(
            "data.dev_fraction: got 0 and no data.dev; training needs dev rows, set one"
        )
    if "evaluate" in methods and not data.test and data.test_fraction == 0:
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
    scored = {"grpo", "self_sft"} & methods
    if scored and cfg.reward.anchor != "source" and data.target_optional:
        problems.append(
            f"reward.anchor: {cfg.reward.anchor!r} compares with a target text, but "
            "data.target_optional lets rows without one in; set reward.anchor=source or "
            "data.target_optional=False"
        )
    return problems


def _learning_problems(cfg: Config, methods: set[str]) -> list[str]:
    grpo, problems = cfg.grpo, _lora_problems(cfg)
    parts = grpo.num_minibatches * grpo.gradient_accumulation_steps
    if parts > 0 and grpo.prompts_per_step % parts:
        problems.append(
            f"grpo.prompts_per_step: got {grpo.prompts_per_step}, wanted a multiple of "
            f"num_minibatches * gradient_accumulation_steps = {parts}"
        )
    sections = {"sft": cfg.sft, "self_sft.sft": cfg.self_sft.sft, "recover.sft": cfg.recover.sft}
    for name, sft in sections.items():
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
    if grpo.forgetting_budget is not None:
        if not cfg.forgetting.every or not cfg.evaluation.retention:
            problems.append(
                "grpo.forgetting_budget: needs forgetting.every above 0 and evaluation.retention, "
                "the text that forgetting is measured on"
            )
        if grpo.beta == 0:
            problems.append("grpo.forgetting_budget: needs grpo.beta above 0, for beta adapts")
    for kind in grpo.stop_on:
        if kind not in TROUBLE:
            problems.append(
                f"grpo.stop_on: got {kind!r}, wanted some of {', '.join(TROUBLE)}"
                + did_you_mean(kind, TROUBLE)
            )
    problems += _reward_problems(cfg, methods)
    scored = {"grpo", "self_sft"} & methods
    if scored and cfg.reward.semantic_weight + cfg.reward.language_weight <= 0:
        problems.append(
            "reward.semantic_weight and reward.language_weight: got 0 for both, so nothing is "
            "rewarded; wanted at least one above 0"
        )
    return problems


def _reward_problems(cfg: Config, methods: set[str]) -> list[str]:
    reward, problems = cfg.reward, []
    if "grpo" in methods and reward.hard_gate and cfg.grpo.advantage == "gdpo":
        problems.append(
            "reward.hard_gate: grpo.advantage = 'gdpo' looks at each term by itself and never at "
            "the gated sum; use another advantage, or no hard gate"
        )
    if reward.metric != "cosine" and reward.anchor == "source":
        problems.append(
            f"reward.metric: {reward.metric!r} with the source compares words of two languages, "
            "which rewards copying; use cosine, or another anchor"
        )
    if reward.min_length_ratio and not reward.length_weight:
        problems.append(
            "reward.min_length_ratio: part of the length penalty, whose reward.length_weight is 0"
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
