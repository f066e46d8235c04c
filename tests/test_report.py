"""The report page and the terminal table: complete, self-contained, escaped, and patient."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.evals import plots, report
from grpo_jax.evals.table import COLUMNS, Cell, cell, order, table

EVIL = "<script>alert('x')</script> \"quoted\" & {{title}} </textarea>"
VOID = {"meta", "link", "br", "wbr", "input"}


class Checker(HTMLParser):
    """Follows tags: `problems` stays empty when all of them are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(tag)


def evaluation(arm: str, score: float, **more: object) -> dict:
    entry = {"value": score, "low": score - 1, "high": score + 1}
    share = {"value": score / 100, "low": None, "high": None}
    samples = [
        {
            "source": f"madda {i}",
            "reference": f"the file {i}",
            "completion": text,
            "similarity": 0.1 * i,
        }
        for i, text in enumerate(["the file 0", "", EVIL, "ཡིག་སྣོད།", "ھۆججەت"])
    ]
    target = {"chrf++": entry, "similarity": share, "language_consistency": share}
    return {"arm": arm, "target": target, "samples": samples, "seconds": 3.5, "tokens": 99, **more}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    folder = tmp_path / "run <b>1</b>"
    (folder / "evaluation").mkdir(parents=True)
    config = {"config": {"model": {"path": EVIL}, "seed": 3}, "seed": 3, "devices": {"kind": "cpu"}}
    (folder / "config.json").write_text(json.dumps(config))
    steps = [
        {"stage": "grpo", "step": s, "reward": 1 + s / 50, "reward_std": 0.2, "kl": None,
         "rewards/semantic/mean": 0.5, "rewards/semantic/std": 0.1, "odd<name>": s}
        for s in range(60)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in [{"stage": "sft", "step": 1, "loss": 2.0}, *steps]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "gr')
    row = {"stage": "grpo", "step": 0, "prompt": EVIL, "completion": EVIL, "reference": "the"}
    (folder / "samples.jsonl").write_text(json.dumps({**row, "terms": {"semantic": 0.5}}) + "\n")
    retention = {"nll_mean": 3.0, "nll_p90": 4.0, "kl_general": 0.0, "kl_task": 0.0}
    arms = {
        "base": evaluation("base", 10.0, retention=retention),
        "sft": evaluation("sft", 30.0, retention={**retention, "nll_mean": 3.2, "kl_general": 0.1}),
        "copy": evaluation("copy", 5.0),
    }
    for arm, value in arms.items():
        (folder / "evaluation" / f"{arm}.json").write_text(json.dumps(value))
    return folder


def test_page_is_whole_and_stands_alone(workdir: Path) -> None:
    page = report.build(workdir)
    text = page.read_text(encoding="utf-8")
    assert page == workdir / "report.html" and not list(workdir.glob(".report*"))
    checker = Checker()
    checker.feed(text)
    assert checker.problems == [] and checker.open == []
    for section in ("results", "tax", "curves", "samples", "rollouts", "run"):
        assert f'<section id="{section}">' in text
    for tag, attributes in checker.seen:
        assert tag not in ("link", "img", "iframe", "object") and "src" not in attributes, tag
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text and "http:" not in text and "https:" not in text


def test_page_escapes_everything_and_trusts_only_its_own_script(workdir: Path) -> None:
    text = report.build(workdir).read_text(encoding="utf-8")
    assert "alert(&#x27;x&#x27;)" in text and "<script>alert" not in text
    assert "odd&lt;" in text and "odd<name>" not in text and "<b>1</b>" not in text
    assert "{{title}}" in text  # data that looks like a placeholder is not filled in
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_page_shows_what_was_measured(workdir: Path) -> None:
    text = report.build(workdir).read_text(encoding="utf-8")
    assert "30.0</b> <small>±1.0</small>" in text  # a value with its interval
    assert text.count('class="tax"') == 2 and "copy floor" in text
    assert "base → SFT" in text  # the paired comparison of the samples
    assert 'dir="auto">ཡིག་སྣོད།' in text and "<em>nothing</em>" in text
    assert "<u>the file 0</u>" in text  # shared words are marked


def test_page_of_an_unfinished_run_leaves_out_what_is_missing(workdir: Path) -> None:
    for path in [*(workdir / "evaluation").iterdir(), workdir / "samples.jsonl"]:
        path.unlink()
    text = report.build(workdir).read_text(encoding="utf-8")
    assert "has not finished an arm" in text and '<section id="curves">' in text
    assert '<section id="tax">' not in text and '<section id="samples">' not in text


def test_bad_folders_and_files_are_named(tmp_path: Path, workdir: Path, capsys) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.build(tmp_path)
    (workdir / "evaluation" / "grpo.json").write_text("{")
    with pytest.raises(ValueError, match="grpo.json is not valid JSON"):
        report.build(workdir)
    assert report.main([str(workdir)]) == 1 and "grpo.json" in capsys.readouterr().err
    (workdir / "evaluation" / "grpo.json").unlink()
    (workdir / "metrics.jsonl").write_text('{"stage"\n{}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:1 is not valid JSON"):
        report.build(workdir)


def test_command_line_prints_the_table_and_the_page(workdir: Path, capsys) -> None:
    assert report.main([str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert "chrF++" in printed and printed.strip().endswith("report.html")


def test_table_in_plain_text() -> None:
    retention = {"nll_mean": 3.104, "kl_general": {"value": 0.25, "low": 0.2, "high": 0.3}}
    arms = {"copy": evaluation("copy", 5.0), "sft": evaluation("sft", 30.0, retention=retention)}
    assert table(arms).splitlines() == [
        "               chrF++    sim  lang % │ NLL mean  KL(base‖·)",
        "───────────────────────────────────────────────────────────",
        "SFT         30.0 ±1.0  0.300    30.0 │    3.104       0.250",
        "copy floor   5.0 ±1.0  0.050     5.0 │        -           -",
    ]
    assert table({}) == "" and table({"base": {"arm": "base"}}) == ""


def test_arms_have_an_order_and_gaps_are_gaps() -> None:
    assert order(["tm", "grpo", "x", "copy", "base"]) == ["base", "grpo", "x", "copy", "tm"]
    chrf = COLUMNS[0]
    assert cell({}, chrf) is None and cell({"target": {"chrf++": None}}, chrf) is None
    assert cell({"target": {"chrf++": 7}}, chrf) == Cell(7.0, None, None)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_ticks_are_few_round_and_inside(low: float, width: float) -> None:
    found = plots.ticks(low, low + width)
    assert len(found) <= 6
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in found)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0312, "0.0312"), (12.44, "12.4"), (1530, "1530"), (2e-7, "2.0e-7"),
     (1234567, "1.23M"), (-0.5, "-0.5"), (float("nan"), "–")],
)  # fmt: skip
def test_short_numbers(value: float, text: str) -> None:
    assert plots.short(value) == text


def test_line_chart_survives_one_point_constants_and_long_series() -> None:
    for steps, values in (([3], [0.0]), ([0, 1], [2.0, 2.0]), (range(5000), [0.1] * 5000)):
        svg = plots.line_chart("m", list(steps), values, spread=values)
        assert "nan" not in svg and "inf" not in svg and len(svg) < 60_000
