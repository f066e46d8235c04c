"""The fastest setting that fits: meshes, micro-batches, remat and lanes, tried one by one."""

from __future__ import annotations

import copy
import dataclasses
import math
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
    remat_policy: str
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
            f"--config.model.remat={str(self.remat).lower()} "
            f"--config.model.remat_policy={self.remat_policy} --config.grpo.lanes={self.lanes}"
        )


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
    found = memory(cfg, c, trees, split, encoders, backend=device.backend)
    g = cfg.grpo
    fits = found.peak <= usable * ROOM
    return Plan(
        split, g.gradient_accumulation_steps, cfg.model.remat, cfg.model.remat_policy, g.lanes,
        found, times(cfg, c, device, split), fits,
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
    for split in _splits(c, count, device.local(count)):
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


def _splits(c: DecoderConfig, count: int, local: int) -> Iterator[Split]:
    for tensor in tensors(c, local):
        for data in divisors(count // tensor):
            yield Split(data, count // tensor // data, tensor)


def _settings(cfg: config.Config, split: Split) -> Iterator[config.Config]:
    g = cfg.grpo
    if g.prompts_per_step % split.rows:
        return
    rows = g.prompts_per_step // g.num_minibatches
    for micro in divisors(rows):
        if (rows // micro) % split.rows:
            continue
        for remat, policy in ((False, "full"), (True, "dots"), (True, "full")):
            for lanes in sorted(
                {g.num_generations // k for k in (1, 2, 4) if g.num_generations >= k}
            ):
                new = copy.deepcopy(cfg)
                new.model.remat, new.model.remat_policy = remat, policy
                new.grpo.gradient_accumulation_steps = micro
                new.grpo.lanes = 0 if lanes == g.num_generations else lanes
                yield new


def tensors(c: DecoderConfig, local: int) -> list[int]:
    """Sizes of mesh.tensor that split whole heads and stay within a process of `local` devices."""
    whole = math.gcd(c.num_heads, c.num_kv_heads, c.intermediate_size, local)
    return divisors(whole)


def divisors(n: int) -> list[int]:
    """All of them, 1 first."""
    return [k for k in range(1, n + 1) if n % k == 0]
