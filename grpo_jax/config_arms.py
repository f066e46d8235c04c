"""The arms of a configuration: a tree that begins at the base model, each with its own settings.

An experiment lists them in `Config.arms`. Without that, the training stages are the arms, each
starting from the one before, so that everything behind this file knows arms only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax.config import METHODS, TRAINING, Arm, Config
from grpo_jax.config_dicts import CADENCE, did_you_mean, flatten, from_dict, to_dict, under

BASE = "base"
FLOORS = ("copy", "tm")  # systems without a model, measured beside the arms
OWN = ("sft", "self_sft", "grpo", "interpolate", "reward", "data")  # sections an arm may override
SAME_TEST = ("data.max_rows", "data.cold_start_rows")  # of data, these may differ within a group

# What each method reads. Together with the arm that it starts from, this is what an arm is.
_SHARED = ("model", "data", "checkpoint.load_best_at_end")
_SCORED = ("encoder.path", "encoder.dtype", "encoder.max_length", "encoder.prompt_name",
           "encoder.prompt", "encoder.pooling", "encoder.normalize", "reward")  # fmt: skip
_GAUGE = ("forgetting", "evaluation.retention", "evaluation.max_retention_rows",
          "evaluation.max_retention_length")  # fmt: skip
_READ = {
    "sft": (*_SHARED, "sft"),
    "recover": (*_SHARED, "recover"),
    "self_sft": (*_SHARED, *_SCORED, "self_sft", "grpo.sampling"),
    "grpo": (*_SHARED, *_SCORED, "grpo"),
    "interpolate": ("interpolate",),
}


def arms_of(cfg: Config, done: Callable[[str], bool] = lambda stage: False) -> dict[str, Arm]:
    """The arms by name, in their order, the base left out.

    Args:
      done: whether a training stage that `cfg.stages` leaves out was finished before.
    """
    if cfg.arms:
        return {arm.name: arm for arm in cfg.arms}
    arms: dict[str, Arm] = {}
    start = BASE
    for stage in TRAINING:
        if stage in cfg.stages or done(stage):
            arms[stage] = Arm(stage, stage, start)
            start = stage
    return arms


def settings_of(cfg: Config, arm: Arm) -> Config:
    """The configuration with the arm's overrides.

    Raises:
      ValueError: an override names no field.
    """
    if not arm.overrides:
        return cfg
    values = to_dict(cfg)
    for name, value in flatten(arm.overrides).items():
        *path, last = name.split(".")
        section = values
        for part in path:
            section = section.get(part, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict) or last not in section:
            raise ValueError(f"no field {name}{did_you_mean(name, flatten(values))}")
        section[last] = value
    return from_dict(values)


def arm_identity(cfg: Config, arm: Arm) -> dict[str, Any]:
    """What decides an arm's weights, beside those that it starts from: dotted fields and values."""
    settings = settings_of(cfg, arm)
    names = _READ[arm.method]
    if arm.method == "grpo" and settings.grpo.forgetting_budget is not None:
        names += _GAUGE
    fields = flatten(to_dict(settings))
    own = {k: v for k, v in fields.items() if under(k, names) and not under(k, CADENCE)}
    return {"method": arm.method, "start": arm.start, **own}


def ancestors(arms: dict[str, Arm], name: str) -> list[str]:
    """The arms whose weights `name` needs, itself last, the base left out."""
    if name == BASE:
        return []
    arm = arms[name]
    found = ancestors(arms, arm.start)
    if arm.method == "interpolate":
        toward = interpolation(arm)[0]
        found += [other for other in ancestors(arms, toward) if other not in found]
    return [*found, name]


def interpolation(arm: Arm) -> tuple[str, float]:
    """The other arm of an interpolation, and its weight."""
    cfg = settings_of(Config(), Arm(overrides=_only(arm.overrides, "interpolate")))
    return cfg.interpolate.toward, cfg.interpolate.weight


def groups_of(arms: dict[str, Arm]) -> list[str]:
    """The groups, "" first, which is the configuration's own task."""
    return list(dict.fromkeys(["", *(arm.group for arm in arms.values())]))


