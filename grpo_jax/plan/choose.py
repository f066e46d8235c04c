"""The mesh of a run whose configuration leaves it open: the least splitting that fits.

Replicas are cheapest, since only their gradients meet; sharing the weights (fsdp) comes next, and
sharing each layer's heads (tensor) last, where batches have too few rows or memory demands it.
What fits is the plan's estimate, for the memory that this run's devices say they have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from grpo_jax.config import GRPO, SFT, Config, Mesh
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.models.block import DecoderConfig
from grpo_jax.plan.devices import GIB
from grpo_jax.plan.memory import Batch, Split, memory
from grpo_jax.plan.model import trees
from grpo_jax.plan.suggest import ROOM, divisors, tensors


@dataclasses.dataclass(frozen=True)
class Devices:
    """What a mesh is made of."""

    count: int  # of all processes
    local: int  # of each process
    usable: float = 0.0  # bytes that a program may use of one; 0: unknown
    backend: str = "tpu"  # as plan.memory has it


def choose(
    mesh: Mesh,
    arms: Sequence[tuple[Config, str]],
    c: DecoderConfig,
    devices: Devices,
    encoders: float = 0.0,
) -> tuple[Split, str]:
    """The mesh of a run, and why it is this one.

    Args:
      mesh: its sizes that are not 0 are kept.
      arms: what the run computes: settings and method of each arm; methods without training are
        taken for what sampling needs during it.
      c: the model's architecture.
      encoders: bytes of the encoder and the judges.

    Raises:
      ValueError: no mesh of these devices has the sizes that are set, or divides the batches and
        the heads.
    """
    rows = dict.fromkeys(row for cfg, method in arms for row in _batches(cfg, method))
    heads = (arms[0][0].model.path, c.num_heads, c.num_kv_heads)
    if mesh.tensor > 0:
        mesh_lib.check_heads(mesh.tensor, *heads)
    if 0 not in (sizes := (mesh.data, mesh.fsdp, mesh.tensor)) or -1 in sizes:
        split = Split(*mesh_lib.fill_in(mesh, devices.count))
        mesh_lib.check_heads(split.tensor, *heads)
        for name, n in rows:
            mesh_lib.check_rows(split.rows, name, n)
        return split, "as configured"
    allowed = list(_allowed(mesh, c, devices))
    if not allowed:
        raise ValueError(
            f"{mesh_lib.said(mesh)}: no mesh of this run's {devices.count} devices has these "
            "sizes; wanted sizes whose product is that number (0: chosen)"
        )

    def uneven(split: Split) -> list[tuple[str, int]]:
        return [(name, n) for name, n in rows if n % split.rows]

    even = [split for split in allowed if not uneven(split)]
    if not even:
        last = min(allowed, key=lambda split: split.rows)
        raise ValueError(
            f"{', '.join(f'{name}: got {n} rows' for name, n in uneven(last))}; wanted a multiple "
            f"of {last.rows}, into which this run's {devices.count} devices split a batch at least "
            f"(mesh.tensor: {last.tensor} at most)"
        )
    first = min(allowed, key=lambda split: split.tensor)
    odd = [f"{name} = {n}" for name, n in uneven(first)]
    why = f"; tensor because of batches that do not divide: {', '.join(odd)}" if odd else ""
    if not devices.usable:
        best = min(even, key=lambda split: (split.tensor, split.data))
        return best, f"weights are split, for the devices do not say how much memory they have{why}"
    found, words = _first_that_fits(even, _peak(arms, c, devices, encoders), devices.usable)
    return found, words + why


def _batches(cfg: Config, method: str) -> list[tuple[str, int]]:
    """Fields and rows of all batches of prompts that an arm's training splits over the mesh."""
    rows = []
    if section := _sft(cfg, method):
        name, sft = section
        name = f"{name}.batch_size / gradient_accumulation_steps"
        rows.append((name, sft.batch_size // sft.gradient_accumulation_steps))
    if method == "self_sft":
        rows.append(("self_sft.prompts_per_step", cfg.self_sft.prompts_per_step))
    if method == "grpo":
        parts = cfg.grpo.num_minibatches * cfg.grpo.gradient_accumulation_steps
        name = "grpo.prompts_per_step / (num_minibatches * gradient_accumulation_steps)"
        rows.append((name, cfg.grpo.prompts_per_step // parts))
    return rows


def _sft(cfg: Config, method: str) -> tuple[str, SFT] | None:
    """The section of an arm's supervised steps, with its name."""
    own = {
        "sft": ("sft", cfg.sft),
        "recover": ("recover.sft", cfg.recover.sft),
        "self_sft": ("self_sft.sft", cfg.self_sft.sft),
    }
    return own.get(method)


def _allowed(mesh: Mesh, c: DecoderConfig, devices: Devices) -> Iterator[Split]:
    """The meshes of these devices that have the sizes that are set."""
    for tensor in [mesh.tensor] if mesh.tensor else tensors(c, devices.local):
        for fsdp in divisors(devices.count // tensor):
            split = Split(devices.count // tensor // fsdp, fsdp, tensor)
            kept = mesh.data in (0, split.data) and mesh.fsdp in (0, split.fsdp)
            if kept and split.devices == devices.count:
                yield split


def _first_that_fits(
    splits: list[Split], peak: Callable[[Split], float], usable: float
) -> tuple[Split, str]:
    of = f"of {usable / GIB:.1f} GiB a device"
    tried: dict[Split, float] = {}
    for split in sorted(splits, key=lambda split: (split.tensor, split.fsdp)):
        needed = peak(split)
        if needed <= usable * ROOM:
            less = "".join(f", {b / GIB:.1f} with {said(s)}" for s, b in [*tried.items()][-1:])
            return split, f"{needed / GIB:.1f} {of} are expected to be used{less}"
        tried[split] = needed
    best = min(tried, key=lambda split: tried[split])
    return best, (
        f"NOTHING IS EXPECTED TO FIT, this needs {tried[best] / GIB:.1f} {of}; "
        "see what `python -m grpo_jax.plan` suggests"
    )


def said(split: Split) -> str:
    """A mesh in words."""
    return f"data {split.data}, fsdp {split.fsdp}, tensor {split.tensor}"


@dataclasses.dataclass(frozen=True)
class _Step:
    """A GRPO step, those of its phases that an arm goes through."""

    cfg: Config
    phases: tuple[str, ...]


def _peak(
    arms: Sequence[tuple[Config, str]], c: DecoderConfig, devices: Devices, encoders: float
) -> Callable[[Split], float]:
    """The most that one device holds in any step of the arms, as a function of the mesh."""
    kinds = {}  # steps that need the same memory are looked at once
    for step in (step for cfg, method in arms for step in _steps(cfg, method)):
        g = step.cfg.grpo
        kinds[Batch.of(step.cfg), step.phases, g.beta > 0, g.optimizer.moment_dtype] = step
    steps = [(step, trees(step.cfg, c)) for step in kinds.values()]

    def peak(split: Split) -> float:
        most = 0.0
        for step, shapes in steps:
            found = memory(step.cfg, c, shapes, split, encoders, devices.backend)
            most = max(most, *map(found.total, step.phases))
        return most

    return peak


def _steps(cfg: Config, method: str) -> list[_Step]:
    """What an arm does, as the plan knows it; supervised steps have one completion a prompt."""
    if method == "grpo":
        phases = ("open", "sampling", "update", *(["reference"] if cfg.grpo.beta > 0 else []))
        return [_Step(cfg, phases)]
    steps = []
    if section := _sft(cfg, method):
        sft = section[1]
        step = GRPO(
            prompts_per_step=sft.batch_size,
            num_generations=1,
            beta=0.0,
            gradient_accumulation_steps=sft.gradient_accumulation_steps,
            optimizer=sft.optimizer,
        )
        steps.append(_Step(dataclasses.replace(cfg, grpo=step), ("open", "update")))
    if method == "self_sft":
        own = cfg.self_sft
        drawn = GRPO(own.prompts_per_step, own.num_generations, beta=0.0)
        steps.append(_Step(dataclasses.replace(cfg, grpo=drawn), ("open", "sampling")))
    return steps or [_Step(cfg, ("open", "sampling"))]
