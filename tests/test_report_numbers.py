"""The numbers of the report: paired comparisons, tasks, the front, seeds, and the plain table."""

from __future__ import annotations

import json
import statistics as stats
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import ARMS, averaged, one, retention, seeds, tree, write

from grpo_jax import report
from grpo_jax.evals import metrics as metrics_lib
from grpo_jax.report import compare, summary
from grpo_jax.report.__main__ import main
from grpo_jax.report.runs import read_run
from grpo_jax.report.table import COLUMNS, Cell, cell, columns, order, table


def test_long_curves_are_thinned_to_means_and_keep_their_last_value(tmp_path: Path) -> None:
    workdir = tree(tmp_path / "run", arms=ARMS[:1])
    rows = [json.dumps({"stage": "sft-1e-6", "step": s, "loss": float(s % 7)}) for s in range(1000)]
    (workdir / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    curve = report.read(workdir)["curves"]["sft-1e-6"]["loss"]
    assert len(curve["values"]) == summary.MAX_POINTS and curve["last"] == 999 % 7
    assert curve["values"][0] == pytest.approx(np.mean([0, 1, 2, 3, 4]))
    assert curve["steps"][0] == pytest.approx(2.0)


def test_pairs_equal_the_paired_bootstrap_of_the_metrics() -> None:
    run = read_run(seeds()[0])

    def arm(name: str) -> dict:
        rows = run.evaluations[name]["samples"]
        return metrics_lib.statistics(
            [row["completion"] for row in rows],
            [row["reference"] for row in rows],
            [row["source"] for row in rows],
            {"similarity": np.array([row["similarity"] for row in rows])},
            np.array([row["language_consistency"] for row in rows]),
        )

    expected = metrics_lib.paired_bootstrap(arm("sft-1e-6"), arm("grpo"), 1400, seed=0)
    assert compare.resamples({arm.name: arm.group for arm in run.arms}) == 1400  # 14 in ""
    found = _pairs()["sft-1e-6", "grpo"]
    for metric, entry in expected.items():
        assert {key: found[metric][key] for key in entry} == pytest.approx(entry, rel=1e-6), metric


def _pairs() -> dict[tuple[str, str], dict]:
    return {(c["first"], c["second"]): c["metrics"] for c in one()["comparisons"]}


def test_holm_is_the_textbooks() -> None:
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.5, 0.9, 0.6]) == [1, 1, 1] and compare.holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lies_between_p_and_bonferroni(p: list[float]) -> None:
    found = compare.holm(p)
    assert all(a <= b <= min(1, a * len(p)) + 1e-12 for a, b in zip(p, found, strict=True))
    assert all(found[i] <= found[j] for i in range(len(p)) for j in range(len(p)) if p[i] < p[j])


def test_a_comparison_is_corrected_for_the_table_it_stands_in() -> None:
    """Against SFT stand all others of the group; of another group's arms, retention alone."""
    pairs = _pairs()
    members = [arm["name"] for arm in one()["arms"] if arm["group"] == ""]
    other = [arm["name"] for arm in one()["arms"] if arm["group"] == "transfer"]
    for reference, metric, rows in (
        ("sft-1e-6", "chrf++", members), ("grpo", "nll_mean", members), ("tm", "chrf++", members),
        ("base", "nll_mean", other),
    ):  # fmt: skip
        entries = {}
        for arm in rows:
            for pair, side in (((reference, arm), 0), ((arm, reference), 1)):
                if metric in pairs.get(pair, {}):
                    entries[arm] = pairs[pair][metric], side
        corrected = compare.holm([entry["p"] for entry, _ in entries.values()])
        assert [e["holm"][side] for e, side in entries.values()] == pytest.approx(corrected)
        assert len(entries) == {"chrf++": 13, "nll_mean": 11 if rows is members else 3}[metric]


def test_sign_test_is_exact() -> None:
    assert compare.sign_test(1, 9) == compare.sign_test(9, 1) == pytest.approx(22 / 1024)
    assert compare.sign_test(5, 5) == 1 and compare.sign_test(0, 0) == 1


