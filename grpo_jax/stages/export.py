"""Finished arms as ordinary Hugging Face folders, each with a model card."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax

from grpo_jax import hub
from grpo_jax.config_arms import interpolation
from grpo_jax.hub.folder import split_hub_id
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.report.table import COLUMNS, cell
from grpo_jax.stages.evaluate import results
from grpo_jax.stages.run import Run
from grpo_jax.stages.weights import load_adapter, load_params

_log = logging.getLogger(__name__)


def run_export(run: Run) -> None:
    """Writes export/ARM/, and with LoRA ARM-adapter/, for `export.arms` or the last trained arm."""
    cfg = run.cfg
    for arm in [name for name in cfg.export.arms or [*run.arms][-1:] if name in run.working]:
        params = jax.tree.map(mesh_lib.fetch, load_params(run, arm))
        folder = run.workdir.export / arm
        if distributed.is_main():
            policy = dataclasses.replace(run.base, params=params)
            hub.save_decoder(policy, folder, model_card(run, arm), cfg.export.dtype)
            _log.info("exported %s to %s", arm, folder)
        del params
        if cfg.model.lora.rank and cfg.export.adapter:
            adapter = load_adapter(run, arm)
            folder = run.workdir.export / f"{arm}-adapter"
            if distributed.is_main():
                hub.save_adapter(run.base, adapter, folder, model_card(run, arm, adapter.rank))
                _log.info("exported the adapter of %s to %s", arm, folder)


def model_card(run: Run, arm: str, adapter_rank: int = 0) -> str:
    """README.md of an exported model: base, data, method, scores.

    Args:
      adapter_rank: of the adapter that is written alone; 0 for a whole model.
    """
    cfg, own = run.cfg, run.arms[arm].cfg
    chain = run.ancestors(arm)
    steps = ", then ".join(_step(run, name) for name in chain)
    lora = cfg.model.lora
    weights = f"LoRA rank {lora.rank}, merged" if lora.rank else "full fine-tuning"
    if adapter_rank:
        stages = " + ".join(chain)
        weights = f"LoRA rank {lora.rank} a stage; this adapter, rank {adapter_rank}, is {stages}"
    hub_id = split_hub_id(cfg.model.path)[0] if not Path(cfg.model.path).is_dir() else ""
    lines = [
        "---",
        f"library_name: {'peft' if adapter_rank else 'transformers'}",
        *([f"base_model: {hub_id}"] if hub_id else []),
        f"tags: [{'lora, ' if adapter_rank else ''}grpo, low-resource, {own.reward.language}]",
        "---",
        f"# {run.base.folder.name}, {arm}",
        "",
        f"- **Base model:** {cfg.model.path}",
        *dict.fromkeys(_data(run, name) for name in chain),
        f"- **Method:** {steps}; {weights}; seed {run.workdir.seed}",
        f"- **Prompt:** `{json.dumps(own.data.prompt, ensure_ascii=False)}`"
        + (" in the chat template" if own.data.chat else ""),
    ]
    for rewarded in [run.arms[name] for name in chain if run.arms[name].method == "grpo"]:
        reward = rewarded.cfg.reward
        measure = f"cosine under {cfg.encoder.path}" if reward.metric == "cosine" else reward.metric
        lines.append(
            f"- **Reward of {rewarded.name}:** {measure} with the {reward.anchor}, weight "
            f"{reward.semantic_weight:g}, and a language gate for {reward.language}, weight "
            f"{reward.language_weight:g}, after arXiv 2605.14366"
        )
    if unused := run.base.weights.unused:
        parts = sorted({_part(name) for name in unused})
        lines.append(
            f"- **Left out:** {len(unused)} tensors of the base that are not of its language model "
            f"({', '.join(parts)})"
            + ("; load the adapter on the language model alone" if adapter_rank else "")
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


def _step(run: Run, name: str) -> str:
    """What was done in an arm, in words."""
    arm = run.arms[name]
    if arm.method == "interpolate":
        toward, weight = interpolation(run.workdir.arms[name])
        return f"{weight:g} of the way to {toward} ({name})"
    words = {
        "sft": "supervised fine-tuning",
        "self_sft": "SFT on the best of its own samples",
        "grpo": "GRPO",
        "recover": "SFT",
    }
    return f"{words[arm.method]} ({name})"


def _data(run: Run, name: str) -> str:
    arm = run.arms[name]
    return (
        f"- **Data:** {arm.cfg.data.train}; SFT drew from {len(arm.corpus.cold_start)} rows, GRPO "
        f"from {len(arm.corpus.train)}"
    )


def _part(name: str) -> str:
    """The part of a model that a tensor belongs to: vision_tower of model.vision_tower.x.y."""
    return name.removeprefix("model.").split(".")[0]
