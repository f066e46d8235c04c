"""Low-rank adapters (arXiv 2106.09685) as a second, small tree of parameters.

An adapter has the paths of the kernels it adapts, with leaves lora_a [L, in, r] and
lora_b [L, r, out]. Training passes it beside the frozen base ({"params": base, "lora": adapter});
sampling and export merge it. With lora_b = 0, where it starts, it changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Lora

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the output matrix


def init(key: jax.Array, params: dict, cfg: Lora) -> dict:
    """A fresh float32 adapter for every kernel of `params["layers"]` that `cfg.targets` names.

    "all-linear" names all of them, whatever they are called (Phi-3 has qkv_proj and gate_up_proj).
    lora_a is uniform in +-1/sqrt(in), as PEFT draws it; lora_b is zero.

    Raises:
      ValueError: a target that matches no kernel.
    """
    found: set[str] = set()
    every = ALL_LINEAR in cfg.targets

    def walk(tree: dict, key: jax.Array) -> dict:
        adapter = {}
        for index, (name, sub) in enumerate(sorted(tree.items())):
            if not isinstance(sub, dict):
                continue
            sub_key = jax.random.fold_in(key, index)
            if (every or name in cfg.targets) and "kernel" in sub:
                found.add(name)
                *stack, fan_in, fan_out = sub["kernel"].shape
                bound = fan_in**-0.5
                shape = (*stack, fan_in, cfg.rank)
                lora_a = jax.random.uniform(sub_key, shape, jnp.float32, -bound, bound)
                lora_b = jnp.zeros((*stack, cfg.rank, fan_out), jnp.float32)
                adapter[name] = {"lora_a": lora_a, "lora_b": lora_b}
            elif inner := walk(sub, sub_key):
                adapter[name] = inner
        return adapter

    adapter = {"layers": walk(params["layers"], key)}
    if missing := set(cfg.targets) - found - {ALL_LINEAR}:
        raise ValueError(
            f"model.lora.targets: no linear layer is named {sorted(missing)}; this model has "
            f"{sorted(_kernels(params['layers']))}, and {ALL_LINEAR} takes every one"
        )
    return adapter


def scaled(adapter: dict, cfg: Lora) -> dict:
    """The adapter with alpha / rank folded into lora_b, as the modules and `merge` expect it."""
    return weighted(adapter, cfg.alpha / cfg.rank)


def weighted(adapter: dict, weight: float) -> dict:
    """The adapter that adds `weight` times what this one adds."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x * weight if path[-1].key == "lora_b" else x, adapter
    )


def concatenate(adapters: Sequence[dict]) -> dict:
    """One adapter that adds what several add, with the sum of their ranks: [A1 A2] [B1; B2].

    Args:
      adapters: of the same layers, to be scaled by the same alpha / rank.

    Returns:
      lora_a [L, in, r1 + r2 + ...] and lora_b [L, r1 + r2 + ..., out], as NumPy arrays. With alpha
      multiplied like the rank, the scale is the same and nothing is rounded.
    """

    def join(path: tuple, *leaves: jax.Array) -> np.ndarray:
        return np.concatenate(leaves, axis=-1 if path[-1].key == "lora_a" else -2)

    return jax.tree_util.tree_map_with_path(join, *adapters)


def merge(params: dict, adapter: dict) -> dict:
    """params + A B for a scaled adapter: same structure and dtypes, products in float32."""
    merged = dict(params)
    for name, sub in adapter.items():
        if "lora_a" in sub:
            kernel = params[name]["kernel"]
            delta = jnp.matmul(sub["lora_a"], sub["lora_b"], precision="highest")
            kernel = (jnp.asarray(kernel, jnp.float32) + delta).astype(kernel.dtype)
            merged[name] = {**params[name], "kernel": kernel}
        else:
            merged[name] = merge(params[name], sub)
    return merged


def _kernels(tree: dict) -> set[str]:
    """Names of all modules in `tree` that hold a kernel."""
    names: set[str] = set()
    for name, sub in tree.items():
        if isinstance(sub, dict):
            names |= {name} if "kernel" in sub else _kernels(sub)
    return names
