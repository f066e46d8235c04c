"""The weights of the arms: base from its folder, the others rebuilt from what they trained.

A stage's checkpoint holds the tree that was trained: the whole model, or an adapter beside the
merged weights that the arm started from. An interpolation has no checkpoint: its weights are those
of two arms, weighted.
"""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grpo_jax import hub
from grpo_jax.config_arms import BASE, interpolation
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import init_state
from grpo_jax.models import lora
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.structs import TrainState

# Each method has its own randomness. Arms of one method share it: they see the same rows and
# dropout, and differ only in what makes them arms.
_ORDER = ("sft", "grpo", "recover", "self_sft")


def method_key(run: Run, method: str) -> jax.Array:
    """The key that all of a method's randomness is folded from."""
    return jax.random.fold_in(run.key, _ORDER.index(method))


def run_interpolate(run: Run, arm: OpenArm) -> None:
    """Nothing is trained: the arm is finished as soon as those between which it lies are."""
    run.workdir.note_arm(arm.name, {"tokens": 0, "seconds": 0.0}, done=True)


def load_params(run: Run, name: str) -> dict:
    """The merged weights of an arm, in model.param_dtype, on the mesh.

    Adapters merge along the chain of starts: grpo = (base + sft's adapter) + grpo's adapter.
    """
    if name == BASE:
        shardings = mesh_lib.param_shardings(run.mesh, run.base.params)
        return run.base.weights.read(
            lambda path, shape: functools.reduce(operator.getitem, path, shardings)
        )
    arm = run.arms[name]
    if arm.method == "interpolate":
        toward, weight = interpolation(run.workdir.arms[name])
        here, there = load_params(run, arm.start), load_params(run, toward)
        return jax.jit(functools.partial(_between, weight), donate_argnums=0)(here, there)
    trained = load_trained(run, arm)
    if not run.cfg.model.lora.rank:
        return trained
    before = load_params(run, arm.start)
    scaled = functools.partial(lora.scaled, cfg=run.cfg.model.lora)
    return jax.jit(lambda p, a: lora.merge(p, scaled(a)), donate_argnums=0)(before, trained)


def _between(weight: float, start: dict, toward: dict) -> dict:
    def mix(x: jax.Array, y: jax.Array) -> jax.Array:
        mixed = (1.0 - weight) * x.astype(jnp.float32) + weight * y.astype(jnp.float32)
        return mixed.astype(x.dtype)

    return jax.tree.map(mix, start, toward)


def load_trained(run: Run, arm: OpenArm) -> dict:
    """The tree that a finished arm trained: the whole model or an adapter."""
    with Checkpoints(run.workdir.checkpoints / arm.name, run.cfg.checkpoint.keep) as checkpoints:
        step = checkpoints.best() if takes_best(arm) else None
        state, _ = checkpoints.restore(abstract_state(run, arm), step)
    return state.params


def takes_best(arm: OpenArm) -> bool:
    """Whether the arm's result is its best checkpoint on dev, not its last."""
    stops = arm.method == "grpo" and (
        arm.cfg.grpo.forgetting_budget is not None or bool(arm.cfg.grpo.stop_on)
    )
    return arm.cfg.checkpoint.load_best_at_end or stops


def load_adapter(run: Run, name: str) -> hub.Adapter:
    """What an arm adds to the base, as one float32 adapter in host memory on every process.

    Each arm of the chain trained an adapter on the merged weights of the one before, so theirs add
    up: as one, they have the sum of their ranks.
    """
    parts = _adapters(run, name)
    cfg = run.cfg.model.lora
    params = lora.concatenate([lora.weighted(tree, weight) for weight, tree in parts])
    return hub.Adapter(params, cfg.rank * len(parts), cfg.alpha * len(parts), cfg.dropout)


def _adapters(run: Run, name: str) -> list[tuple[float, dict]]:
    """The adapters, each with its weight, whose sum an arm adds to the base."""
    if name == BASE:
        return []
    arm = run.arms[name]
    before = _adapters(run, arm.start)
    if arm.method != "interpolate":
        return [*before, (1.0, jax.tree.map(mesh_lib.fetch, load_trained(run, arm)))]
    toward, weight = interpolation(run.workdir.arms[name])
    others = _adapters(run, toward)
    return [((1.0 - weight) * w, t) for w, t in before] + [(weight * w, t) for w, t in others]


def start_adapter(run: Run, arm: OpenArm) -> dict | None:
    """The adapter of model.lora.path in its places on the mesh, if `arm` starts from it."""
    if run.adapter is None or arm.start != BASE:
        return None
    shardings = mesh_lib.param_shardings(run.mesh, run.adapter)
    return jax.tree.map(lambda x, s: jax.device_put(x.copy(), s), run.adapter, shardings)


def fresh_trained(run: Run, key: jax.Array, params: dict) -> dict:
    """The tree to train, from merged weights: a fresh adapter, or the weights themselves."""
    if not run.cfg.model.lora.rank:
        return params
    return lora.init(key, params, run.cfg.model.lora)


def frozen_copy(params: dict, dtype: DTypeLike) -> dict:
    """The weights that stay: matrices in the compute dtype (what they are cast to anyway)."""

    def copy(path: tuple, x: jax.Array) -> jax.Array:
        matrix = path[-1].key in ("kernel", "embedding")
        return jnp.array(x, dtype if matrix else x.dtype, copy=True)

    return jax.tree_util.tree_map_with_path(copy, params)


def abstract_state(run: Run, arm: OpenArm) -> TrainState:
    """The arm's TrainState as shapes, dtypes and shardings."""
    optimizer = build_optimizer(arm.optimizer, 1)

    def init(params: dict) -> TrainState:
        return init_state(fresh_trained(run, jax.random.key(0), params), optimizer)

    shapes = jax.eval_shape(init, run.base.params)
    shardings = mesh_lib.param_shardings(run.mesh, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
