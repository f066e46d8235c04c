"""Low-rank adapters in PEFT's form: adapter_config.json and adapter_model.safetensors.

In: an adapter that PEFT or `save_adapter` wrote. Out: the tree of models.lora. What is saved loads
with peft.PeftModel.from_pretrained on the base model. Variants of LoRA that compute something else
(DoRA, other ranks for single layers, trained embeddings, ...) are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import jax

from grpo_jax.hub.decoder import Policy, save_companions
from grpo_jax.hub.folder import atomic_folder, find_folder, read_object, split_hub_id
from grpo_jax.hub.names import decoder_table
from grpo_jax.hub.tensors import Slot
from grpo_jax.hub.weights import open_weights
from grpo_jax.hub.writing import unstack, write_safetensors
from grpo_jax.text.strict import listed, plain, shown

_CONFIG = "adapter_config.json"
_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of adapter_config.json that say nothing about what is computed.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
}  # fmt: skip
# Ways to start an adapter that leave the base model's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """W + alpha / rank A B for the linear layers that `params` names."""

    params: dict  # as models.lora has it: lora_a [L, in, r], lora_b [L, r, out]
    rank: int
    alpha: float
    dropout: float = 0.0

    @property
    def targets(self) -> tuple[str, ...]:
        """The last names of the adapted linear layers."""
        paths = jax.tree_util.tree_leaves_with_path(self.params)
        return tuple(sorted({path[-2].key for path, _ in paths}))


def save_adapter(
    policy: Policy, adapter: Adapter, folder: str | os.PathLike, card: str = ""
) -> None:
    """Write the adapter alone, with tokenizer and generation settings, complete or not at all.

    Args:
      policy: the base model, as it was loaded.
      adapter: its params must be whole on this process; they keep their dtype.
      folder: where to; a model or adapter folder that is there is replaced.
      card: the README.md.

    Raises:
      ValueError: an adapter that does not fit the model or its rank, or another folder.
      OSError: the disk is full or not writable; what was there before still is.
    """
    linears = _linears(policy)
    fitting = {path for path in linears if _has(adapter.params, path)}
    tensors = unstack(adapter.params, _table(policy, fitting, adapter.rank))
    if len(jax.tree.leaves(adapter.params)) != 2 * len(fitting):
        raise ValueError(
            f"the adapter has {adapter.targets}, the model only "
            f"{sorted({path[-1] for path in linears})}"
        )
    name, revision = split_hub_id(policy.source)
    is_hub_id = bool(name) and not Path(policy.source).expanduser().is_dir()
    alpha = int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else adapter.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name if is_hub_id else str(policy.folder.absolute()),
        "revision": revision if is_hub_id else None,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    with atomic_folder(Path(folder)) as out:
        (out / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        title = f"# {Path(folder).name}\n\nA LoRA adapter for {policy.source}.\n"
        save_companions(policy, out, card or title)
        write_safetensors(out, tensors, name=_FILE)


def load_adapter(policy: Policy, path: str | os.PathLike, param_dtype: str = "float32") -> Adapter:
    """Read an adapter of `policy`'s model, strictly.

    Args:
      policy: the base model.
      path: a folder, or a hub id, NAME/NAME or NAME/NAME@REVISION.
      param_dtype: float32, bfloat16 or float16.

    Returns:
      An Adapter of NumPy arrays. rsLoRA's scale, alpha / sqrt(r), is turned into an alpha.

    Raises:
      FileNotFoundError: no adapter there.
      ValueError: a variant that is not implemented, or tensors that do not fit, all listed.
    """
    folder = find_folder(path)
    file = folder / _CONFIG
    config = read_object(file)
    problems = _problems(config)
    if problems:
        raise ValueError(f"{file}: cannot be loaded:\n  " + listed(problems))
    rank, alpha = config["r"], float(config.get("lora_alpha", 8))
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    chosen = _chosen(file, config.get("target_modules"), _linears(policy))
    if not (folder / _FILE).is_file():
        raise FileNotFoundError(
            f"{folder}: no {_FILE}; pickled adapters (.bin) are never read: save it as safetensors"
        )
    table = _table(policy, chosen, rank)
    params = open_weights([folder / _FILE], table, param_dtype).read()
    return Adapter(params, rank, alpha, float(config.get("lora_dropout") or 0.0))


def _problems(config: dict[str, Any]) -> list[str]:
    """Whatever in an adapter_config.json would be computed differently."""
    problems = []
    for name, wanted in (
        ("peft_type", ("LORA",)),
        ("task_type", ("CAUSAL_LM", None)),
        ("bias", ("none", None)),
        ("init_lora_weights", _PLAIN_STARTS),
    ):
        if (got := config.get(name)) not in wanted:
            problems.append(f"{name}: got {shown(got)}, wanted {' or '.join(map(repr, wanted))}")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        problems.append(f"r: got {shown(rank)}, wanted a positive integer")
    for name, most in (("lora_alpha", 1e9), ("lora_dropout", 1.0)):
        got = config.get(name, 0)
        if not isinstance(got, (int, float)) or isinstance(got, bool) or not 0 <= got < most:
            problems.append(f"{name}: got {shown(got)}, wanted a number from 0 to {most:g}")
    read = _NEUTRAL | {
        "peft_type", "task_type", "bias", "init_lora_weights", "r", "lora_alpha", "lora_dropout",
        "use_rslora", "target_modules",
    }  # fmt: skip
    return problems + [
        f"{plain(name)}: {shown(value)} is not implemented; merge the adapter with peft and load "
        "the merged model instead"
        for name, value in config.items()
        if name not in read and value
    ]


def _linears(policy: Policy) -> dict[tuple[str, ...], dict[str, Slot]]:
    """Path of each linear layer in `layers` -> Hugging Face's module names and kernels' slots."""
    found: dict[tuple[str, ...], dict[str, Slot]] = {}
    for name, slot in decoder_table(policy.config).items():
        if slot.path[0] == "layers" and slot.path[-1] == "kernel":
            found.setdefault(slot.path[:-1], {})[name.removesuffix(".weight")] = slot
    return found


def _chosen(file: Path, targets: Any, linears: dict) -> set[tuple[str, ...]]:
    """The linear layers that PEFT's target_modules names: ends of names, or one expression."""
    if targets == "all-linear":
        return set(linears)
    chosen: set[tuple[str, ...]] = set()
    named = targets if isinstance(targets, list) else []
    ends = tuple(end for end in named if isinstance(end, str))
    expression = _expression(file, targets) if isinstance(targets, str) else None
    for path, modules in linears.items():
        if expression:
            matches = [bool(expression.fullmatch(name)) for name in modules]
        else:
            matches = [any(f".{name}".endswith(f".{end}") for end in ends) for name in modules]
        if any(matches) and not all(matches):
            raise ValueError(f"{file}: target_modules chooses {path[-1]} in some layers only")
        if any(matches):
            chosen.add(path)
    known = {part for path in linears for part in path}
    strange = len(ends) < len(named) or any(end.split(".")[-1] not in known for end in ends)
    if strange or not chosen:
        raise ValueError(
            f"{file}: target_modules {shown(targets)}; wanted linear layers of this model: "
            f"{', '.join(sorted({path[-1] for path in linears}))}"
        )
    return chosen


