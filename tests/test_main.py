"""The command: bad input ends in one clear line, before any training and without a stack trace."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import grpo_jax
from grpo_jax import assets, main
from grpo_jax.config import Config
from grpo_jax.config_arms import arms_of
from grpo_jax.stages import run as run_lib
from grpo_jax.stages import sft
from tests import whole

ROOT = Path(grpo_jax.__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture
def command(base: Path, tmp_path: Path) -> Iterator[Callable[[Config], str]]:
    """What the command prints for a configuration that it must refuse before the first step."""
    log = logging.getLogger("grpo_jax")
    before = list(log.handlers), log.level, log.propagate

    def refused(cfg: Config) -> str:
        with whole.machine(base) as patch:
            patch.setattr(main, "_CONFIG", SimpleNamespace(value=cfg))
            patch.setattr(main, "_WORKDIR", SimpleNamespace(value=str(tmp_path / "run")))
            patch.setattr(sft, "run_sft", lambda *args: pytest.fail("training began"))
            with pytest.raises(SystemExit) as stop:
                main._main(["main"])
        assert not list((tmp_path / "run").glob("metrics.jsonl"))
        message = str(stop.value.code)
        assert message.startswith("error: ") and "Traceback" not in message
        return message

    yield refused
    log.handlers[:], log.level, log.propagate = before


def copy_of(base: Path, asset: str, to: Path) -> Path:
    with whole.machine(base):
        shutil.copytree(assets.resolve(f"asset:{asset}"), to)
    return to


def edit(file: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def pairs(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


# The model and the encoder


def test_missing_model(command: Callable, tmp_path: Path) -> None:
    cfg = whole.short_config()
    cfg.model.path = str(tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: no such model folder" in command(cfg)
    cfg.model.path = "asset:tiny-decodr"
    assert "did you mean asset:tiny-decoder?" in command(cfg)


def test_truncated_and_unknown_weights(command: Callable, base: Path, tmp_path: Path) -> None:
    cfg = whole.short_config()
    folder = copy_of(base, "tiny-decoder", tmp_path / "model")
    cfg.model.path = str(folder)
    edit(folder / "config.json", lambda c: c.update(num_hidden_layers=1))
    message = command(cfg)
    assert "model.layers.1.mlp.up_proj.weight" in message
    shutil.rmtree(folder)
    copy_of(base, "tiny-decoder", folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert str(file) in command(cfg)


def test_tokenizer_larger_than_the_embedding(command: Callable, base: Path, tmp_path: Path) -> None:
    cfg = whole.short_config()
    folder = copy_of(base, "tiny-decoder", tmp_path / "model")
    cfg.model.path = str(folder)
    new = {"id": 259, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    new |= {"normalized": False, "special": True}
    edit(folder / "tokenizer.json", lambda c: c["added_tokens"].append(new))
    message = command(cfg)
    assert "the tokenizer has ids up to 259, the embedding only 259 rows" in message
    assert "take the tokenizer that belongs to the model" in message


def test_encoder_of_the_wrong_width(command: Callable, base: Path, tmp_path: Path) -> None:
    cfg = whole.short_config()
    folder = copy_of(base, "tiny-encoder", tmp_path / "encoder")
    cfg.encoder.path = str(folder)
    pooling = folder / "1_Pooling" / "config.json"
    edit(pooling, lambda c: c.update(word_embedding_dimension=32))
    assert f"{pooling}: pools vectors of width 32, the transformer's are 64" in command(cfg)
    edit(pooling, lambda c: c.update(word_embedding_dimension=64))
    dense = folder / "2_Normalize" / "config.json"
    dense.write_text(json.dumps({"in_features": 128, "out_features": 32}))
    edit_modules = json.loads((folder / "modules.json").read_text())
    edit_modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(edit_modules))
    assert f"{dense}: in_features 128, but the module before gives 64" in command(cfg)


# The data


def test_data_that_cannot_be_trained_on(command: Callable, tmp_path: Path) -> None:
    rows = [{"source": f"bako {i}", "target": f"farmer {i}", "group": f"{i}"} for i in range(40)]
    cfg = whole.short_config()
    cfg.data.train = str(tmp_path / "none.jsonl")
    assert str(tmp_path / "none.jsonl") in command(cfg)
    cfg.data.train = pairs(tmp_path / "empty.jsonl", [])
    assert "empty.jsonl" in command(cfg)
    cfg.data.train = pairs(tmp_path / "bad.jsonl", [*rows, {"source": "bako", "group": "x"}])
    assert "bad.jsonl:41: field 'target'" in command(cfg)
    cfg.data.train = pairs(tmp_path / "rows.jsonl", rows)
    cfg.data.max_prompt_length = 4
    message = command(cfg)
    assert "longer than data.max_prompt_length=4" in message and "raise the limit" in message


def test_settings_that_do_not_fit(command: Callable) -> None:
    cfg = whole.short_config()
    cfg.data.target_optional = True
    assert "set reward.anchor=source or data.target_optional=False" in command(cfg)
    cfg = whole.short_config()
    cfg.mesh.data = 3
    assert "mesh.data=3" in command(cfg)
    cfg = whole.short_config()
    cfg.data.chat = True
    assert "data.chat" in command(cfg)
    cfg = whole.short_config()
    cfg.data.max_prompt_length = 500
    message = command(cfg)
    assert "data.max_prompt_length + data.max_completion_length: got 532 tokens" in message
    assert "max_position_embeddings = 512; lower it" in message


def test_rows_that_do_not_divide_over_the_devices(base: Path) -> None:
    cfg = whole.short_config()
    cfg.sft.batch_size = 6
    with whole.machine(base, devices=8), pytest.raises(ValueError, match="sft.batch_size.* of 4"):
        run_lib.open_run(cfg, SimpleNamespace(arms=arms_of(cfg)))  # type: ignore[arg-type]


# The program itself


def test_the_command_line(base: Path, tmp_path: Path) -> None:
    """A misspelled field, a wrong type, a missing file: status and one line, from the outside."""
    tiny = "--config=configs/tiny.py"
    cases = {
        (tiny, "--config.grpo.betta=0.1"): "no such field; did you mean grpo.beta",
        (tiny, "--config.grpo.beta=high"): "--config.grpo.beta: got 'high', wanted a number",
        ("--config=configs/tny.py",): "no such file; did you mean configs/tiny.py?",
        (tiny, "--config.model.path=nowhere"): "nowhere: no such model folder",
    }
    environ = os.environ | {"GRPO_JAX_CACHE": str(base / "cache")}
    children = []
    for i, flags in enumerate(cases):
        command = [sys.executable, "-m", "grpo_jax.main", *flags, f"--workdir={tmp_path / str(i)}"]
        children.append(
            subprocess.Popen(command, cwd=ROOT, env=environ, stderr=subprocess.PIPE, text=True)
        )
    try:
        for child, message in zip(children, cases.values(), strict=True):
            error = child.communicate(timeout=100)[1]
            last = error.strip().splitlines()[-1]
            assert child.returncode in (1, 2) and last.startswith("error: ") and message in last
            assert "Traceback" not in error
    finally:
        for child in children:
            child.kill()
