"""Measuring the arms on held-out rows: what was learned, what was kept, what is trivial.

Every arm (base, then each training stage) completes the same test rows greedily with the sampler
that training uses. Retention is measured against *base*: likelihood of general text, and the
forward KL on that text and on the task's own prompts, along the base's own completions. Two floors
stand beside them: copying the source, and looking up the nearest training source's target.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from grpo_jax.config_dicts import stage_fields, to_dict
from grpo_jax.data.batches import in_order, sft_batch
from grpo_jax.data.corpus import Example
from grpo_jax.evals import report as report_lib
from grpo_jax.evals.floors import copy_source, translation_memory
from grpo_jax.evals.metrics import translation_metrics
from grpo_jax.evals.preference import judge_arms
from grpo_jax.evals.retention import summarise
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.workdir import read_json, write_json
from grpo_jax.rewards.scorer import similarity
from grpo_jax.stages.generation import generate
from grpo_jax.stages.run import Run, load_params
from grpo_jax.structs import Row


def run_evaluate(run: Run) -> None:
    """Measures every arm that has not been measured yet, and the floors."""
    for arm in run.arms:
        measure_arm(run, arm)
    examples = _examples(run)
    sources = [example.row.source for example in examples]
    if _measured(run, "copy") is None:
        _write(run, "copy", _score(run, copy_source(sources), examples))
    if _measured(run, "tm") is None:
        seen = _distinct(run.corpus.cold_start + run.corpus.train)
        found = translation_memory(
            sources, [row.source for row in seen], [row.target for row in seen]
        )
        _write(run, "tm", _score(run, found, examples))
    if run.cfg.evaluation.preference.base_url and distributed.is_main():
        cfg = run.cfg.evaluation
        samples = {arm: result["samples"] for arm, result in results(run).items()}
        verdicts = judge_arms(cfg.preference, samples, cfg.bootstrap, run.cfg.data.seed)
        write_json(run.workdir.path / "preference.json", verdicts)


def measure_arm(run: Run, arm: str) -> None:
    """Writes evaluation/ARM.json unless it is there; the base must have been measured first."""
    if _measured(run, arm) is not None:
        return
    began = time.monotonic()
    params = load_params(run, arm)
    examples = _examples(run)
    generated = generate(run, {"params": params}, examples)
    result = _score(run, generated.texts, examples)
    for sample, ids in zip(result["samples"], generated.ids, strict=True):
        sample["ids"] = ids
    continuations = result if arm == "base" else _measured(run, "base")
    assert continuations is not None, "base is measured before the arms that are compared with it"
    base = params if arm == "base" else load_params(run, "base")
    result["retention"] = _retention(run, base, params, continuations["samples"])
    result["tasks"] = run.tasks.run(params)
    result["tokens"] = sum(len(ids) for ids in generated.ids)
    result["completions"] = {"clipped_ratio": float(1 - generated.ended.mean())}
    result["seconds"] = time.monotonic() - began
    _write(run, arm, result)


def results(run: Run) -> dict[str, dict[str, Any]]:
    """All measured arms and floors."""
    files = sorted(run.workdir.evaluation.glob("*.json"))
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}


def report(run: Run) -> str:
    """Writes report.html and report.json and returns the table for the terminal."""
    found = report_lib.read(run.workdir.path)
    if distributed.is_main():
        report_lib.write(found, run.workdir.path)
    return report_lib.plain(found)


def _examples(run: Run) -> list[Example]:
    return run.corpus.test[: run.cfg.evaluation.max_rows]


def _measured(run: Run, arm: str) -> dict[str, Any] | None:
    """The arm's evaluation, if it was made with this configuration."""
    found = read_json(run.workdir.evaluation / f"{arm}.json")
    return found if found is not None and found["inputs"] == _inputs(run) else None


def _inputs(run: Run) -> dict[str, Any]:
    """The fields that decide what is measured; the preference judge comes after it."""
    fields = stage_fields(to_dict(run.cfg), "evaluate")
    return {k: v for k, v in fields.items() if not k.startswith("evaluation.preference.")}


def _write(run: Run, arm: str, result: dict[str, Any]) -> None:
    if distributed.is_main():
        path = run.workdir.evaluation / f"{arm}.json"
        write_json(path, {"arm": arm, "inputs": _inputs(run), **result})


def _score(run: Run, texts: list[str], examples: list[Example]) -> dict[str, Any]:
    """Target metrics and samples of one system's outputs."""
    rows = [example.row for example in examples]
    anchors = [row.target or row.source for row in rows]
    in_language = run.scorer.gate(texts)
    cosines = {"similarity": run.scorer.similarity(texts, anchors)}
    if run.judge is not None:
        cosines["judge_similarity"] = similarity(run.judge, texts, anchors)
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


def _retention(
    run: Run, base: dict, params: dict, continuations: list[dict[str, Any]]
) -> dict[str, Any]:
    """Likelihood and drift on general text, and drift along the base's answers to the task.

    A measure is {"value": ..., "rows": [[sum, tokens], ...]}, a row a passage or a prompt, so that
    arms can be compared in pairs.
    """
    data, limit = run.cfg.data, run.cfg.evaluation.max_retention_length
    nothing = Row("", "", "")
    out: dict[str, Any] = {}
    if run.retention:
        passages = [Example(nothing, ids[:1], ids[1:]) for ids in run.retention]
        nll, kl, lengths = _sum_over_tokens(run, base, params, passages, 1, limit)
        scores = summarise(nll, kl, lengths)
        out["nll_mean"] = {"value": scores["nll_mean"], "rows": _rows(nll, lengths)}
        out["nll_p90"] = scores["nll_p90"]  # its interval comes from nll_mean's rows
        out["kl_general"] = {"value": scores["kl"], "rows": _rows(kl, lengths)}
    answers = [
        Example(example.row, example.prompt_ids, sample["ids"])
        for example, sample in zip(_examples(run), continuations, strict=True)
    ]
    nll, kl, lengths = _sum_over_tokens(
        run, base, params, answers, data.max_prompt_length, data.max_completion_length
    )
    value = summarise(nll, kl, lengths)["kl"]
    return out | {"kl_task": {"value": value, "rows": _rows(kl, lengths)}}


def _rows(sums: np.ndarray, lengths: np.ndarray) -> list[list[float]]:
    return np.stack([sums, lengths], axis=1).tolist()


def _sum_over_tokens(
    run: Run, base: dict, params: dict, examples: list[Example], prompts: int, limit: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL and KL summed over each example's completion, and its length: float64 [N] each."""
    parts = []
    for indices, count in in_order(len(examples), run.cfg.evaluation.batch_size):
        batch = sft_batch(examples, indices, prompts, limit)
        values = run.drift(base, params, mesh_lib.put_same(run.mesh, batch))
        columns = [*map(mesh_lib.fetch, values), batch.mask]
        parts.append([np.float64(x).sum((1, 2))[:count] for x in columns])
    nll, kl, lengths = (np.concatenate(column) for column in zip(*parts, strict=True))
    return nll, kl, lengths


def _distinct(examples: list[Example]) -> list[Row]:
    return list(dict.fromkeys(example.row for example in examples))
