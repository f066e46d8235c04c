"""The mesh of a configuration that leaves it open, on devices that are only told of."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import plan_check
from grpo_jax import config
from grpo_jax.config import Mesh
from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.memory import device_bytes
from grpo_jax.plan.choose import Devices, choose
from grpo_jax.plan.devices import GIB
from grpo_jax.plan.memory import Split, memory
from grpo_jax.plan.model import trees
from grpo_jax.plan.suggest import ROOM

LITTLE = dataclasses.replace(
    plan_check.SMALL, num_layers=48, vocab_size=1000, head_dim=16, num_kv_heads=2
)


def settings(prompts: int = 8) -> config.Config:
    cfg = plan_check.settings(plan_check.Case("little", LITTLE, batch=(prompts, 4, 16, 16)))
    cfg.model.path = "little"
    return cfg


def chosen(
    devices: Devices, *arms: tuple[config.Config, str], mesh: Mesh | None = None
) -> tuple[Split, str]:
    return choose(mesh or Mesh(), arms or [(settings(), "grpo")], LITTLE, devices)


def just_enough(*sizes: int) -> float:
    """The usable bytes of a device on which this mesh only just fits."""
    cfg = settings()
    return memory(cfg, LITTLE, trees(cfg, LITTLE), Split(*sizes)).peak / ROOM + 1


def test_what_fits_each_device_is_replicated() -> None:
    split, why = chosen(Devices(8, 8, 16 * GIB))
    assert split == Split(8, 1, 1)
    assert why == "0.6 of 16.0 GiB a device are expected to be used"


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 4, 1), (1, 8, 1)])
def test_weights_are_split_as_far_as_memory_demands(sizes: tuple[int, int, int]) -> None:
    split, why = chosen(Devices(8, 8, just_enough(*sizes)))
    assert split == Split(*sizes)
    assert f"with data {sizes[0] * 2}, fsdp {sizes[1] // 2}, tensor 1" in why


def test_heads_are_split_where_weights_do_not_suffice() -> None:
    """Sampling brings the weights together along fsdp, so beyond that only tensor helps."""
    usable = just_enough(1, 4, 2)
    assert usable < just_enough(1, 8, 1)
    split, _ = chosen(Devices(8, 8, usable))
    assert split.tensor == 2
    split, why = chosen(Devices(8, 1, usable))  # a process a device: tensor would cross them
    assert split == Split(1, 8, 1) and "NOTHING IS EXPECTED TO FIT" in why


@pytest.mark.parametrize("usable", [0.0, 16.0 * GIB])
def test_rows_that_do_not_divide_move_devices_to_tensor(usable: float) -> None:
    few = settings(prompts=4)
    split, why = chosen(Devices(8, 8, usable), (few, "grpo"))
    assert split == (Split(4, 1, 2) if usable else Split(1, 4, 2))
    name = "grpo.prompts_per_step / (num_minibatches * gradient_accumulation_steps)"
    assert why.endswith(f"; tensor because of batches that do not divide: {name} = 4")
    split, _ = chosen(Devices(8, 8, usable), (few, "grpo"), (settings(), "grpo"))
    assert split.rows == 4  # every arm's
    with pytest.raises(ValueError, match=r"got 6 rows; wanted a multiple of 4, .* 2 at most"):
        chosen(Devices(8, 8, usable), (settings(prompts=6), "grpo"))
    with pytest.raises(ValueError, match=r"got 4 rows; wanted a multiple of 8, .* 1 at most"):
        chosen(Devices(8, 1, usable), (few, "grpo"))


def test_without_known_memory_everything_is_split() -> None:
    split, why = chosen(Devices(8, 4))
    assert split == Split(1, 8, 1) and "do not say how much memory" in why
    assert chosen(Devices(4, 4))[0] == Split(1, 4, 1)  # a run that goes on on other devices
    assert chosen(Devices(1, 1))[0] == Split(1, 1, 1)


def test_sizes_that_are_set_are_kept() -> None:
    there = Devices(8, 8, 16 * GIB)
    assert chosen(there, mesh=Mesh(2, 2, 2)) == (Split(2, 2, 2), "as configured")
    assert chosen(there, mesh=Mesh(fsdp=-1))[0] == Split(1, 8, 1)
    assert chosen(there, mesh=Mesh(2, -1, 2))[0] == Split(2, 2, 2)
    assert chosen(there, mesh=Mesh(tensor=2))[0] == Split(4, 1, 2)
    assert chosen(there, mesh=Mesh(fsdp=4))[0] == Split(2, 4, 1)
    for wrong, words in (
        (Mesh(3, 1, 1), "mesh.data=3, mesh.fsdp=1, mesh.tensor=1: the sizes do not fit the 8"),
        (Mesh(data=3), "mesh.data=3, mesh.fsdp=0, mesh.tensor=0: no mesh of this run's 8 devices"),
        (Mesh(tensor=4), "mesh.tensor: got 4, but little has 8 heads and 2 key-value heads"),
        (Mesh(tensor=-1), "mesh.tensor: got 8"),
    ):
        with pytest.raises(ValueError) as error:
            chosen(there, mesh=wrong)
        assert words in str(error.value)
    with pytest.raises(ValueError, match="got 4 rows, wanted a multiple of 8"):
        chosen(there, (settings(prompts=4), "grpo"), mesh=Mesh(-1, 1, 1))


def test_supervised_arms_need_less_and_the_neediest_arm_decides() -> None:
    cfg = settings()
    cfg.sft.batch_size = cfg.self_sft.sft.batch_size = 8
    there = Devices(8, 8, just_enough(1, 8, 1))
    sizes = {m: chosen(there, (cfg, m))[0].fsdp for m in ("grpo", "sft", "self_sft")}
    assert sizes["sft"] < sizes["grpo"] == 8 and sizes["sft"] <= sizes["self_sft"]
    assert chosen(there, (cfg, "sft"), (cfg, "grpo"))[0].fsdp == 8


def test_memory_is_the_smallest_device_s_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_bytes() == 0  # CPU
    sizes = [16 * GIB, 15 * GIB + 7]
    fakes = [SimpleNamespace(memory_stats=lambda n=n: {"bytes_limit": n}) for n in sizes]
    monkeypatch.setattr(jax, "local_devices", lambda: fakes)
    assert device_bytes() == 15 * GIB
    monkeypatch.setattr(distributed, "gather", lambda x: np.concatenate([x, [9 * 2**10]]))
    assert device_bytes() == 9 * GIB


def test_processes_take_their_rows_in_order() -> None:
    """jax takes each host of a GPU cluster for a slice, and its own make_mesh refuses several."""
    made = [
        SimpleNamespace(platform="gpu", process_index=p, slice_index=p, id=4 * p + i)
        for i in range(4)
        for p in range(2)
    ]
    grid = mesh_lib._arranged((1, 4, 2), made)
    assert [d.id for d in grid.flat] == list(range(8))
    pod = mesh_lib._arranged((1, 16, 1), chips(4, 2))
    assert [d.process_index for d in pod.flat] == sorted([0, 1, 2, 3] * 4)


def test_chips_of_one_process_lie_by_their_torus() -> None:
    """Eight chips, two by four: each pair along tensor is connected, and each four along fsdp."""
    grid = mesh_lib._arranged((1, 4, 2), chips(4, 4, rows=2))
    for pair in grid[0]:
        assert sum(abs(a - b) for a, b in zip(*(d.coords for d in pair), strict=True)) == 1
    assert sorted(d.id for d in grid.flat) == list(range(8))


def chips(side: int, block: int, rows: int = 4) -> list[SimpleNamespace]:
    """A TPU v5e slice; each block x block chips belong to one process."""
    return [
        SimpleNamespace(
            platform="tpu", device_kind="TPU v5e", coords=(x, y, 0), core_on_chip=0,
            process_index=(y // block) * (side // block) + x // block, id=y * side + x,
        )
        for y in range(rows)
        for x in range(side)
    ]  # fmt: skip
