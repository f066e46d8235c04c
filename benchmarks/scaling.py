"""What each device computes and exchanges as devices are added, from the compiled programs.

    python -m benchmarks.scaling                            # the table of SCALING.md
    python -m benchmarks.scaling --devices=1,8 --layers=4

The sampler, the reference's log-probs and the update are compiled, not run, for virtual devices on
CPU: a process for each number of them, since it is fixed when jax starts. Weak scaling: prompts
grow with the devices. Strong: the prompts stay. The model is Qwen3-0.6B with fewer layers (what a
layer computes and exchanges is the same for each of them, and the decode loop, where layers are
unrolled, compiles slowly). Prints a Markdown table, and fails where a device is sent other rows'
logits, keys, values or states: see `offences`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any, NamedTuple

OPTIONS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
PHASES = ("sampling", "reference", "update")
FIXED = 256  # prompts of strong scaling
EACH = 2  # prompts a device of weak scaling
GROUP, PROMPT, COMPLETION = 8, 128, 129  # G, S, T


class Point(NamedTuple):
    """One program on one mesh."""

    scaling: str
    mesh: tuple[int, int, int]
    prompts: int
    phase: str


def points(devices: int) -> list[Point]:
    """Everything that is compiled for so many devices."""
    if devices == 1:
        meshes = [(1, 1, 1)]
    else:
        meshes = [(1, devices, 1), (devices // 4, 4, 1), (1, devices // 4, 4)]
    plans = [("weak", mesh, EACH * devices) for mesh in meshes]
    plans += [("strong", meshes[0], FIXED)]
    return [Point(*plan, phase) for plan in plans for phase in PHASES]


def offences(program: Any, weights: Any, tensor: int, lanes: int, largest: int) -> list[str]:
    """All-gathers that a device should not need.

    Weights may be gathered, and of what is computed what a draw needs: an all-gather of floats is
    an offence if it is not a weight, or a device's part of one along tensor, and larger than
    `largest` numbers for each of the device's own completions. Logits are larger, and so are
    the keys, values and states of all but the shortest texts.

    Args:
      program: of hlo.read.
      weights: tree of shapes; those of layers are stacked.
      tensor: devices along it.
      lanes: completions that a device draws.
      largest: numbers.
    """
    import jax

    known = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(weights):
        shape = leaf.shape[1:] if path[0].key == "layers" else leaf.shape
        layers = leaf.shape[:1] if path[0].key == "layers" else ()
        for i, size in enumerate(shape):
            part = (*shape[:i], size // tensor, *shape[i + 1 :])
            for whole in (shape, part):
                known |= {tuple(sorted(whole)), tuple(sorted((*layers, *whole)))}
    found = []
    for one in program.collectives:
        for array in one.arrays if one.kind == "all-gather" else ():
            bare = tuple(sorted(size for size in array.shape if size != 1))
            size = array.bytes / 4 if array.dtype == "f32" else array.bytes / 2
            floats = "f" in array.dtype
            if floats and bare not in known and size > lanes * largest:
                found.append(f"{array.dtype}{list(array.shape)} for {one.source}")
    return found


def measure(point: Point, layers: int) -> dict[str, Any]:
    """What a device computes and exchanges, in numbers and bytes.

    Raises:
      ValueError: an offence.
    """
    import jax

    from benchmarks import hlo, plan_check
    from grpo_jax.learn import chunks
    from grpo_jax.models.decoder import DecoderConfig
    from grpo_jax.plan.model import trees
    from grpo_jax.rollout.draw import BLOCK

    model = DecoderConfig(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=layers,
        num_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True, tie_word_embeddings=True,
    )  # fmt: skip
    batch = (point.prompts, GROUP, PROMPT, COMPLETION)
    case = plan_check.Case("", model, point.mesh, batch)
    cfg = plan_check.settings(case)
    text = plan_check.compile_phase(case, cfg, point.phase, jax.devices()).as_text()
    rows, tensor = point.mesh[0] * point.mesh[1], point.mesh[2]
    # Loops whose turns depend on the batch: tokens in sampling, else chunks of the head.
    held = point.prompts * GROUP * COMPLETION // rows
    turns = chunks.count(held, model.vocab_size // tensor, "cpu")
    program = hlo.read(text, COMPLETION - 1 if point.phase == "sampling" else turns)
    lanes = point.prompts * GROUP * tensor // len(jax.devices())
    largest = max(model.hidden_size, 2 * BLOCK, 2 * model.vocab_size // BLOCK)
    if bad := offences(program, trees(cfg, model).base, tensor, lanes, largest):
        raise ValueError(f"{point}: all-gathers that should not be: {'; '.join(bad)}")
    gathers = [a for c in program.collectives if c.kind == "all-gather" for a in c.arrays]
    top = max(gathers, key=lambda array: array.bytes, default=None)
    exchanged = {kind: program.exchanged(kind) for kind in hlo.KINDS}
    count = sum(one.times for one in program.collectives)
    shape = f"{top.dtype}{list(top.shape)}" if top else ""
    return {"flops": program.flops, **exchanged, "count": count, "largest": shape}


def worker(layers: int) -> None:
    """Prints a line of JSON for each point of this process's devices."""
    import jax

    for point in points(len(jax.devices())):
        print(json.dumps([point, measure(point, layers)]), flush=True)


def row(point: Point, found: dict[str, Any]) -> str:
    """A row of the table."""
    from benchmarks.hlo import KINDS

    mesh = " x ".join(map(str, point.mesh))
    moved = " | ".join(f"{found[kind] / 1e6:,.1f}" for kind in KINDS)
    return (
        f"| {point.scaling} | {mesh} | {point.prompts} | {point.phase} | "
        f"{found['flops'] / 1e12:.3f} | {moved} | {found['count']:,.0f} | {found['largest']} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", default="1,8,64,256", help="numbers of devices; 1 or n * 8")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help="(the command starts these itself)")
    flags = parser.parse_args()
    if flags.worker:
        worker(flags.layers)
        return
    print(
        "| scaling | data x fsdp x tensor | prompts | program | TFLOP | all-gather, MB | "
        "all-reduce, MB | reduce-scatter, MB | all-to-all, MB | permute, MB | collectives | "
        "largest all-gather |\n" + "|---" * 12 + "|",
        flush=True,
    )
    for devices in map(int, flags.devices.split(",")):
        count = f"--xla_force_host_platform_device_count={devices}"
        environ = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{OPTIONS} {count}"}
        command = [sys.executable, "-m", "benchmarks.scaling", "--worker"]
        command += [f"--layers={flags.layers}"]
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            for line in child.stdout:
                point, found = json.loads(line)
                point[1] = tuple(point[1])
                print(row(Point(*point), found), flush=True)
        if child.returncode:
            sys.exit(child.returncode)


if __name__ == "__main__":
    main()