def test_preferences_are_the_judges() -> None:
    judged = json.loads((seeds()[0] / "preference.json").read_text())
    assert list(judged) == [f"{e['first']}:{e['second']}" for e in one()["preferences"]]
    entry, own = one()["preferences"][0], judged["grpo:sft-1e-4"]
    outcomes = [item["outcome"] for item in own["items"]]
    for name in ("win", "tie", "lose"):
        assert entry[name]["value"] == pytest.approx(outcomes.count(name) / 19, rel=1e-6)
        assert entry[name]["low"] == pytest.approx(own["metrics"][name]["low"])
    assert (entry["judged"], entry["malformed"], entry["failed"]) == (19, 1, 0)
    same = [v in (["A", "B"], ["B", "A"], ["C", "C"]) for v in
            (item["verdicts"] for item in own["items"][:19])]  # fmt: skip
    assert entry["consistency"] == pytest.approx(sum(same) / 19, rel=1e-6)
    assert entry["favoured_first"] == [i["verdicts"] for i in own["items"]].count(["A", "A"])
    assert entry["p"] == pytest.approx(
        compare.sign_test(outcomes.count("win"), outcomes.count("lose")), rel=1e-6
    )
    assert entry["model"].startswith("judge <script>")
    files = [json.loads((path / "preference.json").read_text()) for path in seeds()]
    several = [file["grpo:sft-1e-4"]["metrics"]["win"]["value"] for file in files]
    found = averaged()["preferences"][0]
    assert found["win"]["value"] == pytest.approx(stats.mean(several), rel=1e-6)
    assert found["judged"] == 57 and found["p"] is None and found["holm"] is None


def test_costs_in_all_count_every_arm_once(tmp_path: Path) -> None:
    arms = (("cold", "sft", "base", ""), ("sft", "sft", "cold", ""), ("grpo", "grpo", "cold", ""),
            ("mix", "interpolate", "sft", ""))  # fmt: skip
    folder = tree(tmp_path / "run", arms=arms)
    config = json.loads((folder / "config.json").read_text())
    config["arms"][3]["overrides"] = {"interpolate": {"toward": "grpo"}}
    write(folder / "config.json", config)
    costs = report.read(folder)["costs"]
    assert costs["mix"]["total_tokens"] == 10_000 * (1 + 2 + 3 + 4)  # cold lies behind both
    assert costs["mix"]["total_seconds"] == pytest.approx(60.5 * 10)
    assert costs["grpo"]["total_tokens"] == 40_000 and "total_tokens" not in costs["base"]


def test_retention_is_paired_by_passage() -> None:
    pairs = {(c["first"], c["second"]): c["metrics"] for c in one()["comparisons"]}
    found = pairs["base", "grpo"]["nll_mean"]
    kept = [read_run(seeds()[0]).evaluations[a]["retention"] for a in ("base", "grpo")]
    rows = [np.array(entries["nll_mean"]["rows"]) for entries in kept]
    ratio = [table[:, 0].sum() / table[:, 1].sum() for table in rows]
    assert found["difference"] == pytest.approx(ratio[1] - ratio[0], rel=1e-6)
    own = one()["scores"]["grpo"]["retention"]["nll_mean"]
    # The passages differ more than the arms do, so pairing narrows the interval.
    assert 0 < found["high"] - found["low"] < 0.3 * (own["high"] - own["low"])
    (entry,) = (
        e for e in one()["tax"]
        if (e["group"], e["target"], e["retention"]) == ("", "similarity", "nll_mean")
    )  # fmt: skip
    (point,) = (p["x"] for p in entry["points"] if p["arm"] == "grpo")
    assert point["low"] == found["low"] and point["value"] == pytest.approx(found["difference"])


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.integers(0, 2**31))
def test_a_resampled_quantile_is_numpys(values: list[int], seed: int) -> None:
    counts = np.random.default_rng(seed).multinomial(len(values), [1 / len(values)] * len(values))
    array = np.array(values, float)
    found = compare._quantile(array, 0.9).score(counts.astype(float)[None])[0]
    assert found == pytest.approx(np.quantile(np.repeat(array, counts), 0.9))


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    folder = tree(tmp_path / "run", arms=ARMS[:1])
    path = folder / "evaluation" / "sft-1e-6.json"
    value = json.loads(path.read_text())
    value["retention"]["nll_mean"]["rows"] = [[1, 2, 3], [4, 5, 6]]
    write(path, value)
    with pytest.raises(ValueError, match="rows of nll_mean: wanted numbers or .sum, weight."):
        report.build(folder)