def group_settings(cfg: Config, arms: dict[str, Arm], group: str) -> Config:
    """The configuration that a group's held-out rows are read with: its own data and reward."""
    if not group:
        return cfg
    first = next(arm for arm in arms.values() if arm.group == group)
    wanted = _only(first.overrides, "data") | _only(first.overrides, "reward")
    return settings_of(cfg, Arm(overrides=wanted))


def arm_problems(cfg: Config) -> list[str]:
    """What is wrong with the tree of arms; the settings of each are checked elsewhere."""
    if not cfg.arms:
        return [f"only: got {cfg.only}, but there are no arms to choose from"] if cfg.only else []
    problems = []
    names = [arm.name for arm in cfg.arms]
    for place, arm in enumerate(cfg.arms):
        problems += _problems_of(arm, f"arms[{place}] ({arm.name})", names, place)
    problems += [
        f"arms: {name!r} is there {names.count(name)} times; wanted names of their own"
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    if trained := [stage for stage in cfg.stages if stage in TRAINING]:
        problems.append(
            f"stages: got {', '.join(trained)} beside arms, which take their place; leave them out"
        )
    for name in cfg.only:
        if name not in names:
            problems.append(f"only: got {name!r}, which is no arm{did_you_mean(name, names)}")
    return problems or _group_problems(cfg)


def _problems_of(arm: Arm, at: str, names: Sequence[str], place: int) -> list[str]:
    problems = []
    plain = arm.name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or arm.name[0] == ".":
        problems.append(f"{at}.name: wanted letters, digits, '-', '_' and '.': it names files")
    if arm.name.split("@")[0] in (BASE, *FLOORS):
        problems.append(f"{at}.name: the name belongs to what is measured without training")
    if arm.method not in METHODS:
        near = did_you_mean(arm.method, METHODS)
        problems.append(
            f"{at}.method: got {arm.method!r}, wanted one of {', '.join(METHODS)}{near}"
        )
    wrong = [n for n in flatten(arm.overrides) if n.split(".")[0] not in OWN]
    if wrong:
        problems.append(
            f"{at}.overrides: got {', '.join(wrong)}; an arm may set fields of {', '.join(OWN)}, "
            "and shares the rest"
        )
        return problems
    before = [BASE, *names[:place]]
    needed = {"start": arm.start}
    if arm.method == "interpolate":
        try:
            needed["interpolate.toward"] = interpolation(arm)[0]
        except ValueError as error:
            return [*problems, f"{at}.overrides: {error}"]
    for field, name in needed.items():
        if name not in before:
            why = "it stands behind" if name in names else "there is none"
            near = "" if name in names else did_you_mean(name, names)
            problems.append(f"{at}.{field}: got {name!r}, wanted an arm before it: {why}{near}")
    return problems


def _group_problems(cfg: Config) -> list[str]:
    """Arms of one group must be measured on the same rows."""
    problems = []
    first: dict[str, tuple[str, dict[str, Any]]] = {"": ("the configuration", _test_fields(cfg))}
    for arm in cfg.arms:
        try:
            fields = _test_fields(settings_of(cfg, arm))
        except ValueError as error:
            problems.append(f"arms ({arm.name}).overrides: {error}")
            continue
        name, wanted = first.setdefault(arm.group, (arm.name, fields))
        for field in [k for k in fields if fields[k] != wanted[k]]:
            problems.append(
                f"arms ({arm.name}).overrides: {field} is {fields[field]!r}, but {wanted[field]!r} "
                f"for {name}, of the same group {arm.group!r}; what is compared needs the same "
                "held-out rows, so give it another group"
            )
    return problems


def _test_fields(cfg: Config) -> dict[str, Any]:
    fields = flatten({"data": to_dict(cfg.data), "reward": {"language": cfg.reward.language}})
    return {k: v for k, v in fields.items() if k not in SAME_TEST}


def _only(overrides: dict[str, Any], section: str) -> dict[str, Any]:
    return {k: v for k, v in flatten(overrides).items() if under(k, (section,))}
