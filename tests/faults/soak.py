"""A long run in small: `python -m tests.faults.soak [--steps=2000]`, half of SFT, half of GRPO.

Nothing may grow with the number of steps: memory (2% behind the first fifth of a stage), compiled
programs, open files, threads. Checkpoints, dev scores, samples and metrics are written all along.
Memory is what the process holds itself, with no program running: pages of the files that it maps
come and go, and what it has freed is given back to the system before it is measured.
The numbers go to standard output; status 1 says that something grew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.attempts import prepare

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
GROWTH = 0.02  # of the memory after the warm-up
POOL = 3  # tasks that TensorStore's pool starts and ends; a leak leaves one a save or a step
WARM = 0.2  # of a stage's steps


class Seen(NamedTuple):
    """The process after a step."""

    stage: str
    step: int
    megabytes: float  # resident, and in no file
    arrays: int  # that jax holds
    compiled: int  # programs, since the start
    files: int  # open
    threads: int  # of Python
    tasks: int  # threads of any kind
    seconds: float


def watch(seen: list[Seen], every: int) -> None:
    """Notes a `Seen` behind every so many rows of metrics."""
    import jax

    from grpo_jax.infra.writers import MetricWriter

    libc = ctypes.CDLL(None)
    for threshold in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):  # or each thread's heap keeps megabytes
        libc.mallopt(threshold, 2**17)
    compiled = [0]
    began = time.monotonic()

    def listen(name: str, seconds: float, **details: Any) -> None:
        compiled[0] += name.endswith("backend_compile_duration")

    jax.monitoring.register_event_duration_secs_listener(listen)
    write = MetricWriter.write

    def writing(self: MetricWriter, stage: str, step: int, metrics: dict[str, Any]) -> None:
        write(self, stage, step, metrics)
        if step % every == 0:
            jax.block_until_ready(jax.live_arrays())
            time.sleep(0.05)  # what is ready is let go a moment later
            gc.collect()
            libc.malloc_trim(0)
            status = Path("/proc/self/status").read_text()
            megabytes = int(status.partition("RssAnon:")[2].split()[0]) / 2**10
            tasks, files = os.listdir("/proc/self/task"), os.listdir("/proc/self/fd")
            counts = (compiled[0], len(files), threading.active_count(), len(tasks))
            now = (megabytes, len(jax.live_arrays()), *counts)
            seen.append(Seen(stage, step, *now, time.monotonic() - began))

    MetricWriter.write = writing  # type: ignore[method-assign]


def judged(seen: list[Seen]) -> list[str]:
    """What grew, a stage at a time: the last quarter's most over the first's behind the warm-up."""
    problems = []
    for stage in dict.fromkeys(s.stage for s in seen):
        own = [s for s in seen if s.stage == stage]
        own = own[int(WARM * len(own)) :]
        first, last = own[: len(own) // 4], own[-(len(own) // 4) :]
        for name in ("megabytes", "arrays", "compiled", "files", "threads", "tasks"):
            before = max(getattr(s, name) for s in first)
            after = max(getattr(s, name) for s in last)
            allowed = {"megabytes": before * GROWTH, "tasks": POOL}.get(name, 0)
            if after > before + allowed:
                problems.append(f"{stage}: {name} grew from {before:.0f} to {after:.0f}")
    return problems


def table(seen: list[Seen]) -> str:
    """A line for every twentieth of what was seen."""
    shown = seen[:: max(1, len(seen) // 20)]
    head = (
        f"{'stage':<6}{'step':>6}{'MB':>9}{'arrays':>8}{'compiled':>10}{'files':>7}{'threads':>9}"
    )
    lines = [head + f"{'tasks':>7}{'s':>8}"]
    for s in dict.fromkeys([*shown, seen[-1]]):
        lines.append(
            f"{s.stage:<6}{s.step:>6}{s.megabytes:>9.1f}{s.arrays:>8}{s.compiled:>10}{s.files:>7}"
            f"{s.threads:>9}{s.tasks:>7}{s.seconds:>8.0f}"
        )
    return "\n".join(lines)


def main() -> int:
    """The command; 1 if anything grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--saves", type=int, default=20, help="checkpoints a stage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        from grpo_jax import main as program
        from tests.faults import short_run

        cfg = short_run.get_config()
        cfg.stages = ("sft", "grpo")
        half = args.steps // 2
        cfg.sft.max_steps = cfg.grpo.max_steps = half
        cfg.sft.epochs = cfg.grpo.epochs = 1e9
        cfg.sft.eval_every = cfg.grpo.eval_every = max(1, half // 20)
        cfg.checkpoint.every = max(1, half // args.saves)
        cfg.log.samples_every = 10
        seen: list[Seen] = []
        watch(seen, max(1, half // 100))
        before = threading.active_count()
        program.train(cfg, str(Path(temporary) / "run"))
        print(table(seen))
        problems = judged(seen)
        if threading.active_count() > before:
            problems.append(f"threads left behind: {threading.enumerate()}")
        print("\n".join(problems) or "nothing grew", flush=True)
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
