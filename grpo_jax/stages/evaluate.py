"""Measuring the arms on held-out rows: what was learned, what was kept, what is trivial.

Every arm completes its group's test rows greedily with the sampler that training uses. The base
does so for every group, and retention is measured against it: likelihood of general text, and the
forward KL on that text and on the task's own prompts, along the base's own completions. Two floors
stand beside them: copying the source, and looking up the nearest training source's target.
"""

from __future__ import annotations

import time
from typing import Any

from grpo_jax import report as report_lib
from grpo_jax.config_arms import BASE
from grpo_jax.config_dicts import flatten, stage_fields, to_dict
from grpo_jax.data.corpus import Example
from grpo_jax.evals.floors import copy_source, translation_memory
from grpo_jax.evals.metrics import translation_metrics
from grpo_jax.evals.preference import judge_arms
from grpo_jax.infra import distributed
from grpo_jax.infra.files import read_json, write_json
from grpo_jax.rewards.scorer import similarity
from grpo_jax.stages.generation import generate
from grpo_jax.stages.run import Run, Setting
from grpo_jax.stages.weights import load_params
from grpo_jax.structs import Row


def run_evaluate(run: Run) -> None:
    """Measures every finished arm and floor that has not been measured yet."""
    measure_base(run)
    for name in run.working:
        if run.workdir.arm_done(name) is not None:
            measure_arm(run, name)
    for group in run.groups:
        with run.workdir.alone("floors"):
            _measure_floors(run, group)
    judging = run.cfg.evaluation.preference
    if judging.base_url and distributed.is_main():
        samples = {name: result["samples"] for name, result in results(run).items()}
        verdicts = judge_arms(judging, samples, run.cfg.evaluation.bootstrap, run.cfg.data.seed)
        write_json(run.workdir.path / "preference.json", verdicts)


def measure_base(run: Run) -> None:
    """Measures the base on every group's rows; it must come before the arms."""
    for group, setting in run.groups.items():
        with run.workdir.alone(BASE):
            if _measured(run, _within(BASE, group), group) is None:
                params = load_params(run, BASE)
                _measure(run, _within(BASE, group), "base", group, setting, params)


def measure_arm(run: Run, name: str) -> None:
    """Writes evaluation/ARM.json unless it is there; the base must have been measured first."""
    arm = run.arms[name]
    if _measured(run, name, arm.group) is None:
        group = run.groups[arm.group]
        _measure(run, name, arm.method, arm.group, group, load_params(run, name))


def results(run: Run) -> dict[str, dict[str, Any]]:
    """All measured arms and floors."""
    files = sorted(run.workdir.evaluation.glob("*.json"))
    return {file.stem: found for file in files if (found := read_json(file)) is not None}


def report(run: Run) -> str:
    """Writes report.html and report.json and returns the table for the terminal."""
    with run.workdir.alone("report"):
        found = report_lib.read(run.workdir.path)
        if distributed.is_main():
            report_lib.write(found, run.workdir.path)
    return report_lib.plain(found)


def _measure(run: Run, name: str, method: str, group: str, setting: Setting, params: dict) -> None:
    began = time.monotonic()
    examples = _examples(run, setting)
    generated = generate(run, setting.cfg, params, examples)
    result = _score(run, setting, generated.texts, examples)
    for sample, ids in zip(result["samples"], generated.ids, strict=True):
        sample["ids"] = ids
    for test_set, others in {} if group else run.out_of_domain.items():
        texts = generate(run, setting.cfg, params, others).texts
        scores = _score(run, setting, texts, others)["target"]
        result["target"] |= {f"{test_set}/{metric}": entry for metric, entry in scores.items()}
    continuations = result if method == "base" else _measured(run, _within(BASE, group), group)
    assert continuations is not None, "base is measured before the arms that are compared with it"
    base = params if method == "base" else load_params(run, BASE)
    pairs = zip(examples, continuations["samples"], strict=True)
    answers = [Example(example.row, example.prompt_ids, sample["ids"]) for example, sample in pairs]
    result["retention"] = run.retention.general(base, params)
    result["retention"] |= run.retention.task(base, params, answers, setting.cfg)
    del base
    result["tasks"] = run.tasks.run(params)
    result["tokens"] = sum(len(ids) for ids in generated.ids)
    result["completions"] = {"clipped_ratio": float(1 - generated.ended.mean())}
    result["seconds"] = time.monotonic() - began
    if method != "base":
        result["cost"] = run.workdir.arm_cost(name)
    _write(run, name, method, group, result)


