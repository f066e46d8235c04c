"""The user's cache: one folder an asset, complete or not there.

A build fills a folder of its own under a file lock and is renamed at the end, so neither an
interruption nor a second process leaves half an asset. asset.json lists every file with its size;
a folder that no longer agrees with it is built again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo_jax.assets.catalogue import Asset
from grpo_jax.assets.fetch import say

_MANIFEST = "asset.json"


def cache_folder() -> Path:
    """$GRPO_JAX_CACHE, else $XDG_CACHE_HOME/grpo_jax, else ~/.cache/grpo_jax."""
    if chosen := os.environ.get("GRPO_JAX_CACHE"):
        return Path(chosen).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).expanduser().resolve() / "grpo_jax"


def obtain(name: str, asset: Asset) -> Path:
    """The asset's folder in the cache; fetched, converted or built the first time.

    Raises:
      FileNotFoundError: a package cannot be had.
      ValueError: a package holds something else than expected.
      OSError: the cache cannot be written, or the disk is full.
    """
    cache = cache_folder()
    folder = cache / "assets" / f"{name}-v{asset.version}"
    if _intact(folder):  # needs no write access: a shared cache may be read-only
        return folder
    try:
        with _lock(cache / "locks" / f"{name}.lock", name):
            if not _intact(folder):
                _build(name, asset, cache, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            trouble = f"its disk is full; free {asset.disk} MB or set GRPO_JAX_CACHE to a folder"
            trouble += " on another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            trouble = "it cannot be written; set GRPO_JAX_CACHE to a folder of yours"
        else:
            raise
        raise OSError(error.errno, f"asset {name}, cache {cache}: {trouble} ({error})") from error
    return folder


def _build(name: str, asset: Asset, cache: Path, folder: Path) -> None:
    if folder.exists():
        say(f"{name}: files in {folder} are missing or cut short; building it again")
        shutil.rmtree(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    downloads = cache / "downloads" / name
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed
    partial.mkdir(parents=True)
    free = shutil.disk_usage(cache).free // 1_000_000
    if free < asset.disk:
        raise OSError(errno.ENOSPC, f"{free} MB free, {asset.disk} MB needed")
    started = time.monotonic()
    say(f"{name}: {asset.about} ({asset.origin}; {asset.licence})")
    try:
        asset.build(partial, downloads)
        files = {
            path.relative_to(partial).as_posix(): path.stat().st_size
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        about = {"asset": name, "version": asset.version, "origin": asset.origin}
        about |= {"licence": asset.licence}
        content = json.dumps({**about, "files": files}, indent=1)
        (partial / _MANIFEST).write_text(content + "\n", encoding="utf-8")
        for path in partial.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    size = sum(files.values()) / 1e6
    say(f"{name}: done, {size:.1f} MB in {time.monotonic() - started:.0f} s, {folder}")


def _intact(folder: Path) -> bool:
    """Whether every file in the folder's manifest is there with its size."""
    try:
        files = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError):
        return False


@contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """Holds an exclusive lock, which the system releases when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another process is building it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
