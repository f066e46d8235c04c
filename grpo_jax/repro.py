"""python -m grpo_jax.repro RUN [AGAIN]: the run RUN once more, in the folder AGAIN, and compared.

RUN/config.json has the settings of a run, its seed and XLA's flags. On CPU two runs of one code
with the same packages and as many devices are equal bit for bit; on GPUs they are if XLA_FLAGS has
--xla_gpu_deterministic_ops=true. launch/repro.sh makes the environment of RUN/requirements.lock
first, and then does this.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.config import STAGES, Config
from grpo_jax.config_dicts import flatten, from_dict
from grpo_jax.infra.files import read_json, read_jsonl
from grpo_jax.infra.provenance import package_changes
from grpo_jax.infra.workdir import REQUIREMENTS
from grpo_jax.text.strict import listed, shown

# What says how long something took, which no two runs share.
_TIMES = ("step_time", "tokens_per_second", "time/sample", "time/score", "time/update")
_COSTS = ("seconds", "cost")  # of an evaluation


class Compared(NamedTuple):
    """What two working directories have in common, and what not."""

    equal: dict[str, int]  # {"rows of metrics.jsonl": 12, ...}
    differences: list[str]  # one line each


def recorded(run: Path) -> Config:
    """The configuration that repeats a run: its config.json with the seed that it drew.

    A run may have been made stage by stage, or its arms by several programs; config.json has the
    settings of the last one, and the folder shows what the others did.

    Raises:
      FileNotFoundError, ValueError: no run there, or one of another version of this program.
    """
    entry = read_json(run / "config.json")
    if entry is None:
        raise FileNotFoundError(f"{run}: no run here (no config.json)")
    cfg = from_dict(entry["config"])
    cfg.seed, cfg.only = entry["seed"], ()
    done = {path.stem for path in run.glob("done/*.json")}
    if not cfg.arms:
        done |= {path.stem for path in run.glob("arms/*.json")}
    cfg.stages = tuple(stage for stage in STAGES if stage in done or stage in cfg.stages)
    return cfg


def compare(run: Path, again: Path) -> Compared:
    """All but times: metrics, samples, parameters by their checksums, evaluations, exports."""
    found = Compared({}, [])
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [_rows(folder / name) for folder in (run, again)]
        _note(found, f"rows of {name}", _pairs(name, *rows))
    saved = [checkpoints(folder) for folder in (run, again)]
    _note(found, "checkpoints", _pairs("checkpoint", *saved))
    measured = [_evaluations(folder) for folder in (run, again)]
    _note(found, "evaluations", _pairs("evaluation", *measured))
    exported = [_exports(folder) for folder in (run, again)]
    _note(found, "exported files", _same_bytes(*exported))
    return found


def surroundings(run: Path, again: Path) -> list[str]:
    """In which packages, devices and code two runs differ."""
    was, now = (read_json(folder / "config.json") or {} for folder in (run, again))
    fields = ("versions", "devices", "xla_flags", "git_revision")
    found = _unlike(*({name: entry.get(name) for name in fields} for entry in (was, now)))
    locks = [folder / REQUIREMENTS for folder in (run, again)]
    if all(lock.is_file() for lock in locks):
        found += package_changes(*(lock.read_text(encoding="utf-8") for lock in locks))
    if str(was.get("git_revision")).endswith("-dirty"):
        found.append("the code had changes that are in no commit")
    return found


def _note(found: Compared, what: str, pairs: Iterable[str]) -> None:
    """Counts what is equal, which is '', and lists what is not."""
    lines = list(pairs)
    found.equal[what] = lines.count("")
    found.differences.extend(line for line in lines if line)


def _pairs(kind: str, was: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What is wrong with each value of two dicts, by the names of both; '' for nothing."""
    for name in dict.fromkeys([*was, *now]):
        if name not in was or name not in now:
            yield f"{kind} {name}: only in the {'repeated' if name in now else 'first'} run"
        else:
            unlike = _unlike(was[name], now[name])
            more = f"; and {len(unlike) - 3} more" if len(unlike) > 3 else ""
            yield f"{kind} {name}: {'; '.join(unlike[:3])}{more}" if unlike else ""