def _expression(file: Path, text: str) -> re.Pattern[str]:
    """A regular expression out of a file, if it cannot take for ever on a name.

    Matching takes time exponential in the name where what is repeated is itself repeated, and a
    high power of its length where many parts are.
    """
    repeats = len(re.findall(r"[*+{]", text))
    try:
        if len(text) > 2000 or repeats > 8 or re.search(r"\)[*+{]", text):
            raise ValueError("repeats too much; wanted at most 8 repetitions, and none of a group")
        return re.compile(text)
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file}: target_modules {shown(text)} is not an expression we match ({error})"
        ) from None


def _table(policy: Policy, chosen: set[tuple[str, ...]], rank: int) -> dict[str, Slot]:
    """PEFT's tensor names -> slots in the adapter's tree."""
    table: dict[str, Slot] = {}
    for path, modules in _linears(policy).items():
        for name, slot in modules.items() if path in chosen else ():
            out_size, in_size = slot.shape
            for leaf, theirs, shape in (
                ("lora_a", "lora_A", (rank, in_size)),
                ("lora_b", "lora_B", (out_size, rank)),
            ):
                key = f"{_PREFIX}{name}.{theirs}.weight"
                table[key] = Slot((*path, leaf), slot.layer, True, shape)
    return table


def _has(tree: dict, path: tuple[str, ...]) -> bool:
    node: Any = tree
    for key in path:
        if not isinstance(node, dict) or key not in node:
            return False
        node = node[key]
    return True
