"""The files of a working directory in, a `Run` out; and which runs are seeds of one experiment.

Arms are a tree: each starts from another one, or from base; config.json lists them. Floors are
systems without training (copying the source, looking up the nearest sentence).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.config import Config
from grpo_jax.config_dicts import flatten, identity, stage_fields, to_dict
from grpo_jax.report.table import FLOORS, is_number, order, title

Json = dict[str, Any]
Series = dict[str, list[tuple[float, float]]]  # metric -> (step, value), in order


class Arm(NamedTuple):
    """One row of an experiment."""

    name: str
    title: str
    method: str  # "base", "sft", "self_sft", "grpo", "recover", "interpolate", "floor" or ""
    start: str  # the arm whose weights it begins from; "" for base and floors
    group: str  # arms of one group were measured on the same test set
    overrides: Json  # configuration fields that are its own


class Run(NamedTuple):
    """What the files of a working directory say."""

    path: str  # as given
    name: str  # of its folder
    seed: int | None
    config: Json  # config.json: {"config", "seed", "versions", "devices", ...}
    arms: list[Arm]
    metrics: dict[str, Series]  # by arm
    rollouts: list[Json]  # samples.jsonl
    evaluations: dict[str, Json]  # by arm
    preferences: Json  # preference.json: verdicts by "FIRST:SECOND"


def read_run(workdir: Path) -> Run:
    """Read the files of a working directory; what is missing is left out.

    A torn last line of a jsonl file, as an interrupted run leaves it, is ignored.

    Raises:
      FileNotFoundError: `workdir` is not a folder with a run in it.
      ValueError: a file of the run is not valid JSON.
    """
    workdir = Path(workdir)
    config_file = workdir / "config.json"
    metrics, samples = workdir / "metrics.jsonl", workdir / "samples.jsonl"
    files = sorted((workdir / "evaluation").glob("*.json"))
    if not any(path.exists() for path in (config_file, metrics, *files)):
        raise FileNotFoundError(
            f"{workdir} holds no run: there is no config.json, metrics.jsonl or evaluation folder. "
            "Give the folder that was passed as --workdir."
        )
    config = _read_json(config_file) if config_file.exists() else {}
    series = _series(_read_lines(metrics))
    read = {path.stem: _read_json(path) for path in files}
    evaluations = {
        name: _with_tasks(found)
        for name, found in read.items()
        if section(found, "target") or section(found, "retention")
    }
    judged = workdir / "preference.json"
    seed = config.get("seed")
    return Run(
        path=str(workdir),
        name=workdir.resolve().name,
        seed=seed if isinstance(seed, int) else None,
        config=config,
        arms=_arms(config, evaluations, series),
        metrics=series,
        rollouts=_read_lines(samples),
        evaluations=evaluations,
        preferences=_read_json(judged) if judged.exists() else {},
    )


def check_seeds(runs: Sequence[Run]) -> None:
    """Several runs are averaged only when nothing but their seeds differs.

    What decides a run's training and its evaluation has to agree (`config_dicts.identity`, and what
    the evaluation depends on); how often it logs or saves, and its devices, may differ. A field
    that an older config.json lacks has its default.

    Raises:
      ValueError: a run without config.json or seed, two runs with one seed, or runs that differ;
        the fields are listed.
    """
    if len(runs) < 2:
        return
    default = to_dict(Config())
    base = identity(default) | stage_fields(default, "evaluate")
    known: dict[int, Run] = {}
    values = []
    for run in runs:
        config = section(run.config, "config")
        if run.seed is None or not config:
            raise ValueError(f"{run.path}: its config.json names no seed; it cannot be averaged.")
        if run.seed in known:
            raise ValueError(
                f"{known[run.seed].path} and {run.path} have the same seed {run.seed}: averaging "
                "them would count one run twice. Leave one out."
            )
        known[run.seed] = run
        own = {f"arm {arm.name}": arm._asdict() for arm in run.arms if arm.overrides}
        values.append(base | identity(config) | stage_fields(config, "evaluate") | own)
    first = values[0]
    for run, other in zip(runs[1:], values[1:], strict=True):
        different = [
            f"  {name}: {first.get(name)!r} and {other.get(name)!r}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name) != other.get(name)
        ]
        if different:
            raise ValueError(
                f"{runs[0].path} and {run.path} are not seeds of one experiment, so they are not "
                "averaged; build a report for each. They differ in\n" + "\n".join(different)
            )


def section(values: Any, name: str) -> Json:
    """A nested object of a file we did not write ourselves; {} if it is not one."""
    found = values.get(name) if isinstance(values, dict) else None
    return found if isinstance(found, dict) else {}


def _with_tasks(evaluation: Json) -> Json:
    """The same with each task's metrics under retention, as TASK/METRIC, and their items as rows.

    "asked" names the questions, because two arms are compared only on the same ones.
    """
    kept = dict(section(evaluation, "retention"))
    for task, result in section(evaluation, "tasks").items():
        items = result.get("items") if isinstance(result, dict) else None
        items = [item for item in items or [] if isinstance(item, dict)]
        asked = zlib.crc32(json.dumps([item.get("question") for item in items]).encode())
        for metric, entry in section(result, "metrics").items():
            if isinstance(entry, dict):
                rows = [section(item, "scores").get(metric) for item in items]
                found = {"rows": rows, "asked": asked} if all(map(is_number, rows)) else {}
                kept[f"{task}/{metric}"] = entry | found
    return evaluation | {"retention": kept}


def _arms(config: Json, evaluations: dict[str, Json], metrics: dict[str, Series]) -> list[Arm]:
    """Base, the arms in their order, what else was measured, the floors."""
    rows = config.get("arms")
    found: dict[str, Arm] = {}
    for row in rows if isinstance(rows, list) else []:
        name, start = str(row.get("name", "")), str(row.get("start") or "base")
        method, group = str(row.get("method", "")), str(row.get("group") or "")
        overrides = flatten(section(row, "overrides"))
        found[name] = Arm(name, title(name), method, start, group, overrides)
    for name in order({*evaluations, *metrics} - found.keys()):
        evaluation = evaluations.get(name, {})
        group = str(evaluation.get("group") or "")
        is_floor = name in FLOORS or evaluation.get("method") == "floor"
        method = "floor" if is_floor else str(evaluation.get("method") or "")
        method = "base" if name == "base" else method
        # Base and floors are measured in every group: base@transfer is base in "transfer".
        named = name.removesuffix(f"@{group}") if method in ("base", "floor") else name
        start = "" if method in ("base", "floor") else "base"
        found[name] = Arm(name, title(named), method, start, group, {})

    def place(arm: Arm) -> tuple[int, bool]:
        return {"base": 0, "floor": 2}.get(arm.method, 1), arm.method == "floor" and bool(arm.group)

    return sorted(found.values(), key=place)


def _series(rows: list[Json]) -> dict[str, Series]:
    """Group metric rows by arm and name; a step logged twice (after a resume) counts once."""
    found: dict[str, dict[str, dict[float, float]]] = {}
    for row in rows:
        stage = found.setdefault(str(row.get("stage", "run")), {})
        if not is_number(row.get("step")):
            continue
        for name, value in row.items():
            if name != "step" and is_number(value) and np.isfinite(value):
                stage.setdefault(name, {})[float(row["step"])] = float(value)
    return {
        stage: {name: sorted(points.items()) for name, points in series.items()}
        for stage, series in found.items()
        if series
    }


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore or remove it.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, wanted a JSON object.")
    return value


def _read_lines(path: Path) -> list[Json]:
    """Objects of a jsonl file; a last line that an interrupted run left unfinished is dropped."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):  # no newline behind it: the writer was cut off
                break
            raise ValueError(f"{path}:{number} is not valid JSON ({error}).") from error
    return [row for row in rows if isinstance(row, dict)]
