"""The sentence-transformers layout: which modules a folder chains, and how each is set.

In: a folder, with or without modules.json. Out: pooling, Dense and Normalize steps, the prompt, and
the limit on tokens. What would compute differently from what we implement is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.hub.folder import read_json, read_object
from grpo_jax.hub.pooling import POOLING
from grpo_jax.hub.weights import Slot, read_params, weight_files
from grpo_jax.text.strict import inside, listed, plain, shown

log = logging.getLogger(__name__)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.Tanh": jnp.tanh,
    "torch.nn.modules.activation.ReLU": jax.nn.relu,
    "torch.nn.modules.activation.GELU": functools.partial(jax.nn.gelu, approximate=False),
}

# Flags of the older form of a Pooling module's config, in the order of concatenation.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

# Names under which sentence-transformers has kept the transformer module's settings.
_SETTINGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "xlm-roberta", "distilbert")
)


@dataclasses.dataclass(frozen=True)
class Head:
    """What happens to the token vectors of one text."""

    pooling: tuple[str, ...]  # modes of hub.pooling, concatenated
    include_prompt: bool  # False: the prompt's tokens are seen but not pooled
    steps: tuple[str, ...]  # "normalize" or the activation of a Dense, in order
    params: dict  # {"0": the first step's kernel and bias, if it is a Dense, ...}
    dim: int  # width of the result


def transformer_folder(root: Path) -> Path:
    """Where the transformer of a sentence encoder lies: the folder itself, or a part of it."""
    return root / _chain(root)[0][1]


def read_head(root: Path, width: int, pooling: str | None, normalize: bool | None) -> Head:
    """Pooling and what follows, as modules.json says, or as the caller does where there is none.

    Args:
      root: the folder.
      width: of the transformer's token vectors.
      pooling: a mode of hub.pooling; None: the folder's, and without modules.json what
        sentence-transformers takes: lasttoken for a causal language model, else mean.
      normalize: whether to end with L2 normalisation; None: the folder's, and without
        modules.json no.

    Raises:
      ValueError: modules that we do not implement, or arguments that contradict the folder.
    """
    if pooling is not None and pooling not in POOLING:
        raise ValueError(f"pooling: got {pooling!r}, wanted one of {', '.join(POOLING)}")
    chain = _chain(root)
    if len(chain) == 1:
        if pooling is None:
            architectures = read_object(root / "config.json").get("architectures")
            first = architectures[0] if isinstance(architectures, list) and architectures else ""
            pooling = "lasttoken" if str(first).endswith("ForCausalLM") else "mean"
            log.info(
                "%s: no modules.json; %s pooling, as sentence-transformers does. Set pooling "
                "(config: encoder.pooling) if the model was trained with another one",
                root.name,
                pooling,
            )
        return Head((pooling,), True, ("normalize",) if normalize else (), {}, width)
    modes, include_prompt = _pooling(root / chain[1][1], width)
    if pooling is not None and modes != (pooling,):
        raise ValueError(
            f"pooling: got {pooling!r}, but {root / 'modules.json'} says {' + '.join(modes)}; "
            "leave it out, or edit the folder"
        )
    dim = width * len(modes)
    steps: list[str] = []
    params = {}
    for kind, name in chain[2:]:
        if kind == "Dense":
            activation, params[str(len(steps))], dim = _dense(root / name, dim)
            steps.append(activation)
        else:
            _check_places(root / name / "config.json", read_object(root / name / "config.json", {}))
            steps.append("normalize")
    if normalize is not None and normalize != ("normalize" in steps):
        raise ValueError(
            f"normalize: got {normalize}, but {root / 'modules.json'} "
            f"{'has a' if 'normalize' in steps else 'has no'} Normalize module; leave it out, or "
            "edit the folder"
        )
    return Head(modes, include_prompt, tuple(steps), params, dim)


def read_settings(folder: Path) -> dict[str, Any]:
    """max_seq_length and do_lower_case of the transformer module, {} where nothing is said.

    Raises:
      ValueError: settings under which sentence-transformers would compute something else.
    """
    file = next((folder / name for name in _SETTINGS if (folder / name).is_file()), None)
    if file is None:
        return {}
    settings = read_object(file)
    wanted = {"transformer_task": "feature-extraction", "module_output_name": "token_embeddings"}
    # Other inputs than text, and lengths of tasks that nobody names here.
    neutral = {"modality_config", "unpad_inputs", "query_length", "document_length"}
    problems = [
        f"{plain(name)}: {shown(value)} is not supported"
        for name, value in settings.items()
        if name not in {"max_seq_length", "do_lower_case"} | neutral
        and value not in (None, False, {}, wanted.get(name))
    ]
    limit = settings.get("max_seq_length")
    if limit is not None and (type(limit) is not int or not 0 < limit < 2**31):
        problems.append(f"max_seq_length: got {shown(limit)}, wanted a positive integer")
    if problems:
        raise ValueError(f"{file}: cannot be loaded:\n  " + listed(problems))
    return settings


def read_prompt(root: Path, prompt_name: str | None, prompt: str | None) -> str:
    """The text to put before every text.

    Args:
      root: the folder.
      prompt_name: one of the prompts of config_sentence_transformers.json; None: its
        default_prompt_name, or nothing where it has none.
      prompt: the text itself; '' puts nothing there, whatever the folder says.

    Raises:
      ValueError: both are given, or there is no prompt of that name.
    """
    file = root / "config_sentence_transformers.json"
    if prompt is not None:
        if prompt_name is not None:
            raise ValueError(
                f"prompt and prompt_name: got {prompt!r} and {prompt_name!r}, wanted one of them"
            )
        return prompt
    settings = read_object(file, {})
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        text is None or isinstance(text, str) for text in prompts.values()
    ):
        raise ValueError(f"{file}: prompts: got {shown(prompts)}, wanted names and texts")
    field = "default_prompt_name" if prompt_name is None else "prompt_name"
    name = settings.get(field) if prompt_name is None else prompt_name
    if name is not None and name not in list(prompts):
        raise ValueError(
            f"{file}: {field} {shown(name)} is not among the prompts {shown(list(prompts))}; the "
            "text itself can be given as prompt"
        )
    return "" if name is None else prompts[name] or ""


def _chain(root: Path) -> list[tuple[str, str]]:
    """(kind, subfolder) of each module of modules.json, checked for an order we implement."""
    file = root / "modules.json"
    modules = read_json(file, {})
    if not modules:
        return [("Transformer", "")]
    if not isinstance(modules, list) or not all(_is_module(module) for module in modules):
        raise ValueError(
            f"{file}: got {shown(modules)}, wanted a list of modules with idx, type and path"
        )
    for module in modules:
        inside(root, module["path"], file)
    ordered = sorted(modules, key=lambda module: module["idx"])
    chain = [(module["type"].rpartition(".")[2], module["path"]) for module in ordered]
    kinds = [kind for kind, _ in chain]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ValueError(
            f"{file}: {shown(kinds)} is not supported; wanted Transformer, Pooling, then "
            "Dense and Normalize in any order"
        )
    return chain


def _is_module(module: Any) -> bool:
    kinds = {"idx": int, "type": str, "path": str}
    return isinstance(module, dict) and all(type(module.get(k)) is v for k, v in kinds.items())


def _pooling(folder: Path, width: int) -> tuple[tuple[str, ...], bool]:
    """Modes and include_prompt of a Pooling module, in the old form (flags) or the new (names)."""
    file = folder / "config.json"
    config = read_object(file)
    got = config.get("word_embedding_dimension", config.get("embedding_dimension", width))
    if got != width:
        raise ValueError(
            f"{file}: pools vectors of width {shown(got)}, the transformer's are {width}"
        )
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        modes = tuple(mode) if isinstance(mode, list) else (mode,)
    else:
        modes = tuple(mode for flag, mode in _FLAGS.items() if config.get(flag)) or ("mean",)
    if not modes or any(mode not in POOLING for mode in modes):
        raise ValueError(
            f"{file}: pooling {shown(list(modes))} is not supported; wanted some of "
            f"{', '.join(POOLING)}"
        )
    names = {"word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt"}
    if unknown := [name for name, on in config.items() if name not in names | set(_FLAGS) and on]:
        raise ValueError(f"{file}: {shown(unknown)} are not fields we know")
    return modes, bool(config.get("include_prompt", True))


def _dense(folder: Path, width: int) -> tuple[str, dict, int]:
    """Activation, parameters and output width of a Dense module fed with `width` numbers."""
    file = folder / "config.json"
    config = read_object(file)
    activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    if activation not in list(ACTIVATIONS):
        raise ValueError(
            f"{file}: activation {shown(activation)}; wanted one of {', '.join(ACTIVATIONS)}"
        )
    if config.get("in_features") != width:
        raise ValueError(
            f"{file}: in_features {shown(config.get('in_features'))}, but the module before gives "
            f"{width}"
        )
    if config.get("use_residual"):
        raise ValueError(f"{file}: residual Dense modules are not supported")
    _check_places(file, config)
    out = config.get("out_features")
    if type(out) is not int or not 0 < out < 2**31:
        raise ValueError(f"{file}: out_features: got {shown(out)}, wanted a positive integer")
    table = {"linear.weight": Slot(("kernel",), None, True, (out, width))}
    if config.get("bias", True):
        table["linear.bias"] = Slot(("bias",), None, False, (out,))
    return activation, read_params(weight_files(folder), table, "float32"), out


def _check_places(file: Path, config: dict) -> None:
    """Raises ValueError where a module works on anything but the vector of the text."""
    places = [config.get("module_input_name"), config.get("module_output_name")]
    if any(place not in (None, "sentence_embedding") for place in places):
        raise ValueError(f"{file}: modules on {shown(places)} are not supported")
