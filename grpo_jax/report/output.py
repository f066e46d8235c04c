"""report.html and report.json: what a run, or the seeds of an experiment, left behind.

In: working directories. Out: one self-contained page that loads nothing, works offline and allows
no script but its own, and beside it a file with the same numbers (its form: `report.summary`).
`python -m grpo_jax.report` is the command line.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from grpo_jax.report import page_compare, page_curves, page_evidence, page_head, page_results
from grpo_jax.report.page import group_id, groups, view
from grpo_jax.report.runs import Json, read_run
from grpo_jax.report.summary import summarise
from grpo_jax.report.table import table


def build(workdirs: Path | Sequence[Path], output: Path | None = None) -> Path:
    """Write report.html and report.json; what a run lacks is left out.

    Args:
      workdirs: a run, or several that differ in their seeds only.
      output: the folder to write to, made if need be; None: the first of `workdirs`.

    Returns:
      The path of report.html.

    Raises:
      FileNotFoundError: a folder without a run in it.
      ValueError: a file of a run is not valid JSON, or the runs are not seeds of one experiment.
    """
    return write(read(workdirs), _folder(workdirs, output))


def read(workdirs: Path | Sequence[Path]) -> Json:
    """The report as report.json holds it; errors as for `build`."""
    paths = [workdirs] if isinstance(workdirs, str | os.PathLike) else list(workdirs)
    return summarise([read_run(Path(path)) for path in paths])


def write(report: Json, folder: Path) -> Path:
    """Write both files into a folder, whole or not at all; the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1)
    _replace(folder / "report.json", text + "\n")
    return _replace(folder / "report.html", render(report))


def plain(report: Json) -> str:
    """The tables for a terminal, one a group of arms; '' when no arm was measured."""
    shown = view(report)
    parts = []
    for group in groups(shown):
        titles = {name: arm["title"] for name, arm in shown.arms.items()}
        text = table(shown.scores, shown.group(group), titles)
        if text:
            parts.append(f"{group}\n{text}" if group else text)
    return "\n\n".join(parts)


def render(report: Json) -> str:
    """The page: HTML that stands alone."""
    shown = view(report)
    sections = [
        ("results", "Results", "Every arm on held-out text, against floors that need no model. "
         "Bold: the best arm.", page_results.results(shown, "")),
        ("tax", "The alignment tax", "What was learned against what it cost; up and left is "
         "better. Dashed: floors that need no model.", page_head.tax(shown, "")),
    ]  # fmt: skip
    for group in groups(shown)[1:]:
        plots = page_head.tax(shown, group)
        plots = f"<h3>What was learned against what it cost</h3>{plots}" if plots else ""
        html = page_results.results(shown, group) + plots
        about = (
            "These arms were measured on a test set of their own. What they kept is counted "
            "against base, as everywhere."
        )
        key = f"group-{group_id(shown, group)}"
        sections.append((key, escape(group.capitalize()), about, html))
    first = f" Run shown: {report['workdirs'][0]}." if len(report["workdirs"]) > 1 else ""
    sections += [
        ("judged", "Judged in pairs", "Which answer a language model prefers.",
         page_compare.preferences(shown)),
        ("curves", "Learning curves", "Bold: moving average. Point at a curve to read it.",
         page_curves.curves(shown)),
        ("samples", "Side by side", "Greedy answers on held-out text. Underlined: words that "
         "the reference has too. Bars: cosine with the reference under the reward’s encoder."
         + escape(first), page_evidence.samples(shown)),
        ("rollouts", "While it learned", "Sampled completions and their rewards, from early to "
         "late steps." + escape(first), page_evidence.rollouts(shown)),
        ("costs", "Costs", "What each arm took to train, and to measure. In all: with "
         "every arm that it comes from.",
         page_evidence.costs(shown)),
        ("run", "What was run", "Arms, configuration, versions and devices.",
         page_evidence.provenance(shown)),
    ]  # fmt: skip
    filled = [section for section in sections if section[3]]
    script = _packaged("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {
        "title": escape(report["name"]),
        "command": escape(" ".join(["python -m grpo_jax.report", *report["workdirs"]])),
        "head": page_head.head(shown),
        "nav": "".join(f'<a href="#{key}">{name}</a>' for key, name, _, _ in filled),
        "body": "\n".join(
            f'<section id="{key}" aria-labelledby="{key}-name"><h2 id="{key}-name">{name}</h2>'
            f'<p class="sub">{about}</p>{html}</section>'
            for key, name, about, html in filled
        ),
        "style": _packaged("report.css"),
        "script": script,
        "script_hash": f"sha256-{digest}",
    }
    # One pass, so that nothing inside a part is taken for a placeholder.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _packaged("report.html"))


def _folder(workdirs: Path | Sequence[Path], output: Path | None) -> Path:
    if output is not None:
        return Path(output)
    return Path(workdirs if isinstance(workdirs, str | os.PathLike) else workdirs[0])


def _replace(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    # A text may hold half a surrogate pair; it is shown as a question mark.
    partial.write_text(text, encoding="utf-8", errors="replace")
    os.replace(partial, path)
    return path


def _packaged(name: str) -> str:
    return resources.files("grpo_jax.report").joinpath(name).read_text(encoding="utf-8")
