"""The plan's arithmetic against XLA's own memory analysis of the compiled sampler and update.

    python -m benchmarks.plan_check                       # 8 virtual CPU devices, float32
    python -m benchmarks.plan_check --only=lora           # cases whose name contains it
    python -m benchmarks.plan_check --topology=v5e:2x4    # XLA's TPU compiler, ahead of time: needs
                                                          # `pip install libtpu`, but no TPU
    python -m benchmarks.plan_check --full=Qwen/Qwen3-4B --topology=v5p:4x4x4 --mesh=1,64,1

Nothing is run: the jitted functions are lowered from shapes and compiled. Compared are a device's
arguments + temporaries. Predicted is what the plan says of the same: the trees that the function is
given, and the phase's own. CPU's compiler multiplies bfloat16 matrices in float32, so there only
float32 is compared. Prints a Markdown table.
"""

# ruff: noqa: E402  (the environment is set before jax is imported)

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
)  # fmt: skip
for _name, _value in (  # libtpu would otherwise look for a TPU's machine
    ("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
    ("TPU_WORKER_ID", "0"), ("TPU_WORKER_HOSTNAMES", "localhost"),
):  # fmt: skip
    os.environ.setdefault(_name, _value)

import jax
import jax.numpy as jnp

from grpo_jax import config
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.learn import chunks
from grpo_jax.learn.objectives import build_grpo_loss
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import build_logps, build_update
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.plan.memory import Batch, Split, memory
from grpo_jax.plan.model import read_decoder, trees
from grpo_jax.rollout.sampler import build_sampler
from grpo_jax.structs import TrainBatch, TrainState

SMALL = DecoderConfig(
    vocab_size=8000, hidden_size=256, intermediate_size=768, num_layers=4, num_heads=8,
    num_kv_heads=8, head_dim=32, qk_norm=True,
)  # fmt: skip
WIDE = dataclasses.replace(SMALL, vocab_size=48000, num_layers=2, tie_word_embeddings=True)
MEDIUM = dataclasses.replace(
    SMALL, hidden_size=512, intermediate_size=1536, num_layers=8, head_dim=64
)  # fmt: skip
ONE = (1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """One program to compile."""

    name: str
    model: DecoderConfig
    mesh: tuple[int, int, int] = ONE
    batch: tuple[int, int, int, int] = (8, 8, 64, 64)  # P, G, S, T
    rank: int = 0
    remat: bool = True
    policy: str = "full"
    micro: int = 1
    lanes: int = 0
    phases: tuple[str, ...] = ("sampling", "reference", "update")


CASES = (
    Case("small", SMALL),
    Case("small, 16 prompts", SMALL, batch=(16, 8, 64, 64)),
    Case("small, no remat", SMALL, remat=False, phases=("update",)),
    Case("small, products kept", SMALL, policy="dots", phases=("update",)),
    Case("small, LoRA 16", SMALL, rank=16),
    Case("small, LoRA 16, products kept", SMALL, rank=16, policy="dots", phases=("update",)),
    Case("small, LoRA 16, no remat", SMALL, rank=16, remat=False, phases=("update",)),
    Case("small, 2 micro-batches", SMALL, batch=(16, 8, 64, 64), micro=2, phases=("update",)),
    Case("small, 2 lanes", SMALL, lanes=2, phases=("sampling",)),
    Case("small, long", SMALL, batch=(8, 4, 128, 256)),
    Case("wide vocabulary, tied", WIDE),
    Case("medium", MEDIUM),
    Case("medium, LoRA 16", MEDIUM, rank=16),
    Case("medium, data 8", MEDIUM, (8, 1, 1), batch=(32, 8, 64, 64)),
    Case("medium, fsdp 8", MEDIUM, (1, 8, 1), batch=(32, 8, 64, 64)),
    Case("medium, fsdp 8, LoRA 16", MEDIUM, (1, 8, 1), batch=(32, 8, 64, 64), rank=16),
    Case("medium, tensor 8", MEDIUM, (1, 1, 8)),
    Case("medium, 2 x 2 x 2", MEDIUM, (2, 2, 2), batch=(16, 8, 64, 64)),
)


def settings(case: Case, dtype: str = "float32", param_dtype: str = "float32") -> config.Config:
    """The configuration of a case."""
    cfg = config.Config()
    cfg.model.dtype, cfg.model.param_dtype, cfg.model.remat = dtype, param_dtype, case.remat
    cfg.model.remat_policy, cfg.model.lora.rank = case.policy, case.rank
    g = cfg.grpo
    g.prompts_per_step, g.num_generations = case.batch[:2]
    cfg.data.max_prompt_length, cfg.data.max_completion_length = case.batch[2:]
    g.gradient_accumulation_steps, g.lanes = case.micro, case.lanes
    return cfg


def compile_phase(case: Case, cfg: config.Config, phase: str, devices: list[Any]) -> Any:
    """A phase's program, compiled from shapes."""
    split = Split(*case.mesh)
    mesh = mesh_lib.make_mesh(config.Mesh(*case.mesh), devices[: split.devices])
    rows = mesh_lib.batch_sharding(mesh)
    model = Decoder(
        case.model,
        jnp.dtype(cfg.model.dtype),
        remat=case.remat,
        remat_policy=case.policy,
        rows=rows if mesh.size > 1 else None,
    )
    shapes = trees(cfg, case.model)

    def placed(tree: Any) -> Any:
        shardings = mesh_lib.param_shardings(mesh, tree)
        return jax.tree.map(lambda x, s: x.update(sharding=s), tree, shardings)

    def array(dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    b = Batch.of(cfg)
    ids, lengths = array(jnp.int32, b.P, b.S), array(jnp.int32, b.P)
    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=mesh_lib.replicated(mesh))
    frozen, trained = placed(shapes.frozen), placed(shapes.trained)
    lowered: Any
    if phase == "sampling":
        variables = {"params": frozen, "lora": trained} if case.rank else {"params": trained}
        sample: Any = build_sampler(
            model, cfg.grpo.sampling, b.T, (1,), mesh_lib.gathered(mesh), case.lanes
        )
        lowered = sample.lower(variables, ids, lengths, key, num_generations=b.G)
    else:
        tokens = (b.P, b.G, b.T)
        logps = array(jnp.float32, *tokens)
        batch = TrainBatch(
            ids, lengths, array(jnp.int32, *tokens), array(jnp.bool_, *tokens),
            array(jnp.float32, b.P, b.G), logps, logps,
        )  # fmt: skip
        if phase == "reference":
            scored: Any = build_logps(model, 1.0, b.micro)
            lowered = scored.lower({"params": frozen}, batch)
        else:
            loss = build_grpo_loss(cfg.grpo, True)
            optimizer = build_optimizer(cfg.grpo.optimizer, 1)
            update: Any = build_update(
                model, optimizer, loss, cfg.model.lora, micro_batches=b.micro
            )  # fmt: skip
            step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
            state = TrainState(step, trained, placed(shapes.opt_state))
            lowered = update.lower(state, frozen, batch, key)
    return lowered.compile()


def compiled(case: Case, cfg: config.Config, phase: str, devices: list[Any]) -> int:
    """Bytes a device, arguments + temporaries, of a phase's compiled program."""
    found = compile_phase(case, cfg, phase, devices).memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes


def predicted(case: Case, cfg: config.Config, phase: str, backend: str) -> float:
    """The same of the plan: the phase's own and those held trees that the program is given."""
    found = memory(cfg, case.model, trees(cfg, case.model), Split(*case.mesh), backend=backend)
    frozen = "frozen model (base)" if case.rank else "reference copy"
    given = {
        "sampling": ("trained parameters", frozen) if case.rank else ("trained parameters",),
        "reference": (frozen,),
        "update": ("trained parameters", "optimizer state", *([frozen] if case.rank else [])),
    }[phase]
    return sum(found.held[name] for name in given) + sum(found.phases[phase].values())


def compare(
    case: Case, devices: list[Any], backend: str, dtype: str, param_dtype: str = "float32"
) -> list[tuple[str, float, float, float]]:
    """(phase, predicted bytes, compiled bytes, seconds it took to compile) of a case."""
    cfg = settings(case, dtype, param_dtype)
    rows = []
    for phase in case.phases:
        began = time.monotonic()
        actual = compiled(case, cfg, phase, devices)
        guess = predicted(case, cfg, phase, backend)
        rows.append((phase, guess, float(actual), time.monotonic() - began))
    return rows


def full_size(name: str, flags: argparse.Namespace) -> Case:
    """A published model at full size, from tests/golden/full_size.json."""
    known = json.loads(Path("tests/golden/full_size.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(known[name]["config"]))
        architecture = read_decoder(folder)
    mesh = tuple(map(int, flags.mesh.split(",")))
    batch = tuple(map(int, flags.batch.split(",")))
    assert len(mesh) == 3 and len(batch) == 4
    return Case(name, architecture, mesh, batch, flags.rank, phases=tuple(flags.phases.split(",")))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--topology", default="", help="of a TPU, such as v5e:2x4; '': CPU")
    parser.add_argument("--dtype", default="", help="compute dtype; '': float32, TPU bfloat16")
    parser.add_argument("--param_dtype", default="float32")
    parser.add_argument("--full", default="", help="a model of tests/golden/full_size.json")
    parser.add_argument("--mesh", default="1,8,1", help="of --full: data,fsdp,tensor")
    parser.add_argument("--batch", default="64,8,256,256", help="of --full: P,G,S,T")
    parser.add_argument("--rank", type=int, default=0, help="of --full: LoRA's")
    parser.add_argument("--phases", default="reference,update", help="of --full")
    flags = parser.parse_args()
    devices, backend = list(jax.devices()), "cpu"
    if flags.topology:
        backend = "tpu"
        chunks.LOGITS["cpu"] = chunks.LOGITS["tpu"]  # what is traced here runs there
        from jax.experimental import topologies

        devices = list(topologies.get_topology_desc(flags.topology, platform="tpu").devices)
    dtype = flags.dtype or ("bfloat16" if flags.topology else "float32")
    cases = [full_size(flags.full, flags)] if flags.full else CASES
    print("| case | phase | plan, MB | XLA, MB | plan / XLA | compiled in |\n" + "|---" * 6 + "|")
    for case in cases:
        if flags.only in case.name:
            for phase, guess, actual, seconds in compare(
                case, devices, backend, dtype, flags.param_dtype
            ):
                print(
                    f"| {case.name} | {phase} | {guess / 1e6:,.1f} | {actual / 1e6:,.1f} | "
                    f"{guess / actual:.2f} | {seconds:.0f} s |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
