"""The fastest setting that fits: meshes, micro-batches, remat and lanes, tried one by one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

from grpo_jax import config
from grpo_jax.models.block import DecoderConfig
from grpo_jax.plan.devices import Device
from grpo_jax.plan.memory import Memory, Split, memory
from grpo_jax.plan.model import Trees
from grpo_jax.plan.roofline import Times, times

ROOM = 0.92  # of the usable memory: what the arithmetic may miss


@dataclasses.dataclass(frozen=True)
class Plan:
    """One setting with what it needs and takes."""

    split: Split
    micro: int
    remat: bool
    lanes: int
    memory: Memory
    times: Times
    fits: bool

    @property
    def flags(self) -> str:
        """The setting as flags of grpo_jax.main."""
        s = self.split
        return (
            f"--config.mesh.data={s.data} --config.mesh.fsdp={s.fsdp} "
            f"--config.mesh.tensor={s.tensor} "
            f"--config.grpo.gradient_accumulation_steps={self.micro} "
            f"--config.model.remat={str(self.remat).lower()} --config.grpo.lanes={self.lanes}"
        )


def resolve(mesh: config.Mesh, devices: int) -> Split:
    """The mesh of a configuration with its -1 filled in.

    Raises:
      ValueError: it does not multiply to the number of devices.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    fixed = 1
    for size in sizes:
        fixed *= size if size != -1 else 1
    if sizes.count(-1) == 1 and fixed and devices % fixed == 0:
        sizes[sizes.index(-1)] = devices // fixed
    split = Split(*sizes)
    if min(sizes) < 1 or split.devices != devices:
        raise ValueError(
            f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor}: does not "
            f"fit {devices} devices; wanted sizes whose product is that number, one of them may "
            "be -1"
        )
    return split


def evaluate(
    cfg: config.Config,
    c: DecoderConfig,
    trees: Trees,
    device: Device,
    split: Split,
    encoders: float,
    usable: float,
) -> Plan:
    """The plan of a configuration as it stands."""
    found = memory(cfg, c, trees, split, encoders, slices=not device.is_tpu)
    g = cfg.grpo
    fits = found.peak <= usable * ROOM
    return Plan(
        split, g.gradient_accumulation_steps, cfg.model.remat, g.lanes, found,
        times(cfg, c, device, split), fits,
    )  # fmt: skip


def suggest(
    cfg: config.Config,
    c: DecoderConfig,
    trees: Trees,
    device: Device,
    count: int,
    encoders: float,
    usable: float,
) -> Plan:
    """The fastest setting that fits, or, if none does, the smallest.

    Prompts a step and completions a prompt stay as configured, so what is learned is the same.
    """
    best: Plan | None = None
    for split in _splits(c, count):
        for setting in _settings(cfg, split):
            plan = evaluate(setting, c, trees, device, split, encoders, usable)
            if best is None or _rank(plan) < _rank(best):
                best = plan
    if best is None:
        raise ValueError(
            f"grpo.prompts_per_step: {cfg.grpo.prompts_per_step} prompts cannot be split over "
            f"{count} devices in any mesh; make it a multiple of {count}"
        )
    return best


def _rank(plan: Plan) -> tuple[bool, float, int, float]:
    """Lower is better; of equally fast ones that with the fewest micro-batches."""
    first = plan.times.step if plan.fits else plan.memory.peak
    return (not plan.fits, first, plan.micro, plan.memory.peak)


def _splits(c: DecoderConfig, count: int) -> Iterator[Split]:
    for tensor in _divisors(count):
        if c.num_kv_heads % tensor or c.intermediate_size % tensor or c.num_heads % tensor:
            continue
        for data in _divisors(count // tensor):
            yield Split(data, count // tensor // data, tensor)


def _settings(cfg: config.Config, split: Split) -> Iterator[config.Config]:
    g = cfg.grpo
    if g.prompts_per_step % split.rows:
        return
    rows = g.prompts_per_step // g.num_minibatches
    for micro in _divisors(rows):
        if (rows // micro) % split.rows:
            continue
        for remat in (False, True):
            for lanes in sorted(
                {g.num_generations // k for k in (1, 2, 4) if g.num_generations >= k}
            ):
                new = copy.deepcopy(cfg)
                new.model.remat = remat
                new.grpo.gradient_accumulation_steps = micro
                new.grpo.lanes = 0 if lanes == g.num_generations else lanes
                yield new


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