def _measure_floors(run: Run, group: str) -> None:
    setting = run.groups[group]
    examples = _examples(run, setting)
    sources = [example.row.source for example in examples]
    if _measured(run, _within("copy", group), group) is None:
        scores = _score(run, setting, copy_source(sources), examples)
        _write(run, _within("copy", group), "floor", group, scores)
    if _measured(run, _within("tm", group), group) is None:
        corpus = setting.corpus
        seen = list(dict.fromkeys(example.row for example in corpus.cold_start + corpus.train))
        found = translation_memory(
            sources, [row.source for row in seen], [row.target for row in seen]
        )
        scores = _score(run, setting, found, examples)
        _write(run, _within("tm", group), "floor", group, scores)


def _within(name: str, group: str) -> str:
    """The name of what is measured in every group: base, copy, tm; base@transfer in "transfer"."""
    return f"{name}@{group}" if group else name


def _examples(run: Run, setting: Setting) -> list[Example]:
    return setting.corpus.test[: run.cfg.evaluation.max_rows]


def _measured(run: Run, name: str, group: str) -> dict[str, Any] | None:
    """The evaluation of an arm, if it was made with this configuration."""
    found = read_json(run.workdir.evaluation / f"{name}.json")
    return found if found is not None and found["inputs"] == _inputs(run, group) else None


def _inputs(run: Run, group: str) -> dict[str, Any]:
    """The fields that decide what is measured; the preference judge comes after it."""
    fields = stage_fields(to_dict(run.cfg), "evaluate")
    cfg = run.groups[group].cfg
    sections = {"model": cfg.model, "encoder": cfg.encoder, "data": cfg.data}
    fields |= flatten({name: to_dict(section) for name, section in sections.items()})
    fields["reward.language"] = cfg.reward.language
    apart = ("evaluation.preference.", "encoder.batch_size", "model.remat", "model.padding_free")
    return {k: v for k, v in fields.items() if not k.startswith(apart)}


def _write(run: Run, name: str, method: str, group: str, result: dict[str, Any]) -> None:
    if distributed.is_main():
        head = {"arm": name, "method": method, "group": group, "inputs": _inputs(run, group)}
        write_json(run.workdir.evaluation / f"{name}.json", head | result)


def _score(run: Run, setting: Setting, texts: list[str], examples: list[Example]) -> dict[str, Any]:
    """Target metrics and samples of one system's outputs."""
    rows = [example.row for example in examples]
    anchors = [row.target or row.source for row in rows]
    in_language = setting.scorer.gate(texts)
    cosines = {"similarity": setting.scorer.similarity(texts, anchors)}
    cosines |= {key: similarity(judge, texts, anchors) for key, judge in run.judges.items()}
    target = translation_metrics(
        texts,
        [row.target for row in rows],
        [row.source for row in rows],
        cosines,
        in_language,
        run.cfg.evaluation.bootstrap,
        run.cfg.data.seed,
    )
    samples = []
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        scores = {name: float(values[i]) for name, values in cosines.items()}
        scores["language_consistency"] = int(in_language[i])
        samples.append(_sample(text, row) | scores)
    return {"target": target, "samples": samples}


def _sample(text: str, row: Row) -> dict[str, Any]:
    return {"source": row.source, "reference": row.target, "completion": text}
