"""Which software and devices a run used: facts for config.json, and requirements.lock for pip."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jax

PACKAGES = (
    "grpo_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy",
)  # fmt: skip


def describe_run() -> dict[str, Any]:
    """{"versions": {package: version}, "devices": {...}, "xla_flags", "git_revision" or None}."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = {
        "backend": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }
    return {
        "versions": versions,
        "devices": devices,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_revision": _git_revision(),
    }


@functools.cache
def requirements() -> str:
    """Every installed package and its version, as `pip install -r` takes them.

    A package from a version control system stands there with its commit. One from a folder of
    this machine, as this package is where it is developed, cannot be installed elsewhere by its
    name, and is a comment.
    """
    lines: dict[str, str] = {}
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"] or "").lower()
        if name not in ("", "pip"):
            lines.setdefault(name, _requirement(name, found))  # the first one is what is imported
    head = f"# Python {platform.python_version()}; {platform.system()} {platform.machine()}"
    return "\n".join([head, *sorted(lines.values())]) + "\n"


def _requirement(name: str, found: importlib.metadata.Distribution) -> str:
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if "dir_info" in origin or _beside_its_sources(found):
        return f"# {name} {found.version}: installed from a folder"
    if "vcs_info" in origin:
        url = urlsplit(origin["url"])  # a token may stand before the host
        vcs = origin["vcs_info"]
        host = url.netloc.rpartition("@")[2]
        place = f"{url.scheme}://{host}{url.path}@{vcs['commit_id']}"
        folder = f"#subdirectory={origin['subdirectory']}" if "subdirectory" in origin else ""
        return f"{name} @ {vcs['vcs']}+{place}{folder}"
    return f"{name}=={found.version}"


def _beside_its_sources(found: importlib.metadata.Distribution) -> bool:
    """As an editable installation leaves it, seen from the folder with the package's sources."""
    folder = Path(str(found.locate_file("")))
    return any((folder / name).exists() for name in ("pyproject.toml", "setup.cfg", "setup.py"))


def package_changes(was: str, now: str) -> list[str]:
    """What differs between two texts of `requirements`, in words."""
    before, after = _packages(was), _packages(now)
    return [
        f"{name}: was {before.get(name, 'absent')}, now {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _packages(text: str) -> dict[str, str]:
    """Package -> its line."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {re.split(r"==| @ ", line)[0]: line for line in lines}


def _git_revision() -> str | None:
    """The commit of this checkout, '-dirty' behind it if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
