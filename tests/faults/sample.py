"""A seeded sample of kills and of a full disk, for the tests: `python -m tests.faults.sample`.

As `tests.faults.kills`, without evaluation, but the first attempt of the first run may not write
files of any size, and so fails at its first checkpoint. Last, a fresh process repeats the unbroken
run from its config.json. No file and no log may hold what stands in the environment as a secret.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from grpo_jax.config import Config
from tests.faults.attempts import half_visible, prepare
from tests.faults.disk import Case, limit_files
from tests.faults.kills import Harness

SECRET = "s3cret-of-the-environment"


def quick(cfg: Config) -> None:
    """Leaves out what compiles longest."""
    cfg.stages, cfg.export.arms = ("sft", "grpo", "export"), ("grpo",)
    cfg.reward.tau, cfg.evaluation.retention = 0.1, ""
    cfg.grpo.eval_every = 0


def limited(cfg: Config) -> None:
    """The same, with files that may not grow."""
    quick(cfg)
    limit_files()


def main() -> int:
    """The command; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary)
        prepare(base)
        os.environ |= dict.fromkeys(("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"), SECRET)
        harness = Harness(base, args.seed, quick, warm=False)
        first = base / "run-0"
        case = Case("files limited", first, harness.unbroken, first.with_suffix(".log"))
        case.fails(harness.marks, limited)
        case.problems += half_visible(first, harness.known)
        harness.run(args.kills)
        print(harness.table())
        command = [sys.executable, "-m", "grpo_jax.repro", str(harness.unbroken)]
        repeated = subprocess.run(command, capture_output=True, text=True)
        said = repeated.stdout + repeated.stderr
        print(said if repeated.returncode else repeated.stdout)
        files = [path for path in base.rglob("*") if path.is_file()]
        told = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
        told += ["the log"] * (SECRET in said)
        print(f"secrets in {len(files)} files: {told or 'none'}")
        print(f"{case.name}: {case.problems or 'as it should be'}\n{case.message}", flush=True)
        return 1 if harness.problems or case.problems or repeated.returncode or told else 0


if __name__ == "__main__":
    sys.exit(main())