def test_tasks_are_columns_and_paired_only_on_the_same_questions(tmp_path: Path) -> None:
    folder = tree(tmp_path / "run", arms=ARMS[:3])
    names = ("base", *(name for name, *_ in ARMS[:3]))
    for number, name in enumerate(names):
        path = folder / "evaluation" / f"{name}.json"
        other = "other " if number == 3 else ""
        items = [
            {"question": f"{other}{i}", "scores": {"em": 100.0 * (i % 4 < 3 - number)}}
            for i in range(40)
        ]
        mean = stats.mean(item["scores"]["em"] for item in items)
        scores = {"em": {"value": mean, "low": mean - 5, "high": mean + 5}}
        result = {"reading/squad": {"metrics": scores, "items": items}}
        write(path, json.loads(path.read_text()) | {"tasks": result})
    found = report.read(folder)
    assert found["scores"]["base"]["retention"]["reading/squad/em"]["value"] == 75
    pairs = {(c["first"], c["second"]): c["metrics"] for c in found["comparisons"]}
    assert pairs["base", "sft-1e-6"]["reading/squad/em"]["difference"] == -25
    assert "reading/squad/em" not in pairs["base", "sft-1e-4"]
    (tax,) = (
        e for e in found["tax"]
        if (e["target"], e["retention"]) == ("chrf++", "reading/squad/em")
    )  # fmt: skip
    lost = {p["arm"]: p["x"]["value"] for p in tax["points"]}
    assert lost["base"] == 0 and lost["sft-1e-6"] == 25  # a fall is a loss
    assert "fall of reading/squad/em, against base" in report.render(found)


points = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


@given(points)
def test_the_front_holds_who_is_not_beaten(places: list[tuple[int, int]]) -> None:
    named = [
        {"arm": str(i), "x": {"value": x}, "y": {"value": y}} for i, (x, y) in enumerate(places)
    ]
    front = {int(arm) for arm in summary._front(named)}
    for i, (x, y) in enumerate(places):
        beaten = any(a <= x and b >= y and (a < x or b > y) for a, b in places)
        assert (i in front) == (not beaten)


def test_seeds_are_averaged_with_their_spread() -> None:
    found = averaged()
    runs = [report.read(path) for path in seeds()]
    score = found["scores"]["grpo"]["retention"]["nll_mean"]
    values = [run["scores"]["grpo"]["retention"]["nll_mean"]["value"] for run in runs]
    assert score["seeds"] == pytest.approx(values) and score["value"] == pytest.approx(
        stats.mean(values)
    )
    assert score["sd"] == pytest.approx(stats.stdev(values), rel=1e-6)
    assert score["high"] - score["value"] == pytest.approx(score["sd"], rel=1e-5)
    assert found["spread"] == "seeds" and found["seeds"] == [0, 1, 2]
    pairs = {(c["first"], c["second"]): c["metrics"] for c in found["comparisons"]}
    entry = pairs["sft-1e-6", "grpo"]["similarity"]
    assert entry["difference"] == pytest.approx(stats.mean(entry["seeds"]), rel=1e-6)
    assert entry["low"] < entry["difference"] < entry["high"]
    curve = found["curves"]["grpo"]["reward"]
    both = [run["curves"]["grpo"]["reward"]["values"][7] for run in runs]
    assert curve["values"][7] == pytest.approx(stats.mean(both), rel=1e-6)
    assert curve["sd"][7] == pytest.approx(stats.stdev(both), rel=1e-6)
    text = report.render(found)
    assert "Means of <b>3 seeds</b>" in text and "Each seed" in text
    tax = next(e for e in found["tax"] if e["retention"] == "nll_mean")
    lost = next(p["x"] for p in tax["points"] if p["arm"] == "grpo")
    base = [run["scores"]["base"]["retention"]["nll_mean"]["value"] for run in runs]
    shifts = [a - b for a, b in zip(values, base, strict=True)]
    assert lost["seeds"] == pytest.approx(shifts, rel=1e-5)


def test_an_arm_that_one_seed_lacks_is_averaged_over_the_others(tmp_path: Path) -> None:
    runs = [tree(tmp_path / str(seed), seed, arms=ARMS[:2]) for seed in range(2)]
    (runs[0] / "evaluation" / "sft-1e-5.json").unlink()
    found = report.read(runs)
    score = found["scores"]["sft-1e-5"]["retention"]["nll_mean"]
    assert score["seeds"][0] is None and score["value"] == score["seeds"][1]
    assert score["sd"] is None and score["low"] is None
    assert "–<br>" in report.render(found)


