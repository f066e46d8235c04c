"""python -m grpo_jax.report WORKDIR... [--output DIR]

Rebuilds report.html and report.json from what a run left: config.json, metrics.jsonl,
samples.jsonl and evaluation/*.json, as far as they are there, and prints the table.

Several working directories are seeds of one experiment: their numbers are averaged, with the
standard deviation and the value of each seed beside the mean. Runs whose configurations differ in
anything else that decides the result are refused, with the fields in which they differ, and so are
two runs with the same seed: build a report for each of them instead.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grpo_jax.report import plain, read, write


def main(arguments: list[str] | None = None) -> int:
    """Command line; 0, or 1 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.report",
        description="Rebuild report.html and report.json of a run, or of the seeds of one "
        "experiment, which are averaged.",
    )
    parser.add_argument("workdirs", type=Path, metavar="WORKDIR", nargs="+")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder to write to; default: the run's own, or ./report for several runs",
    )
    given = parser.parse_args(arguments)
    several = len(given.workdirs) > 1
    output = given.output or (Path("report") if several else given.workdirs[0])
    try:
        report = read(given.workdirs)
        page = write(report, output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if text := plain(report):
        print(text)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
