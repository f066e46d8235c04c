"""The tree of arms: what an arm is made of, what it may set, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from grpo_jax.config import Arm, Config
from grpo_jax.config_arms import (
    ancestors,
    arm_identity,
    arms_of,
    group_settings,
    groups_of,
    settings_of,
)
from grpo_jax.config_check import validate
from grpo_jax.config_dicts import from_dict, to_dict
from grpo_jax.experiments import tax_arms


def experiment(*arms: Arm) -> Config:
    cfg = Config(stages=("evaluate",), arms=arms)
    cfg.model.path, cfg.encoder.path, cfg.data.train = "policy", "encoder", "rows.jsonl"
    return cfg


COLD = Arm("cold", "sft")
GRPO = Arm("grpo", "grpo", "cold")


def test_the_stages_are_arms_too() -> None:
    arms = arms_of(Config(stages=("grpo", "recover")), done=lambda stage: stage == "sft")
    assert [(arm.name, arm.method, arm.start) for arm in arms.values()] == [
        ("sft", "sft", "base"), ("grpo", "grpo", "sft"), ("recover", "recover", "grpo"),
    ]  # fmt: skip


def test_overrides_are_the_arms_own_and_take_the_fields_types() -> None:
    arm = dataclasses.replace(
        GRPO, overrides={"grpo": {"beta": 1, "stop_on": ["repetition"]}, "reward.tau": 0.5}
    )
    cfg = experiment(COLD, arm)
    validate(cfg)
    own = settings_of(cfg, arm)
    assert own.grpo.beta == 1.0 and own.grpo.stop_on == ("repetition",) and own.reward.tau == 0.5
    assert cfg.grpo.beta == 0.01 and settings_of(cfg, COLD) is cfg
    again = from_dict(to_dict(cfg))
    assert settings_of(again, again.arms[1]) == own


def test_identity_holds_what_the_method_reads_and_nothing_else() -> None:
    cfg = experiment(COLD, GRPO)
    before = [arm_identity(cfg, arm) for arm in cfg.arms]
    cfg.reward.tau, cfg.evaluation.max_rows, cfg.log.every, cfg.grpo.lanes = 0.3, 9, 9, 2
    after = [arm_identity(cfg, arm) for arm in cfg.arms]
    assert before[0] == after[0]
    assert before[1] | {"reward.tau": 0.3} == after[1]
    cfg.evaluation.retention = "text"
    assert arm_identity(cfg, GRPO) == after[1]
    held = dataclasses.replace(GRPO, overrides={"grpo.forgetting_budget": 0.1})
    assert arm_identity(cfg, held)["evaluation.retention"] == "text"  # it steers the training


def test_an_interpolation_has_two_lines_of_ancestors() -> None:
    mix = Arm("mix", "interpolate", "grpo", overrides={"interpolate.toward": "strong"})
    cfg = experiment(COLD, GRPO, Arm("strong", "sft", "cold"), mix)
    validate(cfg)
    assert ancestors(arms_of(cfg), "mix") == ["cold", "grpo", "strong", "mix"]


def test_a_group_has_data_of_its_own() -> None:
    own = {"data.train": "headlines.jsonl", "sft.max_steps": 3, "reward.language": "om"}
    cfg = experiment(COLD, Arm("t", "sft", "cold", "transfer", own))
    validate(cfg)
    arms = arms_of(cfg)
    assert groups_of(arms) == ["", "transfer"] and group_settings(cfg, arms, "") is cfg
    group = group_settings(cfg, arms, "transfer")
    assert (group.data.train, group.reward.language) == ("headlines.jsonl", "om")
    assert group.sft == cfg.sft


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ((GRPO,), "arms[0] (grpo).start: got 'cold', wanted an arm before it: there is none"),
        ((GRPO, COLD), "wanted an arm before it: it stands behind"),
        ((COLD, COLD), "'cold' is there 2 times"),
        ((Arm("a/b", "sft"),), "letters, digits"),
        ((Arm("..", "sft"),), "letters, digits"),
        ((Arm("base", "sft"),), "the name belongs to what is measured without training"),
        ((Arm("a", "gpro"),), "got 'gpro', wanted one of sft, self_sft, grpo, interpolate; did"),
        ((Arm("a", "sft", overrides={"model.path": "x"}),), "got model.path; an arm may set"),
        ((Arm("a", "sft", overrides={"sft.epoch": 1}),), "no field sft.epoch; did you mean"),
        ((Arm("a", "sft", overrides={"sft.epochs": -1}),), "arms (a): sft.epochs: got -1"),
        ((Arm("a", "sft", overrides={"sft.epochs": "x"}),), "sft.epochs: got 'x', wanted a num"),
        ((COLD, Arm("m", "interpolate", "cold")), "interpolate.toward: got '', wanted an arm"),
        ((Arm("a", "sft", overrides={"data.seed": 3}),), "of the same group ''; what is compared"),
        (("cold",), "wanted a tuple of Arm rows"),
        ((dataclasses.replace(COLD, overrides=3),), "arms[0].overrides: got 3, wanted a dict"),
    ],
)
def test_what_cannot_be_an_experiment_is_named(arms: tuple, message: str) -> None:
    with pytest.raises(ValueError, match="the configuration has") as error:
        validate(experiment(*arms))
    assert message in str(error.value)


def test_fields_beside_the_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = experiment(COLD, GRPO)
    cfg.only = ("cold",)
    validate(cfg)
    cfg.only, cfg.export.arms, cfg.stages = ("gpro",), ("col",), ("sft", "evaluate")
    with pytest.raises(ValueError, match="3 problems") as error:
        validate(cfg)
    for part in ("only: got 'gpro'", "export.arms: got 'col'", "stages: got sft beside arms"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no arms to choose from"):
        validate(dataclasses.replace(experiment(), stages=("sft",), only=("sft",)))


def test_the_tax_experiment_is_a_valid_tree() -> None:
    arms = tax_arms(
        (1e-5, 3e-4), sft={"sft.epochs": 2}, recover={"sft.max_steps": 5}, transfer={"data.seed": 1}
    )
    validate(experiment(*arms))
    names = [arm.name for arm in arms]
    assert names[:4] == ["cold", "sft-1e-5", "sft-3e-4", "self-sft"]
    assert {f"{name}-transfer" for name in ("base", "cold", "mix", "sg-srl-recover")} < {*names}
    assert all(arm.group == "transfer" for arm in arms if arm.name.endswith("-transfer"))
    by_name = {arm.name: arm for arm in arms}
    assert by_name["grpo"].overrides == {} and by_name["mix"].start == "sft-3e-4"
    rows = [(by_name[n].overrides["data.cold_start_rows"]) for n in ("sft-1e-5", "sft-3e-4")]
    assert rows == [0, 0]  # all rows, as many as GRPO and its cold start see together
