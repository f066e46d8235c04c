"""A full disk and a read-only one: `python -m tests.faults.disk [--folder FOLDER]`.

A tiny run is made on a small file system in memory, which is filled up at a moment of each phase,
or turned read-only before a start. The program must end with one line that names the file and the
remedy, leave every checkpoint that it had, and, when there is room again, end with what a run on a
large disk leaves, bit for bit. Mounting takes root; without it a limit on the size of files takes
the disk's place.
"""

from __future__ import annotations

import argparse
import errno
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.faults.attempts import (
    Marks,
    differences,
    ended,
    half_visible,
    prepare,
    saved,
    start,
)

SIZE = 230  # MiB of the small disk: a run wants 200 free when it starts
LARGEST = 20_000  # bytes a file may have where files are limited: less than a checkpoint's arrays
# Phase, and at which of its beginnings the disk is full.
MOMENTS = (
    ("sft update", 2), ("save", 1), ("save", 2), ("grpo update", 1), ("row", 5), ("measure", 2),
    ("export", 2), ("report", 1), ("stage done", 1),
)  # fmt: skip


class FillingMarks(Marks):
    """Fills the disk of `folder` when a phase begins for the n-th time."""

    def __init__(self, folder: Path, phase: str, nth: int) -> None:
        super().__init__()
        self._folder, self._phase, self._left = folder, phase, nth

    def enter(self, phase: str) -> None:
        super().enter(phase)
        self._left -= phase == self._phase
        if self._left == 0:
            fill(self._folder)
            self._left = -1


def fill(folder: Path) -> None:
    """Writes a file until nothing more fits."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for size in (2**20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise


def limit_files() -> None:
    """No file of this process may become larger than LARGEST."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, resource.RLIM_INFINITY))


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of SIZE MiB at `folder`.

    Raises:
      PermissionError: this user may not mount.
    """
    folder.mkdir()
    mount(folder, f"size={SIZE}m")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(folder: Path, options: str) -> None:
    """Mounts, or with "remount,..." changes, a file system in memory."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())


class Case:
    """One fault: the run under it, then again without it."""

    def __init__(self, name: str, workdir: Path, unbroken: Path, log: Path) -> None:
        self.name, self.workdir, self.unbroken, self.log = name, workdir, unbroken, log
        self.message, self.problems = "", []

    def fails(self, marks: Marks, change: Callable[[Any], None] | None = None) -> None:
        """Runs under the fault; what goes wrong otherwise is a problem."""
        before = self._log()
        if not ended(start(self.workdir, marks, change, self.log)):
            self.problems.append("it ended well, with no room")
            return
        self.message = self._log()[len(before) :].rsplit("error: ", 1)[-1].strip()
        last = self._log()[len(before) :]
        kind = last.rsplit("\nerror: ", 1)[0].strip().splitlines()[-1].split(":")[0]
        if kind not in ("OSError", "PermissionError"):
            self.problems.append(f"it ended with {kind}")
        if str(self.workdir) not in self.message or "\n" in self.message:
            self.problems.append("the message names no file, or is not one line")

    def goes_on(self, change: Callable[[Any], None] | None = None) -> None:
        """Runs again, with room."""
        self.problems += half_visible(self.workdir, saved(self.unbroken))
        if ended(start(self.workdir, Marks(), change, self.log)):
            self.problems.append(f"it did not go on: {self._log()[-500:]}")
            return
        self.problems += differences(self.workdir, self.unbroken)

    def _log(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def limited(base: Path, unbroken: Path) -> Case:
    """Files that may not grow: every checkpoint fails, in the background."""
    case = Case("files limited", base / "limited", unbroken, base / "limited.log")
    case.fails(Marks(), lambda cfg: limit_files())
    case.goes_on()
    return case


def full(base: Path, unbroken: Path, phase: str, nth: int) -> Case:
    """The disk is full from the n-th beginning of a phase on."""
    name = f"full at {phase} {nth}"
    disk = base / name.replace(" ", "-")
    case = Case(name, disk / "run", unbroken, disk.with_suffix(".log"))
    with small_disk(disk):
        case.fails(FillingMarks(disk, phase, nth))
        (disk / "filler").unlink(missing_ok=True)
        case.goes_on()
    return case


def read_only(base: Path, unbroken: Path) -> Case:
    """A run that was stopped is started again on a disk that has become read-only."""
    disk = base / "read-only"
    case = Case("read-only", disk / "run", unbroken, disk.with_suffix(".log"))
    with small_disk(disk):
        case.fails(FillingMarks(disk, "sampling", 2))
        (disk / "filler").unlink(missing_ok=True)
        mount(disk, "remount,ro")
        case.fails(Marks())
        mount(disk, "remount,rw")
        case.goes_on()
    return case


def main() -> int:
    """The command; 1 if anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="where the runs on the large disk lie; they stay there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(args.folder or temporary).absolute()
        base.mkdir(parents=True, exist_ok=True)
        prepare(base)
        began = time.monotonic()
        unbroken = base / "unbroken"
        if ended(start(unbroken, Marks())):
            raise RuntimeError((base / "unbroken.log").read_text()[-3000:])
        cases = [limited(base, unbroken)]
        try:
            cases.append(read_only(base, unbroken))
            cases += [full(base, unbroken, *moment) for moment in MOMENTS]
        except PermissionError as error:
            print(f"no small disk ({error}): only the limit on files was tried")
        for case in cases:
            print(f"{case.name:<24}{'; '.join(case.problems) or 'as it should be'}")
            print(f"    {case.message[:300]}")
        print(f"{len(cases)} cases, {time.monotonic() - began:.0f} s", flush=True)
        return 1 if any(case.problems for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
