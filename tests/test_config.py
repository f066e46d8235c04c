"""Configuration: every problem is listed, flags are checked before parsing, no field is dead."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import grpo_jax
from grpo_jax import config, config_dicts
from grpo_jax.config import Config
from grpo_jax.config_check import validate
from grpo_jax.config_values import CHOICES, RANGES
from grpo_jax.flags import check_flags


def good_config() -> Config:
    cfg = Config()
    cfg.model.path, cfg.encoder.path, cfg.data.train = "policy", "encoder", "rows.jsonl"
    return cfg


def set_field(cfg: Config, name: str, value: object) -> None:
    *sections, last = name.split(".")
    section = cfg
    for part in sections:
        section = getattr(section, part)
    setattr(section, last, value)


def test_a_good_config_passes():
    validate(good_config())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grpo.num_generations", 1, "grpo.num_generations: got 1, wanted a number in [2, inf)"),
        ("grpo.loss_type", "dappo", "did you mean dapo"),
        ("grpo.sampling.temperature", 0.0, "grpo.sampling.temperature: got 0.0"),
        ("grpo.sampling.top_p", 0.0, "wanted a number in (0, 1]"),
        ("grpo.beta", float("nan"), "grpo.beta: got nan"),
        ("grpo.beta", "0.1", "grpo.beta: got '0.1', wanted a number"),
        (
            "grpo.num_minibatches",
            3,
            "multiple of num_minibatches * gradient_accumulation_steps = 3",
        ),
        ("grpo.delta", 1.1, "wanted more than 1 + epsilon_high = 1.2"),
        ("sft.gradient_accumulation_steps", 5, "sft.batch_size: got 32, wanted a multiple"),
        ("recover.sft.optimizer.b2", 1.0, "recover.sft.optimizer.b2: got 1.0"),
        ("sft.optimizer.schedule", "cosin", "did you mean cosine"),
        ("reward.tau_quantile", 1.5, "reward.tau_quantile: got 1.5, wanted a number in [0, 1]"),
        ("reward.semantic_weight", True, "got True, wanted a number"),
        ("data.target_optional", True, "reward.anchor: 'target' compares"),
        ("data.prompt", "Translate: {text}", "with {source} in it"),
        ("data.test_fraction", 0.97, "data.dev_fraction + data.test_fraction"),
        ("data.chat", 1, "data.chat: got 1, wanted true or false"),
        ("model.path", "", "model.path: got ''"),
        ("model.lora", config.Lora(rank=4, targets=("q_prj",)), "did you mean q_proj"),
        ("model.lora", None, "wanted a Lora section"),
        ("encoder.judge", ("encoder",), "wanted other encoders"),
        ("export.arms", ("gpro",), "export.arms: got 'gpro', wanted some of sft, grpo, recover"),
        ("mesh", config.Mesh(-1, -1, 1), "mesh: got -1 for 2 axes"),
        ("mesh.tensor", -2, "mesh.tensor: got -2"),
        ("stages", ("grpo", "sft"), "stages: got grpo, sft, wanted each once and in this order"),
        ("stages", ("sft", "gpro"), "did you mean grpo"),
        ("stages", ("sft", "sft"), "wanted each once"),
        ("stages", (), "stages: got none"),
        ("stages", ["sft"], "wanted a tuple of strings"),
        ("seed", -1, "seed: got -1"),
        ("seed", 1.0, "seed: got 1.0, wanted an integer or None"),
        ("grpo.betta", 0.1, "grpo.betta: no such field; did you mean beta?"),
    ],
)
def test_each_problem_is_named(name, value, message):
    cfg = good_config()
    set_field(cfg, name, value)
    with pytest.raises(ValueError, match="the configuration has 1 problem:") as error:
        validate(cfg)
    assert message in str(error.value)


def test_all_problems_at_once():
    cfg = good_config()
    cfg.model.path, cfg.grpo.num_generations, cfg.reward.anchor = "", 1, "targte"
    with pytest.raises(ValueError, match="3 problems") as error:
        validate(cfg)
    for part in ("model.path", "grpo.num_generations", "did you mean target"):
        assert part in str(error.value)


def test_every_table_entry_names_a_field():
    names = config_dicts.flatten(config_dicts.to_dict(Config())).keys()
    for key in CHOICES.keys() | RANGES.keys():
        assert any(n == key or n.endswith("." + key) for n in names), key


def test_dict_round_trip_and_unknown_field():
    cfg = good_config()
    cfg.grpo.beta, cfg.seed, cfg.stages = 1, 3, ("sft",)
    values = config_dicts.to_dict(cfg)
    assert values["grpo"]["beta"] == 1.0 and isinstance(values["grpo"]["beta"], float)
    assert config_dicts.from_dict(values) == cfg
    assert config_dicts.from_dict({"grpo": {"beta": 0.5}}).grpo.beta == 0.5
    with pytest.raises(ValueError, match=r"no field grpo\.bta; did you mean beta"):
        config_dicts.from_dict({"grpo": {"bta": 0.5}})


def test_fingerprint_follows_identity_only():
    base = config_dicts.fingerprint(good_config())
    for name, value, same in [
        ("log.every", 7, True),
        ("checkpoint.keep", 9, True),
        ("checkpoint.load_best_at_end", True, False),
        ("mesh.tensor", 2, True),
        ("evaluation.max_rows", 3, True),
        ("grpo.beta", 0.5, False),
        ("data.seed", 5, False),
        ("encoder.path", "other", False),
    ]:
        cfg = good_config()
        set_field(cfg, name, value)
        assert (config_dicts.fingerprint(cfg) == base) == same, name


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text("from grpo_jax.config import Config\ndef get_config():\n    return Config()\n")
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.grpo.bta=0.1", "no such field; did you mean grpo.beta"),
        ("--config.beta=0.1", "did you mean grpo.beta?"),
        ("--config.grpo.beta=high", "--config.grpo.beta: got 'high', wanted a number"),
        ("--config.seed=1.5", "--config.seed: got '1.5', wanted an integer"),
        ("--config.seed=None", "--config.seed: got 'None', wanted an integer"),
        ("--config.model.remat=yes", "wanted true or false"),
        ("--config.grpo=3", "--config.grpo: is a section"),
        ("--config.seed", "got no value"),
        ("--noconfig.seed", "only true-or-false fields can be negated"),
        ("--config.stages=sft,grpo", "--config.stages=\"('sft','grpo')\""),
        ("--config.stages=(sft)", "--config.stages=\"('sft',)\""),
        ("--config.stages=(1,2)", "wanted a tuple of strings"),
    ],
)
def test_bad_flags_end_in_one_line(override, message, config_file, capsys):
    with pytest.raises(SystemExit) as stop:
        check_flags(["main.py", f"--config={config_file}", override])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1


def test_file_is_checked_and_comes_first(config_file, capsys):
    for argv, message in [
        ([f"--config={config_file.with_name('tyny.py')}"], f"did you mean {config_file}"),
        (["--config.seed=1", f"--config={config_file}"], "give the file first"),
    ]:
        with pytest.raises(SystemExit):
            check_flags(["main.py", *argv])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        (["--config.grpo.beta=0.02"], "grpo.beta", 0.02),
        (["--config.seed", "7"], "seed", 7),
        (["--config.grpo.epsilon_high=1"], "grpo.epsilon_high", 1.0),
        (["--noconfig.model.remat"], "model.remat", False),
        (["--config.model.remat=0"], "model.remat", False),
        (["--config.data.prompt=a, b = {source}"], "data.prompt", "a, b = {source}"),
        (["--config.stages=('sft','grpo')"], "stages", ("sft", "grpo")),
        (["--config.stages=sft"], "stages", ("sft",)),
    ],
)
def test_good_flags_pass_and_reach_the_config(override, name, value, config_file):
    argv = ["main.py", f"--config={config_file}", *override]
    check_flags(argv)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    cfg = holder.value
    found = cfg
    for part in name.split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)


def test_every_field_is_read_somewhere():
    """A field counts as read as `log.every`, or as `cfg.every` of whatever section cfg is."""
    read = set()
    for path in Path(grpo_jax.__file__).parent.rglob("*.py"):
        if path.name not in ("config.py", "config_check.py", "flags.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                    read.add((owner.lstrip("_"), node.attr))
    dead = [
        f"{name}.{f.name}"
        for name, section in sections(Config()).items()
        for f in dataclasses.fields(section)
        if not {(o, f.name) for o in ("cfg", "config", name.rsplit(".", 1)[-1])} & read
    ]
    assert not dead


def sections(section: object, prefix: str = "") -> dict[str, object]:
    """Dotted name -> section, the whole config under 'cfg'."""
    found = {prefix or "cfg": section}
    for f in dataclasses.fields(section):  # type: ignore[arg-type]
        value = getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            found |= sections(value, f"{prefix}.{f.name}" if prefix else f.name)
    return found
