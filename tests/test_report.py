"""The report: complete, self-contained, escaped, patient, and the same in HTML and in JSON."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import ARMS, EVIL, one, seeds, tree, write

from grpo_jax import report
from grpo_jax.report import plots, summary
from grpo_jax.report.__main__ import main
from grpo_jax.report.runs import read_run

VOID = {"meta", "link", "br", "wbr", "input"}


class Checker(HTMLParser):
    """Follows tags: `problems` stays empty when all of them are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.inside: list[tuple[str, list[str]]] = []  # of each tag, those around it
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        self.inside.append((tag, list(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        self.inside.append((tag, list(self.open)))

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
    """A run of plain stages."""
    folder = tmp_path / "run <b>1</b>"
    (folder / "evaluation").mkdir(parents=True)
    config = {"model": {"path": EVIL}, "seed": 3, "stages": ["sft", "grpo", "evaluate"]}
    arms = [{"name": n, "method": n, "start": s} for n, s in (("sft", "base"), ("grpo", "sft"))]
    record = {"config": config, "arms": arms, "seed": 3, "devices": {"kind": "cpu"}}
    write(folder / "config.json", record)
    steps = [
        {"stage": "grpo", "step": s, "reward": 1 + s / 50, "reward_std": 0.2, "kl": None,
         "rewards/semantic/mean": 0.5, "rewards/semantic/std": 0.1, "odd<name>": s}
        for s in range(60)
    ]  # fmt: skip
    lines = [json.dumps(row) for row in [{"stage": "sft", "step": 1, "loss": 2.0}, *steps]]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"stage": "gr')
    row = {"stage": "grpo", "step": 0, "prompt": EVIL, "completion": EVIL, "reference": "the"}
    (folder / "samples.jsonl").write_text(json.dumps({**row, "terms": {"semantic": 0.5}}) + "\n")
    kept = {"nll_mean": 3.0, "nll_p90": 4.0, "kl_general": 0.0, "kl_task": 0.0}
    measured = {
        "base": evaluation("base", 10.0, retention=kept),
        "sft": evaluation("sft", 30.0, retention={**kept, "nll_mean": 3.2, "kl_general": 0.1}),
        "copy": evaluation("copy", 5.0),
    }
    measured["sft"]["cost"] = {"tokens": 900, "seconds": 61.0}
    for arm, value in measured.items():
        write(folder / "evaluation" / f"{arm}.json", value)
    return folder


def test_page_is_whole_and_stands_alone(workdir: Path) -> None:
    page = report.build(workdir)
    text = page.read_text(encoding="utf-8")
    assert page == workdir / "report.html" and not list(workdir.glob(".report*"))
    checker = Checker(text)
    assert checker.problems == [] and checker.open == []
    for section in ("results", "tax", "curves", "samples", "rollouts", "costs", "run"):
        assert f'<section id="{section}"' in text
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


def test_names_of_arms_groups_and_metrics_are_escaped(tmp_path: Path) -> None:
    names = ('a0"><b>x', "a1'><b>x")  # what a file may be called
    folder = tree(
        tmp_path / "run",
        arms=((names[0], "sft", "base", EVIL), (names[1], EVIL, names[0], EVIL)),
    )
    path = folder / "evaluation" / f"{names[0]}.json"
    value = json.loads(path.read_text())
    value["target"][EVIL] = 0.5
    value["retention"][EVIL] = {"value": 0.5, "rows": [0, 1, 1]}
    write(path, value)
    text = report.build(folder).read_text(encoding="utf-8")
    checker = Checker(text)
    assert "<script>alert" not in text and "<b>x" not in text and checker.problems == []
    assert text.count("&lt;script&gt;") > 20
    shown = {attributes.get("data-arm") for _, attributes in checker.seen}
    assert shown >= set(names)  # escaped once, not twice


def test_page_shows_what_was_measured(workdir: Path) -> None:
    text = report.build(workdir).read_text(encoding="utf-8")
    assert "30.0</b> <small>±1.0</small>" in text  # a value with its interval
    assert "copy floor" in text and "<b>base</b> → <b>SFT</b>" in text
    assert "minus SFT" in text and "minus base" in text  # the paired comparisons of the samples
    assert 'id="judged"' not in text  # no judge was asked
    assert 'dir="auto">ཡིག་སྣོད།' in text and 'arabic" dir="auto">ھ' in text
    assert "<em>nothing</em>" in text and "<u>the file 0</u>" in text  # shared words are marked
    assert "61 s" in text  # what training took


def test_page_of_an_unfinished_run_leaves_out_what_is_missing(workdir: Path) -> None:
    for path in [*(workdir / "evaluation").iterdir(), workdir / "samples.jsonl"]:
        path.unlink()
    text = report.build(workdir).read_text(encoding="utf-8")
    assert "has not finished an arm" in text and '<section id="curves"' in text
    assert '<section id="tax"' not in text and '<section id="samples"' not in text


def test_bad_folders_and_files_are_named(tmp_path: Path, workdir: Path, capsys) -> None:
    with pytest.raises(FileNotFoundError, match="holds no run"):
        report.build(tmp_path)
    (workdir / "evaluation" / "grpo.json").write_text("{")
    with pytest.raises(ValueError, match="grpo.json is not valid JSON"):
        report.build(workdir)
    assert main([str(workdir)]) == 1 and "grpo.json" in capsys.readouterr().err
    (workdir / "evaluation" / "grpo.json").unlink()
    (workdir / "metrics.jsonl").write_text('{"stage"\n{}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:1 is not valid JSON"):
        report.build(workdir)


def test_command_line(workdir: Path, tmp_path: Path, capsys, monkeypatch):
    assert main([str(workdir)]) == 0
    printed = capsys.readouterr().out
    assert "chrF++" in printed and printed.strip().endswith("report.html")
    assert (workdir / "report.json").exists()
    monkeypatch.chdir(tmp_path)
    assert main([str(path) for path in seeds()]) == 0
    assert capsys.readouterr().out.strip().endswith("report/report.html")
    assert "transfer" in (tmp_path / "report" / "report.html").read_text()
    assert not (seeds()[0] / "report.html").exists()  # a run's own page is left alone
    assert main([str(workdir), "--output", "there"]) == 0 and Path("there/report.json").exists()


def test_arms_are_those_that_the_config_file_lists(workdir: Path) -> None:
    chain = {arm.name: arm for arm in read_run(workdir).arms}
    assert list(chain) == ["base", "sft", "grpo", "copy"]
    assert chain["grpo"].start == "sft" and chain["sft"].start == "base"
    arms = {arm.name: arm for arm in read_run(seeds()[0]).arms}
    base, floors = ["base", "base@transfer"], ["copy", "tm", "copy@transfer", "tm@transfer"]
    assert list(arms) == [*base, *(name for name, *_ in ARMS), *floors]
    assert arms["headline-grpo"].group == "transfer" and arms["headline-grpo"].start == "grpo"
    assert arms["grpo"].overrides == {"sft.max_steps": 4} and arms["tm"].method == "floor"


def test_groups_have_sections_of_their_own() -> None:
    text = report.render(one())
    main_part, transfer = text.split('<section id="group-1"')
    assert "headline-sft" not in main_part.split('<section id="results"')[1]
    assert transfer.index("headline-sft") < transfer.index('<section id="curves"')
    assert {e["group"] for e in one()["tax"]} == {"", "transfer"}
    pairs = {(c["first"], c["second"]): c["metrics"] for c in one()["comparisons"]}
    assert "chrf++" in pairs["headline-sft", "headline-grpo"]
    # Another test set: only what was kept can be compared.
    assert set(pairs["grpo", "headline-grpo"]) == {
        "nll_mean", "nll_p90", "multiple_choice/accuracy"
    }  # fmt: skip
    assert report.plain(one()).count(" chrF++ ") == 4  # two tables, each with UDHR's
    assert "\n\ntransfer\n" in report.plain(one())


def test_every_number_of_the_tables_is_in_the_json() -> None:
    text = report.render(one())
    scale = {column["key"]: column["scale"] for column in one()["columns"]}
    known = {0.0}
    for arm in one()["scores"].values():
        known |= {
            s["value"] * scale[k] for part in arm.values() for k, s in part.items() if s["value"]
        }
    for pair in one()["comparisons"]:
        known |= {m["difference"] * scale.get(k, 1) for k, m in pair["metrics"].items()}
    for entry in one()["tax"]:
        for point in entry["points"]:
            known |= {point["x"]["value"], point["y"]["value"]}
    for pair in one()["preferences"]:
        known |= {100 * pair[name]["value"] for name in ("win", "tie", "lose", "score")}
        known |= {100 * pair["consistency"], *(pair[n] for n in ("judged", "malformed", "failed"))}
    known |= {value for cost in one()["costs"].values() for value in cost.values()}
    near = np.sort(np.array([*known, *(-value for value in known)]))
    shown = np.array([float(v) for v in re.findall(r'data-value="([^"]+)"', text)])
    assert len(shown) > 1000
    place = np.clip(np.searchsorted(near, shown), 1, len(near) - 1)
    gap = np.minimum(abs(near[place] - shown), abs(near[place - 1] - shown))
    assert (gap <= 1e-7 * np.maximum(1, abs(shown))).all()


def test_json_has_the_documented_form(workdir: Path) -> None:
    report.build(workdir)
    found = json.loads((workdir / "report.json").read_text(encoding="utf-8"))
    documented = re.findall(r'^  "(\w+)"', summary.__doc__, re.M)
    assert found["format"] == 1 and set(found) == set(one()) > set(documented) > {"tax", "costs"}
    assert all(f'"{name}"' in summary.__doc__ for name in found)
    assert found["scores"]["sft"]["target"]["chrf++"] == {"value": 30, "low": 29, "high": 31}
    assert found["seeds"] == [3] and found["spread"] == "rows"
    assert len(one()["curves"]["grpo"]["reward"]["values"]) == 30
    assert one()["costs"]["mix-0.5"]["total_seconds"] == pytest.approx(60.5 * (10 + 5 + 1))


def test_markup_is_accessible() -> None:
    checker = Checker(report.render(one()))
    assert all(attributes.get("scope") for tag, attributes in checker.seen if tag == "th")
    tables = sum(tag == "table" for tag, _ in checker.seen)
    assert tables > 10 and tables == sum(tag == "caption" for tag, _ in checker.seen)
    for (tag, attributes), (_, around) in zip(checker.seen, checker.inside, strict=True):
        if tag == "svg":
            assert attributes.get("aria-hidden") or attributes.get("aria-label"), attributes
        if tag in ("select", "input"):
            assert "label" in around or attributes.get("aria-label"), attributes
        if tag == "button":
            assert attributes["type"] == "button"
    ids = [attributes["id"] for _, attributes in checker.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    described = {a["aria-describedby"] for _, a in checker.seen if "aria-describedby" in a}
    assert described and described <= set(ids)


def test_marks_tell_all_arms_apart() -> None:
    css = [f"c{i % 8}" + plots.mark(i, 0, 0, 5) for i in range(40)]
    assert len(set(css)) == 40
    assert "ring" in plots.mark(None, 0, 0, 5)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
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


def test_line_chart_survives_one_point_constants_and_several_lines() -> None:
    for steps, values in (([3], [0.0]), ([0, 1], [2.0, 2.0]), (range(200), [0.1] * 200)):
        line = plots.Line("arm", "c0", list(steps), values, values[-1], spread=values)
        svg = plots.line_chart("m", [line]) + plots.line_chart("m", [line, line])
        assert "nan" not in svg and "inf" not in svg and len(svg) < 60_000