def _unlike(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The fields that differ, in words."""
    before, after = flatten(was), flatten(now)
    return [
        f"{field} was {shown(before.get(field))}, now {shown(after.get(field))}"
        for field in dict.fromkeys([*before, *after])
        if before.get(field) != after.get(field)
    ]


def _same_bytes(was: dict[str, Path], now: dict[str, Path]) -> Iterator[str]:
    for name in sorted(was.keys() | now.keys()):
        if name not in was or name not in now:
            yield f"{name}: only in the {'repeated' if name in now else 'first'} run"
            continue
        place = _first_difference(was[name], now[name])
        yield "" if place is None else f"{name}: differs from byte {place} on"


def _first_difference(one: Path, other: Path) -> int | None:
    with one.open("rb") as a, other.open("rb") as b:
        start = 0
        while True:
            parts = a.read(1 << 20), b.read(1 << 20)
            if parts[0] != parts[1]:
                return start + next(i for i, (x, y) in enumerate(zip_longest(*parts)) if x != y)
            if not parts[0]:
                return None
            start += len(parts[0])


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """ "ARM step N" -> row without times; "ARM step N (2)" for the second of a step, and so on."""
    out: dict[str, dict[str, Any]] = {}
    for row in read_jsonl(path):
        name = step = f"{row['stage']} step {row['step']}"
        number = 1
        while name in out:
            number += 1
            name = f"{step} ({number})"
        out[name] = {k: v for k, v in row.items() if k not in _TIMES}
    return out


def checkpoints(folder: Path) -> dict[str, Any]:
    """ "ARM/STEP" -> what a checkpoint says of itself: aux, score, and a checksum of each leaf."""
    found = {}
    for path in sorted(folder.glob("checkpoints/*/*/_CHECKPOINT_METADATA")):
        if path.parent.name.isdecimal():
            said = json.loads(path.read_text(encoding="utf-8"))["custom_metadata"]
            found[f"{path.parents[1].name}/{path.parent.name}"] = said
    return found


def _evaluations(folder: Path) -> dict[str, Any]:
    found = {path.stem: read_json(path) or {} for path in folder.glob("evaluation/*.json")}
    return {
        name: {k: v for k, v in content.items() if k not in _COSTS}
        for name, content in sorted(found.items())
    }


def _exports(folder: Path) -> dict[str, Path]:
    """Files by name, without those of an unfinished write, whose names begin with a dot."""
    files = [path for path in sorted(folder.glob("export/**/*")) if path.is_file()]
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: path for name, path in named.items() if "/." not in name}


def main(argv: list[str] | None = None) -> int:
    """The command; 0 if the runs are equal, 1 if they are not."""
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.repro", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="the working directory of a finished run")
    parser.add_argument("again", type=Path, nargs="?", help="of the repeated one (RUN-again)")
    args = parser.parse_args(argv)
    run = args.run.expanduser().absolute()
    again = args.again.expanduser().absolute() if args.again else run.with_name(f"{run.name}-again")
    if run == again:
        parser.error("the repeated run needs a folder of its own")
    from grpo_jax.infra import distributed
    from grpo_jax.main import launch

    try:
        cfg = recorded(run)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    if (flags := (read_json(run / "config.json") or {}).get("xla_flags")) is not None:
        os.environ["XLA_FLAGS"] = flags  # XLA has not read it yet
    launch(cfg, str(again))  # an interrupted repetition goes on
    if not distributed.is_main():
        return 0
    found, changes = compare(run, again), surroundings(run, again)
    if changes:
        print(f"not as it was then:\n  {listed(changes)}")
    if found.differences:
        print(f"{again} differs from {run}:\n  {listed(found.differences)}")
        return 1
    if not sum(found.equal.values()):
        print(f"{run} holds nothing to compare")
        return 1
    parts = ", ".join(f"{count} {what}" for what, count in found.equal.items() if count)
    print(f"{again} equals {run} bit for bit: {parts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
