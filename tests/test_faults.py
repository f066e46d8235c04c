"""A seeded sample of the faults that the harnesses of tests/faults make by the hundred."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpo_jax import main
from tests.faults import attempts, soak

ROOT = Path(__file__).parents[1]


def test_killed_runs_end_as_the_unbroken_one_and_full_disks_are_named() -> None:
    command = [sys.executable, "-m", "tests.faults.sample", "--kills=3", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "together           3" in lines
    equal = "unbroken bit for bit: 8 rows of metrics.jsonl, 16 rows of samples.jsonl, 4 checkpoints"
    assert [line for line in lines if equal in line]  # and the exported files
    assert "runs that differ from the unbroken one, or half-visible files: 0" in lines
    assert [line for line in lines if re.fullmatch(r"secrets in \d{2,} files: none", line)]
    assert "files limited: as it should be" in lines
    assert "If the disk is full make room; the same command goes on" in lines[-1]


# The harness itself: what it must not overlook


@pytest.fixture
def left(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two equal working directories, as small as they can be."""
    one = tmp_path / "one"
    (one / "checkpoints" / "sft" / "2" / "state").mkdir(parents=True)
    (one / "checkpoints" / "sft" / "2" / "state" / "manifest.ocdbt").touch()
    said = {"custom_metadata": {"aux": {}, "leaves": {"step": ["int32", [], 2]}}}
    (one / "checkpoints" / "sft" / "2" / "_CHECKPOINT_METADATA").write_text(json.dumps(said))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (one / name).write_text('{"stage": "sft", "step": 1, "loss": 2.0, "step_time": 3.0}\n')
    (one / "evaluation").mkdir()
    (one / "evaluation" / "sft.json").write_text('{"arm": "sft", "bleu": 1.0, "seconds": 3.0}')
    (one / "export" / "sft").mkdir(parents=True)
    (one / "export" / "sft" / "model.safetensors").write_bytes(b"weights")
    (one / "report.html").write_text("<html></html>")
    shutil.copytree(one, tmp_path / "two")
    yield one, tmp_path / "two"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("metrics.jsonl", '{"stage": "sft", "step": 1, "loss": 2.5}\n',
         "metrics.jsonl sft step 1: loss was 2.0, now 2.5"),
        ("samples.jsonl", "", "samples.jsonl sft step 1: only in the first run"),
        ("evaluation/sft.json", '{"arm": "sft", "bleu": 2.0}',
         "evaluation sft: bleu was 1.0, now 2.0"),
        ("evaluation/base.json", "{}", "evaluation base: only in the repeated run"),
        ("export/sft/model.safetensors", "weighty",
         "export/sft/model.safetensors: differs from byte 6 on"),
        ("report.html", "<html>", "report.html is not whole"),
        ("checkpoints/sft/2/_CHECKPOINT_METADATA",
         '{"custom_metadata": {"aux": {}, "leaves": {"step": ["int32", [], 3]}}}',
         "checkpoint sft/2: leaves.step was ['int32', [], 2], now ['int32', [], 3]"),
    ],
)  # fmt: skip
def test_the_harness_sees_what_differs(
    left: tuple[Path, Path], file: str, text: str, said: str
) -> None:
    one, two = left
    assert attempts.differences(one, two) == []
    (one / "metrics.jsonl").write_text(
        (two / "metrics.jsonl").read_text().replace('"step_time": 3.0', '"step_time": 4.0')
    )
    assert attempts.differences(one, two) == []  # times may differ
    (one / file).write_text(text)
    assert attempts.differences(one, two) == [said]


def test_the_harness_sees_what_is_half_visible(left: tuple[Path, Path]) -> None:
    one, two = left
    known = attempts.saved(two)
    assert attempts.half_visible(one, known) == [] and attempts.leftovers(one) == []
    (one / "evaluation" / "sft.json").write_text('{"arm": ')
    (one / "checkpoints" / "sft" / "2" / "state" / "manifest.ocdbt").unlink()
    (one / "checkpoints" / "sft" / "damaged-4").mkdir()
    found = attempts.half_visible(one, known)
    assert [words.split(":")[0] for words in found] == [
        "a checkpoint", "evaluation/sft.json", "damaged-4 was set aside",
    ]  # fmt: skip
    (one / "checkpoints" / "sft" / "4.orbax-checkpoint-tmp-1").mkdir()
    (one / "metrics.jsonl").write_text('{"stage": ')
    (one / "export" / ".sft.tmp").mkdir()
    (one / "export" / ".sft.tmp" / "config.json").write_text('{"half')
    assert attempts.leftovers(one) == ["checkpoint", "export", "row"]
    assert attempts.half_visible(one, known) == found


def test_the_soak_sees_what_grows() -> None:
    flat = [soak.Seen("sft", step, 500.0, 90, 40, 30, 20, 21, 1.0) for step in range(1, 101)]
    assert soak.judged(flat) == []
    rising = [s._replace(megabytes=500 + s.step, files=30 + s.step // 50) for s in flat]
    assert soak.judged(rising) == [
        "sft: megabytes grew from 540 to 600",
        "sft: files grew from 30 to 32",
    ]
    pool = [s._replace(tasks=21 + (s.step > 50) * 2) for s in flat]
    assert soak.judged(pool) == []
    leaking = [s._replace(threads=20 + s.step // 50, tasks=21 + s.step // 10) for s in flat]
    assert [line.split()[1] for line in soak.judged(leaking)] == ["threads", "tasks"]
    warm = [s._replace(compiled=min(s.step, 15)) for s in flat]
    assert soak.judged(warm) == []


def test_a_full_disk_is_named_where_the_error_names_nothing(tmp_path: Path) -> None:
    words = f"workdir {tmp_path}: a file cannot be written .No space"
    with pytest.raises(OSError, match=words), main._naming(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FileNotFoundError, match="no such model"), main._naming(tmp_path):
        raise FileNotFoundError("no such model")
