"""Out of memory: which phase of a run it was, and which fields to lower; `phase` says it.

XLA's error names a size and nothing that a user has set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from grpo_jax.config import Config
from grpo_jax.config_dicts import AFTER_TRAINING, CADENCE, flatten, to_dict, under

# Phase -> fields that make it need less, and the direction; {} is the section of the arm.
_REMEDIES: dict[str, dict[str, str]] = {
    "loading": {
        "mesh.fsdp": "more devices share the weights",
        "model.param_dtype": "bfloat16 halves them",
        "model.lora.rank": "above 0 trains an adapter, without moments of the whole model",
    },
    "sampling": {
        "grpo.lanes": "lower, fewer completions of a prompt are drawn at one time",
        "{}.prompts_per_step": "lower",
        "data.max_completion_length": "lower",
        "mesh.data": "more devices share the prompts",
    },
    "scoring": {  # meanwhile the device computes the reference's log-probs
        "encoder.batch_size": "lower",
        "encoder.max_length": "lower",
        "{}.gradient_accumulation_steps": "raise, the reference sees fewer prompts at one time",
    },
    "the update": {
        "{}.gradient_accumulation_steps": "raise, fewer prompts at one time",
        "model.remat": "True recomputes instead of keeping",
        "model.remat_policy": "full keeps no products",
        "mesh.fsdp": "more devices share weights and moments",
        "{}.optimizer.moment_dtype": "bfloat16 halves the first moment",
        "model.lora.rank": "above 0 trains an adapter",
    },
    "evaluation": {
        "evaluation.batch_size": "lower",
        "evaluation.max_retention_length": "lower",
        "evaluation.max_task_length": "lower",
        "mesh.fsdp": "more devices share the weights",
    },
}
_SECTIONS = {"recover": "recover.sft", "self_sft": "self_sft.sft"}


@contextmanager
def phase(name: str | Callable[[], str], cfg: Config, method: str = "grpo") -> Iterator[None]:
    """Turns an exhausted memory within it into one message.

    Args:
      name: of the phase, a key of the table above, or a function that gives it when asked.
      cfg: the run's, for the values that the fields have now.
      method: of the arm that is trained.

    Raises:
      MemoryError: the phase, XLA's own sentence, and what to lower.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        found = str(error).strip()
        exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in found
        if not exhausted or "What helps" in found:  # said by a phase within this one
            raise
        at = name if isinstance(name, str) else name()
        words = found.splitlines()[0][:300] if found else "the host's memory is full"
        raise MemoryError(
            f"out of memory in {at}: {words.rstrip('.')}. What helps:{_advice(at, cfg, method)}"
        ) from error


def _advice(name: str, cfg: Config, method: str) -> str:
    section = _SECTIONS.get(method, method)
    if name == "sampling" and method == "self_sft":
        section = "self_sft"
    values: dict[str, Any] = flatten(to_dict(cfg))
    free = CADENCE + sum(AFTER_TRAINING.values(), ())
    lines = {True: "", False: ""}
    for field, how in _REMEDIES[name].items():
        field = field.format(section)
        if field == "grpo.lanes" and method != "grpo":
            continue
        lines[under(field, free)] += f"\n  {field} (now {values[field]}): {how}"
    text = ""
    if lines[True]:
        text += f"{lines[True]}\n  (these may change, and the same command goes on)"
    if lines[False]:
        text += f"{lines[False]}\n  (these belong to what is trained: another --workdir)"
    return text
