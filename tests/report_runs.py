"""Working directories as runs leave them, of invented numbers, for the tests of the report."""

from __future__ import annotations

import atexit
import functools
import json
import random
import shutil
import tempfile
from pathlib import Path

from grpo_jax import report
from grpo_jax.evals import preference

EVIL = "<script>alert('x')</script> \"quoted\" & {{title}} </textarea>"
SCRIPTS = ("the file is open", "ཡིག་སྣོད་འདི་ཁ་ཕྱེ།", "ھۆججەت ئېچىلدى", "文件已打开", "መዝገቡ ተከፈተ")
ARMS = (
    ("sft-1e-6", "sft", "base", ""),
    ("sft-1e-5", "sft", "base", ""),
    ("sft-1e-4", "sft", "base", ""),
    ("self_sft", "self_sft", "sft-1e-6", ""),
    ("grpo", "grpo", "sft-1e-6", ""),
    ("grpo-no-gate", "grpo", "sft-1e-6", ""),
    ("grpo-bleu", "grpo", "sft-1e-6", ""),
    ("grpo-beta-0", "grpo", "sft-1e-6", ""),
    ("grpo-shuffled", "grpo", "sft-1e-6", ""),
    ("mix-0.5", "interpolate", "grpo", ""),
    ("recover", "recover", "grpo", ""),
    ("headline-sft", "sft", "sft-1e-4", "transfer"),
    ("headline-grpo", "sft", "grpo", "transfer"),
)
PAIRS = ("grpo:sft-1e-4", "grpo:sft-1e-6", "headline-grpo:headline-sft")  # for the judge


def tree(
    folder: Path, seed: int = 0, samples: int = 12, steps: int = 30, arms: tuple = ARMS
) -> Path:
    """A run of many arms with groups, costs, per-passage rows and a task."""
    rng = random.Random(seed)
    (folder / "evaluation").mkdir(parents=True)
    rows = [
        {"name": n, "method": m, "start": s, "group": g, "overrides": {"sft.max_steps": i}}
        for i, (n, m, s, g) in enumerate(arms)
    ]
    config = {"model": {"path": "tiny"}, "data": {"seed": 0}, "stages": ["evaluate"]}
    config |= {"evaluation": {"preference": {"model": f"judge {EVIL}"}}}
    write(
        folder / "config.json",
        {"config": config, "arms": rows, "seed": seed, "devices": {"kind": "cpu"}},
    )
    lines = []
    for name, method, _, _ in arms:
        for step in range(steps if method != "interpolate" else 0):
            value = step / steps + rng.gauss(0, 0.05)
            row = {"stage": name, "step": step, "loss": 2 - value, "dev/similarity": value / 2}
            if method == "grpo":
                row |= {"reward": value, "reward_std": 0.1, "kl": 0.01 * step}
                row |= {"rewards/semantic/mean": value / 2, "rewards/semantic/std": 0.05}
            lines.append(json.dumps(row))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    passages = [(rng.uniform(60, 90), 25) for _ in range(30)]
    for place, (name, _, _, group) in enumerate([("base", "base", "", ""), *arms]):
        shift = 0.0 if name == "base" else 0.02 * (place * 5 % 13) + 0.01 * rng.random()
        skill = 0.1 if name == "base" else 0.3 + 0.03 * (place * 8 % 13)
        value = evaluation(name, group, skill, shift, samples, rng)
        nll = [[total + shift * n + rng.gauss(0, 0.3) * shift, n] for total, n in passages]
        value["retention"] = retention(nll, shift, [int(rng.random() > shift) for _ in range(40)])
        if name != "base":
            value["cost"] = {"tokens": 10_000 * place, "seconds": 60.5 * place, "peak_bytes": 2**31}
        write(folder / "evaluation" / f"{name}.json", value)
    # What is measured in every group; a group's name may be no file name.
    for group in dict.fromkeys(["", *(g for *_, g in arms if g.isidentifier())]):
        for floor, skill in (("copy", 0.02), ("tm", 0.2)):
            name = f"{floor}@{group}" if group else floor
            value = evaluation(name, group, skill, 0.0, samples, rng)
            write(folder / "evaluation" / f"{name}.json", value | {"method": "floor"})
        if group:
            value = evaluation(f"base@{group}", group, 0.1, 0.0, samples, rng)
            known = json.loads((folder / "evaluation" / "base.json").read_text())["retention"]
            value |= {"method": "base", "retention": known}
            write(folder / "evaluation" / f"base@{group}.json", value)
    names = {name for name, *_ in arms}
    pairs = [pair for pair in PAIRS if names.issuperset(pair.split(":"))]
    if pairs:
        write(folder / "preference.json", {pair: verdicts(rng) for pair in pairs})
    return folder


