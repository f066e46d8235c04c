"""Finished arms as ordinary Hugging Face folders, each with a model card."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax

from grpo_jax import hub
from grpo_jax.evals.table import COLUMNS, cell
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.stages.evaluate import results
from grpo_jax.stages.run import Run, load_params

_log = logging.getLogger(__name__)


def run_export(run: Run) -> None:
    """Writes export/ARM/ for `export.arms`, or for the last trained arm."""
    for arm in run.cfg.export.arms or run.arms[-1:]:
        params = jax.tree.map(mesh_lib.fetch, load_params(run, arm))
        if distributed.is_main():
            policy = dataclasses.replace(run.base, params=params)
            folder = run.workdir.export / arm
            hub.save_decoder(policy, folder, model_card(run, arm), run.cfg.export.dtype)
            _log.info("exported %s to %s", arm, folder)


def model_card(run: Run, arm: str) -> str:
    """README.md of an exported model: base, data, method, scores."""
    cfg = run.cfg
    method = {
        "sft": "supervised fine-tuning",
        "grpo": "GRPO",
        "recover": "SFT",
    }
    chain = run.arms[1 : run.arms.index(arm) + 1]
    steps = ", then ".join(f"{method[stage]} ({stage})" for stage in chain) or "no training"
    lora = cfg.model.lora
    weights = f"LoRA rank {lora.rank}, merged" if lora.rank else "full fine-tuning"
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [grpo, low-resource, {cfg.reward.language}]",
        "---",
        f"# {run.base.folder.name}, {arm}",
        "",
        f"- **Base model:** {cfg.model.path}",
        f"- **Data:** {cfg.data.train}; SFT drew from {len(run.corpus.cold_start)} rows, GRPO from "
        f"{len(run.corpus.train)}",
        f"- **Method:** {steps}; {weights}; seed {run.workdir.seed}",
        f"- **Prompt:** `{json.dumps(cfg.data.prompt, ensure_ascii=False)}`"
        + (" in the chat template" if cfg.data.chat else ""),
    ]
    if "grpo" in chain:
        lines.append(
            f"- **Reward:** cosine under {cfg.encoder.path} and a language gate for "
            f"{cfg.reward.language}, after arXiv 2605.14366"
        )
    lines += [
        "",
        "Trained with grpo_jax. Weights of the base model keep its licence.",
    ]
    evaluations = {name: found for name, found in results(run).items() if name in ("base", arm)}
    if evaluations:
        names = list(evaluations)
        lines += [
            "",
            "| held-out metric | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for column in COLUMNS:
            cells = [cell(evaluations[name], column) for name in names]
            if any(cells):
                shown = [f"{c.value:.{column.digits}f}" if c else "" for c in cells]
                lines.append(f"| {column.title} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