def test_runs_that_are_not_seeds_of_one_experiment_are_refused(tmp_path: Path, capsys) -> None:
    first, same, other, log = (tmp_path / name for name in ("one", "same", "other", "log"))
    for folder, seed in ((first, 0), (same, 0), (other, 1), (log, 2)):
        tree(folder, seed, arms=ARMS[:1])
    config = json.loads((other / "config.json").read_text())
    config["config"] |= {"grpo": {"beta": 0.5}, "evaluation": {"max_rows": 3}}
    write(other / "config.json", config)
    with pytest.raises(ValueError) as error:
        report.read([first, other])
    assert "grpo.beta: 0.01 and 0.5" in str(error.value)
    assert "evaluation.max_rows: 256 and 3" in str(error.value)
    with pytest.raises(ValueError, match="same seed 0"):
        report.read([first, same])
    config = json.loads((log / "config.json").read_text())
    config["config"] |= {"log": {"every": 7}, "seed": 2}  # changes nothing that is computed
    write(log / "config.json", config)
    assert report.read([first, log])["seeds"] == [0, 2]
    assert main([str(first), str(other)]) == 1 and "grpo.beta" in capsys.readouterr().err


def _target(score: float) -> dict:
    share = {"value": score / 100, "low": None, "high": None}
    chrf = {"value": score, "low": score - 1, "high": score + 1}
    return {"chrf++": chrf, "similarity": share, "language_consistency": share}


def test_table_in_plain_text() -> None:
    kept = {"nll_mean": 3.104, "kl_general": {"value": 0.25, "low": 0.2, "high": 0.3}}
    arms = {"copy": {"target": _target(5.0)}, "sft": {"target": _target(30.0), "retention": kept}}
    assert table(arms).splitlines() == [
        "               chrF++    sim  lang % │ NLL mean  KL(base‖·)",
        "───────────────────────────────────────────────────────────",
        "SFT         30.0 ±1.0  0.300    30.0 │    3.104       0.250",
        "copy floor   5.0 ±1.0  0.050     5.0 │        -           -",
    ]
    assert table(arms, ["copy"]).splitlines()[-1].startswith("copy floor")
    assert table(arms, ["copy"], {"copy": "so"}).splitlines()[-1].startswith("so  ")
    assert table({}) == "" and table({"base": {"arm": "base"}}) == ""


def test_wide_tables_break_their_headings_and_go_on_below() -> None:
    judges = {f"judge_similarity/multilingual-judge-{i}": _target(5.0)["chrf++"] for i in range(4)}
    others = {f"udhr/{key}": 1.0 for key in (*_target(1.0), "bleu", "rouge_l", "copy_rate")}
    tasks = {f"harness_{i}/accuracy": 0.5 for i in range(12)}
    name = "grpo-with-a-long-name-transfer"
    value = {"target": _target(5.0) | judges | others, "retention": {"nll_mean": 3.0, **tasks}}
    text = table({name: value, "base": value})
    assert max(map(len, text.splitlines())) <= 160
    assert text.count(f"\n{name} ") == text.count("\n\n") + 1 == 3
    words = text.replace("-", " ").replace("/", " ").replace("_", " ").split()
    assert words.count("judge") == 8 and words.count("accuracy") == 12 and "copies" not in words
    assert text.count(" │ ") > 2  # each part keeps the line between target and retention


def test_metrics_without_a_column_get_one() -> None:
    given = {
        "target": {"udhr/chrf++": 40.0, "judge_similarity/labse": 0.5, "odd": {"value": "x"}},
        "retention": {"arc/acc": 0.25, "toxicity": {"value": 2.0, "better": -1}},
    }
    found = {column.key: column for column in columns([given])}
    assert found["udhr/chrf++"].title == "udhr chrF++" and found["udhr/chrf++"].digits == 1
    assert found["judge_similarity/labse"].title == "judge sim labse"
    assert found["arc/acc"].better == 1 and found["arc/acc"].section == "retention"
    assert found["toxicity"].better == -1 and "odd" not in found


def test_arms_have_an_order_and_gaps_are_gaps() -> None:
    assert order(["tm", "grpo", "x", "copy", "base"]) == ["base", "grpo", "x", "copy", "tm"]
    chrf = COLUMNS[0]
    assert cell({}, chrf) is None and cell({"target": {"chrf++": None}}, chrf) is None
    assert cell({"target": {"chrf++": 7}}, chrf) == Cell(7.0, None, None)


def test_retention_fixture_has_the_value_of_its_rows() -> None:
    entry = retention([[2.0, 1], [4.0, 2]], 0.1, [1, 0])["nll_mean"]
    assert entry["value"] == pytest.approx(2.0)