@functools.cache
def seeds() -> list[Path]:
    """Three seeds of an experiment with many arms, made once; nobody may change them."""
    root = Path(tempfile.mkdtemp(prefix="grpo_jax_seeds"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return [tree(root / f"seed{seed}", seed) for seed in range(3)]


@functools.cache
def one() -> dict:
    """The report of the first seed; nobody may change it."""
    return report.read(seeds()[0])


@functools.cache
def averaged() -> dict:
    """The report of all seeds; nobody may change it."""
    return report.read(seeds())


def verdicts(rng: random.Random) -> dict:
    """What a judge says of a pair: 20 contests, one of them without a verdict."""
    replies = [(rng.choice("AABC"), rng.choice("BBAC")) for _ in range(19)] + [("A", "malformed")]
    items = [
        {"source": f"madda {i}", "outcome": preference.outcome(*both), "verdicts": list(both),
         "texts": ["[[A]]", "[[B]]"]}
        for i, both in enumerate(replies)
    ]  # fmt: skip
    return {**preference.summarise(items, bootstrap=50, seed=0), "items": items}


def evaluation(
    arm: str, group: str, skill: float, shift: float, samples: int, rng: random.Random
) -> dict:
    rows = []
    for i in range(samples):
        reference = f"{SCRIPTS[i % len(SCRIPTS)]} {i}"
        words = reference.split() if rng.random() < skill else ["another", "text", str(i)]
        cosine = min(1.0, max(-1.0, skill + rng.gauss(0, 0.1)))
        rows.append(
            {
                "source": f"{group} madda {i}",
                "reference": reference,
                "completion": " ".join(words) if i % 7 else EVIL,
                "similarity": cosine,
                "judge_similarity": cosine - 0.05,
                "language_consistency": int(i % 5 > 0),
            }
        )
    target = {
        "chrf++": {"value": 100 * skill, "low": 100 * skill - 2, "high": 100 * skill + 2},
        "similarity": {"value": skill, "low": skill - 0.02, "high": skill + 0.02},
        "judge_similarity": {"value": skill - 0.05, "low": skill - 0.07, "high": skill - 0.03},
        "language_consistency": {"value": 0.8, "low": 0.7, "high": 0.9},
        "copy_rate": {"value": 0.1, "low": 0.0, "high": 0.2},
        "udhr/chrf++": {"value": 50 * skill, "low": 40 * skill, "high": 60 * skill},
    }
    return {
        "arm": arm,
        "group": group,
        "target": target,
        "samples": rows,
        "seconds": 3.5,
        "tokens": 99,
    }


def retention(nll: list[list[float]], kl: float, answers: list[int]) -> dict:
    tokens = sum(n for _, n in nll)
    means = sorted(total / n for total, n in nll)
    return {
        "nll_mean": {"value": sum(total for total, _ in nll) / tokens, "rows": nll},
        "nll_p90": means[int(0.9 * len(means))],
        "kl_general": {"value": kl, "low": 0.9 * kl, "high": 1.1 * kl},
        "kl_task": 2 * kl,
        "multiple_choice/accuracy": {"value": sum(answers) / len(answers), "rows": answers},
    }


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
