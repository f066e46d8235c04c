"""The working directory: what a run leaves, and how an interrupted run finds its place again.

Everything here survives a kill at any moment: files are replaced whole (write, then rename), rows
are appended in one write, a torn last row is cut off when the run comes back. Only the main
process writes; the others wait for it in `open`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.config import STAGES, TRAINING, Config
from grpo_jax.config_dicts import fingerprint, flatten, identity, stage_fields, to_dict
from grpo_jax.infra import distributed
from grpo_jax.infra.provenance import describe_run

_log = logging.getLogger(__name__)

RESULTS = ("checkpoints", "evaluation", "metrics.jsonl")  # what makes a folder belong to its run
REFUSED = -1  # in place of a seed
MIN_FREE_BYTES = 200 * 2**20  # less than this at the start and the run will not get far


class Workdir:
    """WORKDIR of a run; make it with `open`. Holds a lock until `close` or the process's end."""

    def __init__(self, path: Path, seed: int, values: dict[str, Any], lock: int | None):
        self.path = path
        self.seed = seed  # the config's, or the one drawn when the run began
        self._values = values
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], cfg: Config) -> Workdir:
        """Creates the folder, or takes up the run that is in it.

        Raises:
          ValueError: the folder holds results of another configuration, or another run uses it.
          OSError: it cannot be written, or the disk is nearly full.
        """
        folder = Path(path).expanduser().absolute()
        lock, seed, error = None, REFUSED, None
        if distributed.is_main():
            try:
                _check_disk(folder)
                lock = _take_lock(folder)
                seed = _enter(folder, cfg)
            except (OSError, ValueError) as reason:
                error = reason
        if jax.process_count() > 1:  # also when it failed, or the others would wait for ever
            from jax.experimental import multihost_utils

            seed = int(multihost_utils.broadcast_one_to_all(np.int32(seed)))
        if seed == REFUSED:
            if lock is not None:
                os.close(lock)
            raise error or ValueError(f"workdir {folder}: refused; see the first process's message")
        return cls(folder, seed, to_dict(cfg), lock)

    @property
    def config(self) -> Path:
        """The resolved config, versions, devices, git revision and seed."""
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def close(self) -> None:
        """Lets another process use the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage_done(self, stage: str) -> dict[str, Any] | None:
        """What `mark_done` was told when the stage finished, or None if it has to run.

        A finished stage has to run again when an earlier one was added since, an evaluation or
        export also when its own part of the config has changed.
        """
        record = read_json(self._marker(stage))
        if record is None or record["inputs"] != self._inputs(stage):
            return None
        return record["info"]

    def mark_done(self, stage: str, info: dict[str, Any] | None = None) -> None:
        """Records that the stage has finished, with what later stages want to know of it."""
        if distributed.is_main():
            record = {"stage": stage, "inputs": self._inputs(stage), "info": info or {}}
            write_json(self._marker(stage), record)
        if jax.process_count() > 1:  # all are to agree on what has been done
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"{stage} is done")

    def rewind(self, stage: str, first: int) -> None:
        """Drops the metric and sample rows that a resumed run will write again.

        Those are the rows of `stage` from step `first` on, the first step that the resumed loop
        runs, and all rows of later stages. Call it before the loop, also when `first` is 0.
        """
        if not distributed.is_main():
            return
        later = STAGES[STAGES.index(stage) + 1 :]
        for path in (self.metrics, self.samples):
            rows = read_jsonl(path)
            keep = [
                row
                for row in rows
                if row["stage"] not in later
                and not (row["stage"] == stage and row["step"] >= first)
            ]
            if len(keep) < len(rows):
                write_text(path, "".join(_line(row) for row in keep))

    def _marker(self, stage: str) -> Path:
        return self.path / "done" / f"{stage}.json"

    def _inputs(self, stage: str) -> dict[str, Any]:
        earlier = STAGES[: STAGES.index(stage)]
        after = [s for s in TRAINING if s in earlier and self._marker(s).exists()]
        return {"after": after} | stage_fields(self._values, stage)


def require_space(path: Path, needed: int, what: str) -> None:
    """Raises OSError unless `needed` bytes are free on the disk of `path`."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(
            f"{what}: needs {needed / 2**20:,.0f} MiB, but the disk of {path} has only "
            f"{free / 2**20:,.0f} MiB free; make room and start the same command again, it goes on "
            "from the last checkpoint"
        )


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Appends one JSON object as a line, in one write. NaN and infinity raise ValueError."""
    line = _line(row).encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, line) < len(line):
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror}); make room on the disk and start the "
            "same command again"
        ) from None
    finally:
        os.close(handle)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `append_jsonl` wrote; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file whole; creates its folder."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces a file whole: readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _check_disk(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"workdir {folder}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    require_space(folder, MIN_FREE_BYTES, "a run")


def _take_lock(folder: Path) -> int:
    """The open lock file's descriptor. The kernel lets go of the lock however the process ends."""
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        raise ValueError(
            f"workdir {folder}: in use by {holder}; wait for that run, stop it, or choose another "
            "--workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("workdir %s: cannot be locked (%s); start no second run in it", folder, error)
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock


def _enter(folder: Path, cfg: Config) -> int:
    """Compares with the run that is there, writes config.json, mends torn rows; the seed."""
    values = to_dict(cfg)
    stages = [s for s in cfg.stages if s in TRAINING]
    try:
        old = read_json(folder / "config.json")
        old_values, old_seed = (old["config"], old["seed"]) if old else (values, cfg.seed)
        old_stages = old["training_stages"] if old else stages
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"workdir {folder}: its config.json is not one of this program's; choose another "
            "--workdir"
        ) from None
    # A training stage that is only now added brings its own settings.
    ahead = tuple(f"{stage}." for stage in TRAINING if stage not in old_stages)
    different = [d for d in _differences(old_values, values) if not d.startswith(ahead)]
    if cfg.seed not in (None, old_seed):
        different.append(f"seed: was {old_seed}, now {cfg.seed}")
    common = min(len(stages), len(old_stages))
    if stages[:common] != old_stages[:common]:
        different.append(f"stages: was {', '.join(old_stages)}, now {', '.join(stages)}")
    if different and not any((folder / name).exists() for name in RESULTS):
        old, old_seed, old_stages, different = None, cfg.seed, stages, []  # it never got anywhere
    if different:
        raise ValueError(
            f"workdir {folder}: belongs to a run with another configuration; choose another "
            "--workdir, or set these fields back to go on with that run:\n  "
            + "\n  ".join(different)
        )
    seed = secrets.randbelow(2**31) if old_seed is None else old_seed
    record = {
        "config": values,
        "seed": seed,
        "fingerprint": fingerprint(cfg),
        "training_stages": max(stages, old_stages, key=len),
        "started": old["started"] if old else time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_json(folder / "config.json", record | describe_run())
    for name in ("metrics.jsonl", "samples.jsonl"):
        _mend(folder / name)
    return seed


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Identity fields in which two configs differ; a field that one lacks has its default there."""
    default = flatten(to_dict(Config()))
    was, now = identity(old), identity(new)
    lines = []
    for name in sorted(was.keys() | now.keys()):
        before = was.get(name, default.get(name))
        after = now.get(name, default.get(name))
        if before != after:
            lines.append(f"{name}: was {before!r}, now {after!r}")
    return lines


def _mend(path: Path) -> None:
    """Cuts off what a kill or a full disk left behind the last whole row."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            _log.warning("%s: cut off a torn last row (%d bytes)", path, len(data) - end)
            file.truncate(end)
