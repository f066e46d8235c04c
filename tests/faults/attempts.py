"""Attempts at a tiny run in forked children, and what two runs have left, compared.

Each attempt is a fork of this program, which has imported everything and touched no device yet, so
that a start costs a second and not ten. For harnesses of their own processes: a program that uses
jax must not fork.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = (
    "start", "load", "sft update", "sampling", "scoring", "grpo update", "save", "row",
    "arm record", "measure", "export", "report", "stage done",
)  # fmt: skip
LONGEST = 900.0  # seconds that an attempt may take


class Marks:
    """Memory that parent and child share: the phase the child is in, and how often each began."""

    _FORM = struct.Struct(f"<{1 + len(PHASES)}I")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._FORM.size)
        self.times: list[tuple[str, float]] = []  # the child's own

    def enter(self, phase: str) -> None:
        now, *counts = self._FORM.unpack(self._memory[:])
        now = PHASES.index(phase)
        counts[now] += 1
        self._memory[:] = self._FORM.pack(now, *counts)
        self.times.append((phase, time.monotonic()))

    def read(self) -> tuple[str, dict[str, int]]:
        now, *counts = self._FORM.unpack(self._memory[:])
        return PHASES[now], dict(zip(PHASES, counts, strict=True))

    def clear(self) -> None:
        self._memory[:] = bytes(self._FORM.size)


def _mark_phases(marks: Marks) -> None:
    """Makes the program say where it is; what it computes stays as it is."""
    from grpo_jax import hub
    from grpo_jax.infra import checkpoint, workdir
    from grpo_jax.rewards import scorer
    from grpo_jax.stages import evaluate, programs, run, sft

    def call(owner: Any, name: str, phase: str, after: bool = False) -> None:
        original = getattr(owner, name)

        def marked(*args: Any, **kwargs: Any) -> Any:
            if after:
                out = original(*args, **kwargs)
                marks.enter(phase)
                return out
            marks.enter(phase)
            return original(*args, **kwargs)

        setattr(owner, name, marked)

    def built(owner: Any, name: str, phase: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def build(*args: Any, **kwargs: Any) -> Callable[..., Any]:
            function = original(*args, **kwargs)

            def marked(*a: Any, **k: Any) -> Any:
                marks.enter(phase)
                return function(*a, **k)

            return marked

        setattr(owner, name, build)

    call(run, "open_run", "load")
    built(sft, "build_update", "sft update")
    built(programs, "build_sampler", "sampling")
    built(programs, "build_update", "grpo update")
    call(scorer.Scorer, "score", "scoring")
    call(checkpoint.Checkpoints, "save", "save", after=True)  # from here on it is being written
    call(workdir.Workdir, "append", "row")
    call(workdir.Workdir, "note_arm", "arm record")
    call(workdir.Workdir, "mark_done", "stage done")
    call(evaluate, "_measure", "measure")
    call(hub, "save_decoder", "export")
    call(evaluate.report_lib, "write", "report")


def start(
    workdir: Path,
    marks: Marks,
    change: Callable[[Any], None] | None = None,
    log: Path | None = None,
) -> int:
    """Forks a child that runs `short_run` in `workdir`; its process id. Status 0, or 1 and a log.

    Args:
      change: what the child does last before the run, with its configuration.
      log: the file that takes what it prints; WORKDIR.log.
    """
    log = log or workdir.with_suffix(".log")
    marks.clear()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr, force=True)
        marks.enter("start")
        from grpo_jax import main
        from tests.faults import short_run

        _mark_phases(marks)
        cfg = short_run.get_config()
        if change:
            change(cfg)
        main.train(cfg, str(workdir))
        log.with_suffix(".times").write_text(json.dumps(marks.times))
        status = 0
    except BaseException as error:
        traceback.print_exc()
        print(f"error: {error}", flush=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int, seconds: float = LONGEST) -> int:
    """The child's status; it is killed, and TimeoutError raised, after too long a time."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if status := status_of(child):
            return status[0]
        time.sleep(0.002)
    kill(child)
    raise TimeoutError(f"an attempt took longer than {seconds:.0f} s")


def status_of(child: int) -> tuple[int] | None:
    done, status = os.waitpid(child, os.WNOHANG)
    return (os.waitstatus_to_exitcode(status),) if done else None


def kill(child: int) -> None:
    """kill -9, and waits until it is gone."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def prepare(base: Path) -> None:
    """Settings and imports of the forks to come: small compilations, kept below `base`."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["GRPO_JAX_CACHE"] = str(base / "cache")
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"  # also where the tests do without
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(base / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )
    import tensorboardX  # noqa: F401

    from grpo_jax import main  # noqa: F401
    from grpo_jax.stages import evaluate, export, grpo, self_sft, sft  # noqa: F401
    from tests.faults import short_run  # noqa: F401


def saved(folder: Path) -> dict[str, Any]:
    """What `repro.checkpoints` says of a folder, if each has its arrays too; else ValueError."""
    from grpo_jax.repro import checkpoints

    for path in sorted(folder.glob("checkpoints/*/*")):
        if path.name.isdecimal() and not (path / "state" / "manifest.ocdbt").is_file():
            raise ValueError(f"{path}: no arrays")
    return checkpoints(folder)


def differences(folder: Path, unbroken: Path) -> list[str]:
    """What a finished run left that the unbroken one did not, and the other way round."""
    from grpo_jax.repro import compare

    found = compare(unbroken, folder).differences
    page = folder / "report.html"  # also of a run that is not evaluated
    if not page.is_file() or "</html>" not in page.read_text(encoding="utf-8"):
        found.append("report.html is not whole")
    return found + [f"{path.name} was set aside" for path in folder.glob("checkpoints/*/damaged-*")]


def half_visible(folder: Path, unbroken: dict[str, Any]) -> list[str]:
    """What a kill left that looks whole and is not."""
    found = []
    try:
        found += [
            f"checkpoint {name} has other sums"
            for name, said in saved(folder).items()
            if name in unbroken and said != unbroken[name]
        ]
    except (OSError, ValueError, KeyError) as error:
        found.append(f"a checkpoint: {error}")
    for path in folder.rglob("*.json"):
        if "orbax-checkpoint-tmp" in str(path) or _hidden(path, folder):
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            found.append(str(path.relative_to(folder)))
    return found + [f"{path.name} was set aside" for path in folder.glob("checkpoints/*/damaged-*")]


def _hidden(path: Path, folder: Path) -> bool:
    """Whether a file, or a folder that it is in, begins with a dot, as what is unfinished does."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def leftovers(folder: Path) -> list[str]:
    """What was in the middle of being written."""
    found = []
    if list(folder.glob("checkpoints/*/*.orbax-checkpoint-tmp*")):
        found.append("checkpoint")
    if any(path.is_file() for path in folder.rglob(".*.tmp")):
        found.append("file")
    if list(folder.glob("export/.*")):
        found.append("export")
    for name in ("metrics.jsonl", "samples.jsonl"):
        path = folder / name
        if path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b"\n":
            found.append("row")
    return found
