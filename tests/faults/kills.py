"""kill -9 at random moments of a tiny run: `python -m tests.faults.kills [--kills=100] [--seed=0]`.

A run that nobody disturbs is made first. Then runs of the same configuration are killed, each time
at a random moment within a random phase, and started again until they are done. All that they leave
must equal the undisturbed run's, bit for bit: checkpoints, rows, evaluations, exports. After every
kill the checkpoints that can be seen must be whole, and so must every JSON file.
The table goes to standard output; status 1 says that something differed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.attempts import (
    LONGEST,
    PHASES,
    Marks,
    differences,
    ended,
    half_visible,
    kill,
    leftovers,
    prepare,
    saved,
    start,
    status_of,
)

SAVING = 0.15  # seconds within which a write in the background is killed


class Harness:
    """The unbroken run, and what the kills did to others."""

    def __init__(
        self, base: Path, seed: int, change: Callable[[Any], None] | None = None, warm: bool = True
    ) -> None:
        self.base, self.random, self.marks = base, random.Random(seed), Marks()
        self.change = change  # of the configuration
        self.problems: list[str] = []
        self.phases: Counter[str] = Counter()
        self.half: Counter[str] = Counter()
        self.runs = self.attempts = 0
        self.unbroken = base / "unbroken"
        for name in ("warm",) * warm + ("unbroken",):  # the second finds everything compiled
            began = time.monotonic()
            status = ended(start(base / name, self.marks, change))
            if status:
                raise RuntimeError((base / f"{name}.log").read_text()[-3000:])
            self.seconds = time.monotonic() - began
        self.known = saved(self.unbroken)
        times = json.loads((base / "unbroken.times").read_text())
        self.moments: dict[str, list[float]] = {}  # of each phase, how long each lasted
        for (phase, at), (_, following) in zip(times, times[1:], strict=False):
            self.moments.setdefault(phase, []).append(following - at)

    def run(self, kills: int) -> None:
        """Kills so many times, over as many runs as that takes; every run ends and is compared."""
        while sum(self.phases.values()) < kills:
            folder = self.base / f"run-{self.runs}"
            while True:
                self.attempts += 1
                left = kills - sum(self.phases.values())
                child = start(folder, self.marks, self.change)
                if not left:
                    self._check(ended(child), folder)
                    break
                if not self._killed(child, folder):
                    break
            self.runs += 1
            self.problems += [f"{folder.name}: {p}" for p in differences(folder, self.unbroken)]

    def _killed(self, child: int, folder: Path) -> bool:
        """Kills at a random moment of a random phase; False if the run was done before."""
        phase = self.random.choice([p for p in PHASES if p in self.moments])
        lengths = self.moments[phase]
        nth = self.random.randint(1, min(3, len(lengths)))
        longest = SAVING if phase == "save" else min(max(lengths), 2.0)
        wait = self.random.uniform(0.0, longest)
        limit = time.monotonic() + LONGEST
        while self.marks.read()[1][phase] < nth:
            if status := status_of(child):
                self._check(status[0], folder)
                return False
            if time.monotonic() > limit:
                kill(child)
                raise TimeoutError(f"{folder}: an attempt took longer than {LONGEST:.0f} s")
            time.sleep(0.0003)
        time.sleep(wait)
        if status := status_of(child):
            self._check(status[0], folder)
            return False
        where = self.marks.read()[0]
        kill(child)
        self.phases[where] += 1
        self.half.update(leftovers(folder))
        self.problems += [f"{folder.name}, {where}: {p}" for p in half_visible(folder, self.known)]
        return True

    def _check(self, status: int, folder: Path) -> None:
        if status:
            log = folder.with_suffix(".log").read_text()[-2000:]
            raise RuntimeError(f"{folder}: an attempt failed\n{log}")

    def table(self) -> str:
        """What was done, and what was found."""
        lines = [f"{'killed in':<14}{'kills':>6}"]
        lines += [f"{phase:<14}{self.phases[phase]:>6}" for phase in PHASES if self.phases[phase]]
        lines.append(f"{'together':<14}{sum(self.phases.values()):>6}")
        half = ", ".join(f"{n} {what}" for what, n in self.half.items()) or "none"
        lines += [
            f"left half written, and rightly ignored: {half}",
            f"{self.attempts} attempts, {self.runs} runs; undisturbed {self.seconds:.1f} s",
            f"runs that differ from the unbroken one, or half-visible files: {len(self.problems)}",
            *self.problems,
        ]
        return "\n".join(lines)


def main() -> int:
    """The command; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs lie; they stay there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(args.folder or temporary).absolute()
        base.mkdir(parents=True, exist_ok=True)
        prepare(base)
        began = time.monotonic()
        harness = Harness(base, args.seed)
        try:
            harness.run(args.kills)
        finally:
            print(harness.table(), f"\n{time.monotonic() - began:.0f} s in all", flush=True)
    return 1 if harness.problems else 0


if __name__ == "__main__":
    sys.exit(main())
