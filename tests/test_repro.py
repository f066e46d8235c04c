"""A run is repeated from what it left; that the two are equal is tested in test_faults."""

from __future__ import annotations

import json
import os
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import whole

from grpo_jax import config_dicts, main, repro
from grpo_jax.config import Arm, Config
from grpo_jax.infra import provenance
from grpo_jax.infra.files import write_json
from grpo_jax.infra.workdir import REQUIREMENTS, Workdir


def left(folder: Path, cfg: Config, seed: int, **facts: object) -> Path:
    """A run's config.json."""
    write_json(folder / "config.json", {"config": config_dicts.to_dict(cfg), "seed": seed, **facts})
    return folder


def test_a_config_is_read_back_with_the_seed_that_was_drawn(tmp_path: Path) -> None:
    cfg = whole.lora_config()
    cfg.seed = None
    cfg.stages = ("grpo",)  # the last of three commands
    for name in ("arms/sft", "arms/grpo", "done/export"):
        write_json(left(tmp_path, cfg, 41) / f"{name}.json", {})
    found = repro.recorded(tmp_path)
    assert found.seed == 41 and found.stages == ("sft", "grpo", "export")
    found.seed, found.stages = cfg.seed, cfg.stages
    assert found == cfg


def test_all_arms_of_an_experiment_are_repeated(tmp_path: Path) -> None:
    cfg = Config(stages=("evaluate",), only=("b",))
    cfg.arms = (Arm("a", "sft", "base"), Arm("b", "grpo", "a", overrides={"grpo.beta": 0.0}))
    write_json(tmp_path / "arms" / "a.json", {})
    found = repro.recorded(left(tmp_path, cfg, 3))
    assert found.only == () and found.arms == cfg.arms and found.stages == ("evaluate",)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no run here"):
        repro.recorded(tmp_path)
    with pytest.raises(SystemExit, match="error: .*no run here"):
        repro.main([str(tmp_path)])


def test_other_surroundings_are_named(tmp_path: Path) -> None:
    devices = {"kind": "cpu", "count": 1}
    one = left(tmp_path / "a", Config(), 0, devices=devices, git_revision="ab-dirty")
    two = left(tmp_path / "b", Config(), 0, devices=devices | {"count": 8}, git_revision="ab")
    (one / REQUIREMENTS).write_text("# Python 3.11\njax==0.10.1\nx @ git+https://h/x@1\n")
    (two / REQUIREMENTS).write_text("# Python 3.12\njax==0.10.2\nnew==1\nx @ git+https://h/x@1\n")
    assert repro.surroundings(one, two) == [
        "devices.count was 1, now 8",
        "git_revision was 'ab-dirty', now 'ab'",
        "jax: was jax==0.10.1, now jax==0.10.2",
        "new: was absent, now new==1",
        "the code had changes that are in no commit",
    ]


class Installed(metadata.Distribution):
    """A distribution with an origin, whose metadata lie in a folder."""

    def __init__(self, name: str, origin: dict[str, Any], folder: Path = Path("/nowhere")):
        self._folder = folder
        self._metadata = Message()
        self._metadata["Name"], self._metadata["Version"] = name, "1.0+cpu"
        self._origin = origin

    @property
    def metadata(self) -> Any:
        return self._metadata

    def read_text(self, filename: str) -> str | None:
        return json.dumps(self._origin) if filename == "direct_url.json" else None

    def locate_file(self, path: object) -> Any:
        return self._folder / str(path)


def test_the_lock_names_what_pip_can_install_and_gives_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pyproject.toml").touch()  # with an egg-info beside it, seen from there
    commit = {"vcs": "git", "commit_id": "c0ffee", "requested_revision": "main"}
    from_git = {"url": "https://me:t0ken@host/a/b.git", "vcs_info": commit, "subdirectory": "py"}
    found = [
        Installed("Zope.Interface", {}), Installed("b", from_git), Installed("pip", {}),
        Installed("mine", {"url": "file:///home/me/mine", "dir_info": {"editable": True}}),
        Installed("wheel_file", {"url": "file:///tmp/x.whl", "archive_info": {}}),
        Installed("sources", {}, tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr(metadata, "distributions", lambda: found)
    lines = provenance.requirements.__wrapped__().splitlines()
    assert lines[0].startswith("# Python 3.")
    assert lines[1:] == [
        "# mine 1.0+cpu: installed from a folder",
        "# sources 1.0+cpu: installed from a folder",
        "b @ git+https://host/a/b.git@c0ffee#subdirectory=py",
        "wheel-file==1.0+cpu",
        "zope-interface==1.0+cpu",
    ]


def test_a_run_writes_its_lock_and_says_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Workdir.open(tmp_path, Config(seed=1)).close()
    lock = tmp_path / REQUIREMENTS
    assert f"\njax=={metadata.version('jax')}\n" in lock.read_text()
    (tmp_path / "checkpoints" / "sft" / "2").mkdir(parents=True)
    write_json(tmp_path / "arms" / "sft.json", {"arm": "sft", "done": False, "cost": {},
                                                "identity": {}})  # fmt: skip
    monkeypatch.setattr("grpo_jax.infra.workdir._differences", lambda *records: [])
    lock.write_text(lock.read_text().replace("\njax==", "\njax==9"))
    Workdir.open(tmp_path, Config(seed=1)).close()
    assert "the run began with other packages: jax: was jax==9" in caplog.text
    assert "jax==9" not in lock.read_text()


def test_the_flags_of_xla_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(tmp_path / "run", whole.short_config(), 7, xla_flags="--xla_gpu_deterministic_ops=true")
    monkeypatch.setenv("XLA_FLAGS", "--other")
    begun = []

    def launch(cfg: Config, workdir: str) -> None:
        begun.append((cfg.seed, workdir, os.environ["XLA_FLAGS"]))

    monkeypatch.setattr(main, "launch", launch)
    assert repro.main([str(tmp_path / "run")]) == 1  # nothing there to compare
    assert begun == [(7, str(tmp_path / "run-again"), "--xla_gpu_deterministic_ops=true")]
    with pytest.raises(SystemExit):
        repro.main([str(tmp_path / "run"), str(tmp_path / "run")])
