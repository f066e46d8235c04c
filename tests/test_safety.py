"""What no file may make the program do: run code, leave its folder, give away secrets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from golden import make_hub

from grpo_jax import config, hub
from grpo_jax.hub.folder import find_folder
from grpo_jax.infra.workdir import Workdir

PACKAGE = Path(hub.__file__).parents[1]
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "yaml.load",
    "subprocess.getoutput", "subprocess.getstatusoutput",
}  # fmt: skip


def faults(tree: ast.AST) -> list[str]:
    """Calls and imports that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found += [f"import {name}" for name in names if name.split(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        if (name := ast.unparse(node.func)) in CALLS:
            found.append(name)
        for keyword in node.keywords:
            refused = keyword.arg in ("shell", "allow_pickle", "trust_remote_code")
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if refused and not off:
                found.append(f"{name}({keyword.arg}=...)")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_runs_what_data_says(file: Path) -> None:
    assert not faults(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from torch import load", "eval(x)", "np.load(f, allow_pickle=True)",
     "subprocess.run(c, shell=True)", "f(trust_remote_code=flag)", "yaml.load(f)"],
)  # fmt: skip
def test_the_check_finds_what_it_looks_for(code: str) -> None:
    assert len(faults(ast.parse(code))) == 1


def test_a_model_folder_may_not_borrow_files_of_this_machine(
    llama_folder: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("key")
    (llama_folder / "merges.txt").symlink_to(secret)  # an export would copy it
    with pytest.raises(ValueError, match="merges.txt: a link out of the model folder"):
        hub.load_decoder(llama_folder)


def test_a_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    make_hub.write_decoder(tmp_path / "plain", "llama")
    cache = tmp_path / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/1").mkdir(parents=True)
    for file in (tmp_path / "plain").iterdir():
        file.rename(cache / "blobs" / file.name)
        (cache / "snapshots/1" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert find_folder(cache / "snapshots/1") == cache / "snapshots/1"
    assert hub.open_decoder(cache / "snapshots/1").config.vocab_size == make_hub.VOCAB


def test_secrets_of_the_environment_stay_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "WANDB_API_KEY", "MY_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, "s3cret-value-of-" + name)
    Workdir.open(tmp_path / "run", config.Config()).close()
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "config.json" for file in files)
    assert not [file for file in files if b"s3cret-value" in file.read_bytes()]
    assert "s3cret-value" not in caplog.text
