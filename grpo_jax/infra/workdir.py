"""The working directory: what a run leaves, and how an interrupted run finds its place again.

Each arm has a record, arms/NAME.json, of what decides its weights: a folder is taken up again as
long as the arms that are there would be trained the same way, and arms may be added. Several
programs may work in one folder at one time on arms of their own (`only`). Only the main process
writes; the others wait for it in `open`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.config import Arm, Config, Mesh
from grpo_jax.config_arms import arm_identity, arms_of
from grpo_jax.config_dicts import fingerprint, flatten, stage_fields, to_dict
from grpo_jax.infra import distributed
from grpo_jax.infra.files import (
    Lock,
    append_jsonl,
    json_line,
    mend,
    read_json,
    read_jsonl,
    require_space,
    waiting,
    write_json,
    write_text,
)
from grpo_jax.infra.provenance import describe_run, package_changes, requirements
from grpo_jax.text.strict import listed

_log = logging.getLogger(__name__)

REFUSED = -1  # in place of a seed
REQUIREMENTS = "requirements.lock"  # the packages that a run has used, for pip
MIN_FREE_BYTES = 200 * 2**20  # less than this at the start and the run will not get far


class Workdir:
    """WORKDIR of a run; make it with `open`. Holds its locks until `close` or the process's end."""

    def __init__(self, path: Path, cfg: Config, seed: int, locks: list[Lock]):
        self.path = path
        self.seed = seed  # the config's, or the one drawn when the run began
        self.arms: dict[str, Arm] = _arms(path, cfg)  # in their order, the base left out
        self._cfg = cfg
        self._locks = locks

    @classmethod
    def open(cls, path: str | os.PathLike[str], cfg: Config) -> Workdir:
        """Creates the folder, or takes up the run that is in it.

        Raises:
          ValueError: the folder holds arms of another configuration, or another run works on them.
          OSError: it cannot be written, or the disk is nearly full.
        """
        folder = Path(path).expanduser().absolute()
        locks: list[Lock] = []
        seed, error = REFUSED, None
        if distributed.is_main():
            try:
                _check_disk(folder)
                _take_locks(folder, cfg, locks)
                seed = _enter(folder, cfg)
            except (OSError, ValueError) as reason:
                error = reason
        if jax.process_count() > 1:  # also when it failed, or the others would wait for ever
            from jax.experimental import multihost_utils

            seed = int(multihost_utils.broadcast_one_to_all(np.int32(seed)))
        if seed == REFUSED:
            for lock in locks:
                lock.release()
            raise error or ValueError(f"workdir {folder}: refused; see the first process's message")
        return cls(folder, cfg, seed, locks)

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
    def profile(self) -> Path:
        return self.path / "profile"

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
        """Lets other processes use the folder."""
        for lock in self._locks:
            lock.release()
        self._locks.clear()

    def note_mesh(self, mesh: Mesh, reason: str) -> None:
        """Adds the mesh of this start of the run to config.json; another start may have another."""
        if distributed.is_main():
            with waiting(_row_lock(self.path), "writes rows"):
                record = read_json(self.config) or {}
                write_json(self.config, record | {"mesh": to_dict(mesh) | {"reason": reason}})

    # Arms

    def arm_done(self, name: str) -> dict[str, Any] | None:
        """What `finish_arm` was told, or None if the arm has still to be trained."""
        record = read_json(_record(self.path, name))
        return record["cost"] if record is not None and record["done"] else None

    def arm_cost(self, name: str) -> dict[str, Any]:
        """What an arm has cost so far; {} before it began."""
        record = read_json(_record(self.path, name))
        return record["cost"] if record is not None else {}

    def note_arm(self, name: str, cost: dict[str, Any], done: bool = False) -> None:
        """Records an arm, what its training has cost so far, and whether it is finished."""
        if distributed.is_main():
            identity = arm_identity(self._cfg, self.arms[name])
            record = {"arm": name, "done": done, "cost": cost, "identity": identity}
            write_json(_record(self.path, name), record)
        if done:  # all are to agree on what has been done
            distributed.barrier(f"{name} is done")

    def wait_for(self, name: str) -> None:
        """Returns when an arm is finished that another program may be working on.

        Raises:
          ValueError: it is not finished, and nobody works on it.
        """
        refused = False
        if distributed.is_main() and self.arm_done(name) is None:
            lock = _arm_lock(self.path, name)
            with waiting(lock, f"works on {name}"):
                refused = self.arm_done(name) is None
        if distributed.agreed(refused):
            raise ValueError(
                f"workdir {self.path}: {name} is not finished, and nobody works on it; run it "
                f"first, --config.only={name}, or leave `only` out"
            )

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Holds what programs that share the folder do one at a time, such as measuring base."""
        lock = _arm_lock(self.path, name)
        with waiting(lock, f"works on {name}") if distributed.is_main() else nullcontext():
            distributed.barrier(f"{name} begins")
            yield
            distributed.barrier(f"{name} ends")

    # Stages behind the training

    def stage_done(self, stage: str) -> bool:
        """Whether a stage behind the training has run for all arms that are finished now.

        It has to run again when its own part of the config has changed.
        """
        record = read_json(self.path / "done" / f"{stage}.json")
        return record is not None and record["inputs"] == self._inputs(stage)

    def mark_done(self, stage: str) -> None:
        """Records that the stage has finished."""
        if distributed.is_main():
            record = {"stage": stage, "inputs": self._inputs(stage)}
            write_json(self.path / "done" / f"{stage}.json", record)
        distributed.barrier(f"{stage} is done")

    def _inputs(self, stage: str) -> dict[str, Any]:
        done = [name for name in self.arms if self.arm_done(name) is not None]
        return {"after": done, **stage_fields(to_dict(self._cfg), stage)}

    # Rows

    def append(self, path: Path, rows: list[dict[str, Any]]) -> None:
        """Appends rows to metrics.jsonl or samples.jsonl, which several programs may write."""
        with waiting(_row_lock(self.path), "writes rows"):
            append_jsonl(path, rows)

    def rewind(self, arm: str, first: int) -> None:
        """Drops the rows of an arm from step `first` on, which a resumed run will write again."""
        if not distributed.is_main():
            return
        with waiting(_row_lock(self.path), "writes rows"):
            for path in (self.metrics, self.samples):
                rows = read_jsonl(path)
                keep = [row for row in rows if row["stage"] != arm or row["step"] < first]
                if len(keep) < len(rows):
                    write_text(path, "".join(json_line(row) for row in keep))


def _record(folder: Path, name: str) -> Path:
    return folder / "arms" / f"{name}.json"


def _arm_lock(folder: Path, name: str) -> Lock:
    return Lock(folder / "arms" / f".{name}.lock")


def _row_lock(folder: Path) -> Lock:
    return Lock(folder / ".rows.lock")


def _arms(folder: Path, cfg: Config) -> dict[str, Arm]:
    def done(name: str) -> bool:
        record = read_json(_record(folder, name))
        return record is not None and record["done"]

    return arms_of(cfg, done)


def _check_disk(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"workdir {folder}: cannot be written ({error.strerror}); choose another --workdir"
        ) from None
    require_space(folder, MIN_FREE_BYTES, "a run")


def _take_locks(folder: Path, cfg: Config, locks: list[Lock]) -> None:
    """The whole folder, or with `only` a share of it and these arms; what was taken is in `locks`.

    Raises:
      ValueError: another process has one of them.
    """
    everything = Lock(folder / ".lock")
    wanted = [(everything, bool(cfg.only), "it")]
    wanted += [(_arm_lock(folder, name), False, name) for name in cfg.only]
    for lock, shared, what in wanted:
        if not lock.take(shared=shared):
            holder = lock.holder() or "another process"
            raise ValueError(
                f"workdir {folder}: {what} is in use by {holder}; wait for that run, stop it, or "
                "choose another --workdir. Runs share one when each is given arms (`only`) of its "
                "own"
            )
        locks.append(lock)


def _enter(folder: Path, cfg: Config) -> int:
    """Compares with the arms that are there, writes config.json, mends torn rows; the seed."""
    try:
        old = read_json(folder / "config.json") or {}
        old_seed, started = (old["seed"], old["started"]) if old else (cfg.seed, None)
        arms = _arms(folder, cfg)
        different = []
        for name, arm in arms.items():
            record = read_json(_record(folder, name))
            if record is not None and (record["done"] or _has_checkpoints(folder, name)):
                different += _differences(record["identity"], arm_identity(cfg, arm), name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"workdir {folder}: its config.json or arms/ are not this program's; choose another "
            "--workdir"
        ) from None
    begun = any(_has_checkpoints(folder, path.stem) for path in folder.glob("arms/*.json"))
    if begun and cfg.seed not in (None, old_seed):
        different.append(f"seed: was {old_seed}, now {cfg.seed}")
    if different:
        raise ValueError(
            f"workdir {folder}: belongs to a run with another configuration; choose another "
            "--workdir, or set these fields back to go on with that run:\n  "
            + "\n  ".join(dict.fromkeys(different))
        )
    seed = old_seed if begun or cfg.seed is None else cfg.seed
    seed = secrets.randbelow(2**31) if seed is None else seed
    record = {
        "config": to_dict(cfg),
        "arms": [to_dict(arm) for arm in arms.values()],
        "seed": seed,
        "fingerprint": fingerprint(cfg),
        "started": started or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    packages = folder / REQUIREMENTS
    known = packages.read_text(encoding="utf-8") if begun and packages.exists() else ""
    if known and (changes := package_changes(known, requirements())):
        _log.warning("the run began with other packages: %s", listed(changes, 5))
    with waiting(_row_lock(folder), "writes rows"):
        write_json(folder / "config.json", record | describe_run())
        write_text(packages, requirements())
        for file in ("metrics.jsonl", "samples.jsonl"):
            mend(folder / file)
    return seed


def _has_checkpoints(folder: Path, name: str) -> bool:
    return any(path.name.isdigit() for path in (folder / "checkpoints" / name).glob("*"))


def _differences(was: dict[str, Any], now: dict[str, Any], name: str) -> list[str]:
    """Fields in which an arm's record differs; one that a record lacks had its default then."""
    default = flatten(to_dict(Config()))
    lines = []
    for field in sorted(was.keys() | now.keys()):
        before, after = was.get(field, default.get(field)), now.get(field, default.get(field))
        if before != after:
            at = field if "." in field else f"{name}'s {field}"
            lines.append(f"{at}: was {before!r}, now {after!r}")
    return lines
