"""The rooms: imports point one way, and files stay readable in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "grpo_jax"
# A room may import its own files and any room before it; BUILD.md draws the same order.
ROOMS = (
    "structs", "config", "config_dicts", "config_arms", "config_values", "config_check", "flags",
    "experiments", "assets", "text", "models", "rollout", "data", "hub", "rewards", "learn",
    "evals", "report", "infra", "plan", "stages", "replay", "main",
    "repro",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    return module.split(".")[1]


def imports(file: Path) -> set[str]:
    """Modules of this package that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "grpo_jax":
            found |= {f"grpo_jax.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return {name for name in found if name.startswith("grpo_jax.")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_downwards(file: Path) -> None:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("__init__",):
        assert not imports(file)
        return
    here = ROOMS.index(parts[0])
    upwards = {name for name in imports(file) if ROOMS.index(room(name)) > here}
    assert not upwards, f"{'/'.join(parts)} imports {upwards}, rooms above its own"


def test_every_file_can_be_read_in_one_sitting() -> None:
    long = {f.name: n for f in FILES if (n := len(f.read_text("utf-8").splitlines())) > 360}
    assert not long
