"""WORKDIR/report.html: what a run left behind in, one self-contained page out.

    python -m grpo_jax.evals.report WORKDIR

rebuilds the page from config.json, metrics.jsonl, samples.jsonl and evaluation/*.json, as far as
they are there. The page loads nothing, works offline, and allows no script but its own.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import sys
from html import escape
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.evals import page_evidence, page_results
from grpo_jax.evals.metrics import paired_bootstrap, statistics
from grpo_jax.evals.page import Json, Run, Series, is_number
from grpo_jax.evals.table import MODELS, order, table

__all__ = ["build", "main", "table"]

BOOTSTRAP = 1000  # resamples behind a paired comparison


def build(workdir: Path) -> Path:
    """Write WORKDIR/report.html; what is missing is left out, a torn last line is ignored.

    Raises:
      FileNotFoundError: `workdir` is not a folder with a run in it.
      ValueError: a file of the run is not valid JSON.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    page = render(run, str(workdir))
    target = workdir / "report.html"
    partial = workdir / ".report.html.partial"
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, target)
    return target


def read_run(workdir: Path) -> Run:
    """Read the files of a working directory; see `build` for errors."""
    config = workdir / "config.json"
    metrics, samples = workdir / "metrics.jsonl", workdir / "samples.jsonl"
    arms = sorted((workdir / "evaluation").glob("*.json"))
    if not any(path.exists() for path in (config, metrics, *arms)):
        raise FileNotFoundError(
            f"{workdir} holds no run: there is no config.json, metrics.jsonl or evaluation folder. "
            "Give the folder that was passed as --workdir."
        )
    evaluations = {path.stem: _read_json(path) for path in arms}
    return Run(
        name=workdir.resolve().name,
        config=_read_json(config) if config.exists() else {},
        metrics=_series(_read_lines(metrics)),
        rollouts=_read_lines(samples),
        evaluations=evaluations,
        comparisons=compare(evaluations),
    )


def render(run: Run, workdir: str) -> str:
    """Put the page together: HTML that stands alone."""
    sections = [
        ("results", "Results", "Every arm on held-out text, against two floors.",
         page_results.results(run)),
        ("tax", "The alignment tax", "What was learned against what it cost; up and left is "
         "better. Lines: floors that need no model.", page_results.tax(run)),
        ("curves", "Learning curves", "Bold: moving average. Point at a curve to read it.",
         page_evidence.curves(run)),
        ("samples", "Side by side", "Greedy answers on held-out text. Underlined: words that "
         "the reference has too. Bars: cosine with the reference under the reward’s encoder.",
         page_evidence.samples(run)),
        ("rollouts", "While it learned", "Sampled completions and their rewards, from early to "
         "late steps.", page_evidence.rollouts(run)),
        ("run", "What was run", "Configuration, versions and devices.",
         page_evidence.provenance(run)),
    ]  # fmt: skip
    filled = [section for section in sections if section[3]]
    script = _packaged("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": escape(run.name),
        "workdir": escape(workdir),
        "head": page_results.head(run),
        "nav": "".join(f'<a href="#{key}">{name}</a>' for key, name, _, _ in filled),
        "body": "\n".join(
            f'<section id="{key}"><h2>{name}</h2><p class="sub">{about}</p>{html}</section>'
            for key, name, about, html in filled
        ),
        "script": script,
        "script_hash": f"sha256-{digest}",
    }
    # One pass, so that nothing inside a part is taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _packaged("report.html"))


def compare(evaluations: dict[str, Json]) -> dict[tuple[str, str], Json]:
    """Paired bootstrap of each model arm against the one before it, on the samples both have."""
    arms = [arm for arm in order(evaluations) if arm in MODELS]
    found = {}
    for pair in pairwise(arms):
        first, second = (
            {(str(row.get("source")), str(row.get("reference"))): row for row in rows}
            for rows in (evaluations[arm].get("samples") or [] for arm in pair)
        )
        shared = [key for key in first if key in second]
        if len(shared) < 2:
            continue
        rows = [[first[key] for key in shared], [second[key] for key in shared]]
        names = [
            name
            for name in ("similarity", "judge_similarity")
            if all(is_number(row.get(name)) for side in rows for row in side)
        ]
        both = [_statistics(side, shared, names) for side in rows]
        found[pair] = paired_bootstrap(both[0], both[1], BOOTSTRAP, seed=0)
    return found


def _statistics(rows: list[Json], keys: list[tuple[str, str]], names: list[str]) -> dict[str, Any]:
    found = statistics(
        hypotheses=[str(row.get("completion", "")) for row in rows],
        references=[reference for _, reference in keys],
        sources=[source for source, _ in keys],
        similarities={name: np.array([row[name] for row in rows]) for name in names},
        gate_mask=np.zeros(len(rows), bool),
    )
    # Samples do not say which language they are in.
    return {name: value for name, value in found.items() if name != "language_consistency"}


def _series(rows: list[Json]) -> dict[str, Series]:
    """Group metric rows by stage and name; a step logged twice (after a resume) counts once."""
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


def _packaged(name: str) -> str:
    return resources.files("grpo_jax.evals").joinpath(name).read_text(encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Command line: build the page and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_jax.evals.report", description="Rebuild WORKDIR/report.html."
    )
    parser.add_argument("workdir", type=Path, metavar="WORKDIR")
    workdir = parser.parse_args(arguments).workdir
    try:
        page = build(workdir)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if text := table(read_run(workdir).evaluations):
        print(text)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
