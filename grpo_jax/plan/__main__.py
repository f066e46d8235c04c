"""What a run will need and how long a step takes, without its weights and without its devices.

    python -m grpo_jax.plan --config=configs/paper_bo_zh.py --devices=v5e-64 \\
        [--config.grpo.lanes=4] [--model-config=config.json] [--json]

The configuration is that of grpo_jax.main, with the same flags. Of the models only config.json is
read, or fetched; --model-config and --encoder-config stand in for files that cannot be had.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators alone

import json
import sys
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from grpo_jax.config import Config
from grpo_jax.config_check import validate
from grpo_jax.flags import check_flags
from grpo_jax.plan.choose import Devices, choose
from grpo_jax.plan.devices import DEVICES, GIB, Device, parse
from grpo_jax.plan.memory import Batch
from grpo_jax.plan.model import encoders, read_decoder, trees
from grpo_jax.plan.roofline import DECODE, LINKS, MATMUL
from grpo_jax.plan.suggest import ROOM, Plan, evaluate, suggest


def plan(
    cfg: Config,
    devices: str,
    model_config: str = "",
    encoder_config: str = "",
    memory_gib: float = 0.0,
) -> dict[str, Any]:
    """The plan of a GRPO run as plain data; `page` prints it.

    Args:
      cfg: a valid configuration.
      devices: KIND-COUNT, see plan.devices.parse.
      model_config, encoder_config: files that stand in for the models' config.json; '': none.
      memory_gib: what a program may use of one device; 0: the kind's usable share.

    Returns:
      devices, model, configured and suggested (each: mesh, settings, bytes, seconds, fits, flags)
      and notes, with bytes and seconds as numbers.

    Raises:
      ValueError, FileNotFoundError: what is wrong and the remedy.
    """
    validate(cfg)
    device, count = parse(devices)
    if memory_gib < 0:
        raise ValueError(f"--memory={memory_gib}: wanted GiB above 0")
    usable = memory_gib * GIB or device.memory * device.usable
    architecture = read_decoder(cfg.model.path, model_config)
    shapes = trees(cfg, architecture)
    encoded, notes = encoders(cfg, encoder_config)
    arguments = (architecture, shapes, device)
    there = Devices(count, device.local(count), usable, backend=device.backend)
    configured: dict[str, Any]
    try:
        split, _ = choose(cfg.mesh, [(cfg, "grpo")], architecture, there, encoded)
        configured = _as_data(evaluate(cfg, *arguments, split, encoded, usable), usable)
    except ValueError as error:
        configured = {"error": str(error)}
    best = suggest(cfg, *arguments, count, encoded, usable)
    notes += _notes(device, count, best, memory_gib)
    return {
        "devices": {
            "kind": device.kind, "count": count, "memory": device.memory, "usable": usable,
            "flops": device.flops, "bandwidth": device.bandwidth, "link": device.link,
            "network": device.network, "source": device.source,
        },
        "model": {
            "path": cfg.model.path,
            "parameters": _numbers(shapes.base),
            "trained": _numbers(shapes.trained),
        },
        "batch": Batch.of(cfg).__dict__,
        "assumed": {"matmul": MATMUL, "decode": DECODE, "links": LINKS, "room": ROOM},
        "configured": configured,
        "suggested": _as_data(best, usable),
        "notes": notes,
    }  # fmt: skip


def _numbers(tree: Any) -> int:
    import jax

    return sum(x.size for x in jax.tree.leaves(tree))


def _notes(device: Device, count: int, best: Plan, memory_gib: float) -> list[str]:
    notes = []
    if best.split.fsdp > 1:
        notes.append("sampling gathers the model along mesh.fsdp, in the compute dtype")
    if device.backend == "gpu" and not memory_gib:
        notes.append("JAX takes 75% of a GPU; XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 gives it more")
    if device.kind in ("v4", "v5p"):
        notes.append(f"Google calls {count} chips {device.kind}-{2 * count}, counting cores")
    if not best.fits:
        notes.append("nothing fits: take more or larger devices, LoRA, or shorter completions")
    return notes


def _as_data(found: Plan, usable: float) -> dict[str, Any]:
    t, s = found.times, found.split
    memory = found.memory
    return {
        "mesh": {"data": s.data, "fsdp": s.fsdp, "tensor": s.tensor},
        "gradient_accumulation_steps": found.micro,
        "remat": found.remat,
        "remat_policy": found.remat_policy,
        "lanes": found.lanes,
        "held": memory.held,
        "phases": memory.phases,
        "totals": {phase: memory.total(phase) for phase in memory.phases},
        "peak": memory.peak,
        "fits": found.fits,
        "share": memory.peak / usable,
        "seconds": {
            "sampling": t.sampling, "reference": t.reference, "update": t.update,
            "collectives": t.collectives, "step": t.step,
        },
        "decode_bound": t.decode_bound,
        "update_flops": t.update_flops,
        "collective_bytes": t.collective_bytes,
        "flags": found.flags,
    }  # fmt: skip


def page(data: dict[str, Any]) -> str:
    """A plan as text."""
    d, m, b = data["devices"], data["model"], data["batch"]
    lines = [
        f"{m['path']}: {m['parameters']:,} parameters, {m['trained']:,} trained",
        f"{d['count']} x {d['kind']}: {d['memory'] / GIB:.1f} GiB each, {d['usable'] / GIB:.1f} "
        f"usable; {d['flops'] / 1e12:.0f} TFLOP/s, {d['bandwidth'] / 1e9:.0f} GB/s ({d['source']})",
        f"{b['P']} prompts x {b['G']} completions a step, {b['S']} + {b['T']} tokens",
    ]
    for title in ("configured", "suggested"):
        lines += ["", *_section(title, data[title])]
    a = data["assumed"]
    lines += [
        "",
        f"Times assume {a['matmul']:.0%} of the arithmetic, {a['decode']:.0%} of the memory and "
        f"{a['links']:.0%} of the links' peak, and completions of full length.",
        *(f"- {note}" for note in data["notes"]),
    ]
    return "\n".join(lines)


def _section(title: str, found: dict[str, Any]) -> list[str]:
    if "error" in found:
        return [f"{title}: does not run: {found['error']}"]
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines = [
        f"{title}: {mesh}, {found['gradient_accumulation_steps']} micro-batches, remat "
        f"{found['remat_policy'] if found['remat'] else 'off'}, "
        f"lanes {found['lanes'] or 'all'}: {verdict}, peak "
        f"{found['peak'] / GIB:.2f} GiB a device ({found['share']:.0%} of what is usable)",
        f"  {'held':34}{sum(found['held'].values()) / GIB:9.2f} GiB",
    ]
    lines += [f"    {name:32}{size / GIB:9.2f}" for name, size in found["held"].items()]
    for phase, parts in found["phases"].items():
        lines.append(f"  {phase:34}{found['totals'][phase] / GIB:9.2f} GiB with what is held")
        if phase != "open":
            lines += [f"    + {name:30}{size / GIB:9.2f}" for name, size in parts.items()]
    s = found["seconds"]
    lines.append(
        f"  step {s['step']:.3g} s = sampling {s['sampling']:.3g} (bound by "
        f"{found['decode_bound']}) + reference {s['reference']:.3g} + update {s['update']:.3g} + "
        f"collectives {s['collectives']:.3g}"
    )
    return [*lines, f"  {found['flags']}"]


def _define_flags() -> None:
    """The program's flags; not at import, for grpo_jax.main has a --config too."""
    config_flags.DEFINE_config_file("config", help_string="A file of configs/.")
    flags.DEFINE_string("devices", None, f"KIND-COUNT; kinds: {', '.join(DEVICES)}.")
    flags.DEFINE_string("model-config", "", "A config.json in place of model.path's.")
    flags.DEFINE_string("encoder-config", "", "A config.json in place of encoder.path's.")
    flags.DEFINE_float("memory", 0.0, "GiB a program may use of a device; 0: by its kind.")
    flags.DEFINE_boolean("json", False, "Print JSON.")


def _main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    names = ("config", "devices", "model-config", "encoder-config", "memory")
    try:
        values: list[Any] = [flags.FLAGS[name].value for name in names]
        found = plan(*values)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(found, indent=2) if flags.FLAGS.json else page(found))


if __name__ == "__main__":
    check_flags(sys.argv)
    _define_flags()
    flags.mark_flags_as_required(["config", "devices"])
    app.run(_main)
