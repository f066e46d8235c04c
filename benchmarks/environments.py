"""The peers' virtual environments: made and filled on first use, kept in the user's cache.

Versions are pinned: results name them, and a later run measures the same programs. On a machine
without an NVIDIA GPU, PyPI's torch wheel (with CUDA inside) works too; to get the smaller CPU
wheel set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
TRANSFORMERS = "transformers==5.23.0"


@dataclass(frozen=True)
class Environment:
    """What pip installs, one call a group, in this order."""

    groups: tuple[tuple[str, ...], ...]
    gpu: tuple[str, ...] = ()  # a further group where there is an NVIDIA GPU; {cuda} is 12 or 13


ENVIRONMENTS = {
    "transformers": Environment(((TORCH,), (TRANSFORMERS, "accelerate==1.15.0"))),
    "trl": Environment(
        ((TORCH,), ("trl==1.16.0", TRANSFORMERS, "accelerate==1.15.0", "datasets==5.2.0"))
    ),
    "sentence-transformers": Environment(
        ((TORCH,), ("sentence-transformers==6.2.0", TRANSFORMERS))
    ),
    "tunix": Environment(
        (
            (
                "google-tunix==0.1.7",
                "qwix==0.1.8",
                "flax==0.12.8",
                "jax==0.10.2",
                "transformers==5.12.1",
            ),
        ),
        gpu=("jax[cuda{cuda}]==0.10.2",),
    ),
}


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU with a working driver."""
    return _nvidia_smi() is not None


def python_of(peer: str, root: Path, gpu: bool) -> Path:
    """The interpreter of a peer's environment, which is made if it is not there.

    Args:
      peer: a key of ENVIRONMENTS.
      root: the folder that holds the environments.
      gpu: install what the peer needs to use an NVIDIA GPU.

    Raises:
      RuntimeError: pip could not install it; the message ends with pip's own words.
    """
    environment = ENVIRONMENTS[peer]
    groups = list(environment.groups)
    if gpu and environment.gpu:
        groups.append(tuple(name.format(cuda=_cuda()) for name in environment.gpu))
    folder = root / peer
    python = folder / "bin" / "python"
    wanted = hashlib.sha256(json.dumps([sys.version, groups]).encode()).hexdigest()
    mark = folder / "installed"
    if python.exists() and mark.exists() and mark.read_text(encoding="ascii") == wanted:
        return python
    print(f"installing {peer} into {folder} (some minutes, once)", file=sys.stderr, flush=True)
    root.mkdir(parents=True, exist_ok=True)
    _call(peer, [sys.executable, "-m", "venv", "--clear", str(folder)], root)
    for group in groups:
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *group]
        _call(peer, pip, root)
    mark.write_text(wanted, encoding="ascii")
    return python


def _call(peer: str, command: list[str], root: Path) -> None:
    log = root / f"{peer}.log"
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(f"{peer}: {' '.join(command)} failed; {log} ends with\n{tail}")


def _cuda() -> int:
    """The newest CUDA that the driver can run, of those that jax has wheels for."""
    found = re.search(r"CUDA Version:\s*(\d+)", _nvidia_smi() or "")
    return 12 if found and int(found.group(1)) < 13 else 13


def _nvidia_smi() -> str | None:
    try:
        out = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout if out.returncode == 0 else None
