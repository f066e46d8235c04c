"""Files that survive a kill at any moment, and locks that several processes share.

Files are replaced whole (write, then rename), rows are appended in one write, and a torn last row
is cut off when the run comes back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

WAIT_SECONDS = 2.0  # between two looks at a lock that another process holds


class Lock:
    """A file that one process holds, or several share; the kernel lets go however they end."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def take(self, *, shared: bool = False) -> bool:
        """Takes the lock unless another process has it; False then."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s: cannot be locked (%s); start no second run here", self.path, error)
        if not shared:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        self._handle = handle
        return True

    def holder(self) -> str:
        """Who took it last, for messages."""
        try:
            return self.path.read_text(encoding="utf-8", errors="replace").strip()[:200]
        except OSError:
            return ""

    def release(self) -> None:
        """Lets go of it, if it is held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


@contextmanager
def waiting(lock: Lock, why: str) -> Iterator[None]:
    """Holds a lock, after waiting for whoever has it.

    Args:
      why: what the other does, said once in the log.
    """
    told = False
    while not lock.take():
        if not told:
            _log.info("waiting for %s, which %s", lock.holder() or "another process", why)
            told = True
        time.sleep(WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release()


def require_space(path: Path, needed: int, what: str) -> None:
    """Raises OSError unless `needed` bytes are free on the disk of `path`."""
    free = shutil.disk_usage(path).free
    if free < needed:
        raise OSError(
            f"{what}: needs {needed / 2**20:,.0f} MiB, but the disk of {path} has only "
            f"{free / 2**20:,.0f} MiB free; make room and start the same command again, it goes on "
            "from the last checkpoint"
        )


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends JSON objects, a line each, in one write. NaN and infinity raise ValueError."""
    lines = "".join(map(json_line, rows)).encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, lines) < len(lines):
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
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror}); make room on the disk and start the "
            "same command again"
        ) from None


def json_line(row: dict[str, Any]) -> str:
    """A row as a line; NaN and infinity raise ValueError."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def mend(path: Path) -> None:
    """Cuts off what a kill or a full disk left behind the last whole row."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        data = file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            _log.warning("%s: cut off a torn last row (%d bytes)", path, len(data) - end)
            file.truncate(end)
