"""Arms in the report: what they are called, marked with, compared with and shown beside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from report_runs import ARMS, one, tree, write

from grpo_jax import report
from grpo_jax.report.page import view
from grpo_jax.report.page_compare import baselines


def pairs() -> dict[tuple[str, str], dict]:
    """The comparisons by their arms."""
    return {(c["first"], c["second"]): c["metrics"] for c in one()["comparisons"]}


def test_base_and_floors_are_called_so_in_every_group() -> None:
    arms = {arm["name"]: arm for arm in one()["arms"]}
    titles = {name: arms[f"{name}@transfer"]["title"] for name in ("base", "copy", "tm")}
    assert titles == {"base": "base", "copy": "copy floor", "tm": "TM floor"}
    assert "@" not in report.plain(one())
    (tax,) = (
        e for e in one()["tax"]
        if (e["group"], e["target"], e["retention"]) == ("transfer", "chrf++", "nll_mean")
    )  # fmt: skip
    lost = {point["arm"]: point["x"] for point in tax["points"]}
    assert lost["base@transfer"]["value"] == 0 and set(tax["floors"]) == {
        "copy@transfer", "tm@transfer"
    }  # fmt: skip
    scores = one()["scores"]
    kept = [scores[arm]["retention"]["nll_mean"]["value"] for arm in ("base", "headline-grpo")]
    assert lost["headline-grpo"]["value"] == pytest.approx(kept[1] - kept[0], abs=1e-6)
    assert lost["headline-grpo"]["low"] == pairs()["base", "headline-grpo"]["nll_mean"]["low"]


def test_an_arm_that_was_carried_over_keeps_its_mark() -> None:
    index = {arm["name"]: arm["index"] for arm in one()["arms"]}
    assert index["headline-grpo"] == index["grpo"] == 4 and index["headline-sft"] == 2
    own = [index[name] for name, _, _, group in ARMS if not group]
    assert own == list(range(11)) and index["base@transfer"] is None


def test_arms_are_first_compared_with_cold_start_strong_sft_and_base(tmp_path: Path) -> None:
    assert baselines(view(one()), "") == ["sft-1e-6", "sft-1e-4", "base"]
    # Of the transferred arms, those that come from these.
    assert baselines(view(one()), "transfer") == ["headline-sft", "base@transfer"]
    arms = (("cold", "sft", "base", ""), ("low", "sft", "cold", ""), ("high", "sft", "cold", ""),
            ("mid", "sft", "cold", ""), ("grpo", "grpo", "cold", ""),
            ("recover", "sft", "grpo", ""))  # fmt: skip
    folder = tree(tmp_path / "run", arms=arms, samples=3, steps=2)
    config = json.loads((folder / "config.json").read_text())
    for row, rate in zip(config["arms"], (None, 1e-6, 1e-3, 1e-4, None, 1.0), strict=True):
        row["overrides"] = {} if rate is None else {"sft": {"optimizer": {"learning_rate": rate}}}
    write(folder / "config.json", config)
    found = report.read(folder)
    assert baselines(view(found), "") == ["cold", "high", "base"]
    text = report.render(found)
    assert text.index('<optgroup label="Baselines">') < text.index('<optgroup label="Other arms">')
    assert "against cold, p" in text and "against high, p" in text  # what GRPO is worth


def test_stars_follow_the_corrected_p() -> None:
    text = report.render(one())
    start = text.index("Differences from sft-1e-6</caption>")
    table = text[start : text.index("</table>", start)]
    row = next(row for row in table.split("<tr ") if ">GRPO</th>" in row)
    cells = re.findall(r'data-value="([^"]+)" title="([^"]+)"><span class="(\w+)[^>]*>([^<]+)', row)
    columns = [c for c in view(one()).columns if c.key in pairs()["sft-1e-6", "grpo"]]
    by_difference = {
        f"{e['difference'] * c.scale:.8g}": e
        for c in columns for e in [pairs()["sft-1e-6", "grpo"][c.key]]
    }  # fmt: skip
    assert len(cells) >= 6 and {css for *_, css, _ in cells} == {"sure", "plain"}
    for value, hint, css, shown in cells:
        sure = by_difference[value]["holm"][0] < 0.05
        assert shown.endswith("*") == sure == (css == "sure") and "after Holm" in hint


def test_curves_show_the_budget_and_name_who_has_none(tmp_path: Path) -> None:
    folder = tree(tmp_path / "run", arms=ARMS[:1] + ARMS[4:6] + ARMS[9:10])
    config = json.loads((folder / "config.json").read_text())
    config["config"]["grpo"] = {"forgetting_budget": 0.25}
    write(folder / "config.json", config)
    rows = [
        {"stage": arm, "step": step, "forgetting/kl": step / 100, "beta": 0.04, "once": 1.0}
        for arm in ("grpo", "grpo-no-gate") for step in (10, 20)
    ]  # fmt: skip
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.write(json.dumps({"stage": "grpo", "step": 30, "eval/reward": 1.0}) + "\n")
        file.write(json.dumps({"stage": "grpo-no-gate", "step": 30, "eval/reward": 1.0}) + "\n")
    text = report.render(report.read(folder))
    assert "Without curves: mix-0.5." in text
    together, alone = text.split("Each arm by itself")
    assert "forgetting/<wbr>kl" in together and "dashed: the budget" in together
    assert "<b>beta</b>" in together and "weight of the KL" in together
    assert "eval/<wbr>reward" in alone and "eval/<wbr>reward" not in together  # one point is none
    assert together.count('class="floor" x1="44"') == 1 and alone.count('x1="44"') >= 2


def test_a_judge_has_a_section() -> None:
    text = report.render(one())
    start = text.index('<section id="judged"')
    part = text[start : text.index("</section>", start)]
    assert part.count("<tr class=") == 3 and "judge &lt;script&gt;" in part
    assert "the first arm was preferred in both orders" in part and "sign test" in part
