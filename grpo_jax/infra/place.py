"""Which process of a run this is, from the environment: said outright, or by a scheduler.

jax reads TPU VMs, GKE, SLURM and Open MPI 4; what it leaves out or gets wrong for one process a
host stands here: Open MPI 5, indexed Jobs of Kubernetes, and which devices are a process's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from typing import Any

from grpo_jax.infra import rollcall

START_SECONDS = 60.0  # until everyone must be there; GRPO_JAX_START_SECONDS overrides it


@dataclasses.dataclass(frozen=True)
class Place:
    """One process of a run of several."""

    address: str  # "host:port" of process 0
    count: int
    rank: int
    local_devices: tuple[int, ...] | None = None  # None: all that this process can see


def announced(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one process of several.

    Raises:
      ValueError: it says that there are others, but not enough to find them.
    """
    count = _number(environ, "JAX_NUM_PROCESSES")
    if count is not None and count < 1:
        raise ValueError("JAX_NUM_PROCESSES: got 0, wanted at least 1")
    if count is not None:
        return count > 1
    if "JAX_COORDINATOR_ADDRESS" in environ and not _in_step(environ) and not _on_tpu(environ):
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS is set without JAX_NUM_PROCESSES and JAX_PROCESS_ID; set "
            "both, or unset it for a run of one process"
        )
    if _on_tpu(environ) or _in_step(environ):
        return True
    if "JOB_COMPLETION_INDEX" in environ and "TPU_WORKER_HOSTNAMES" not in environ:
        raise ValueError(
            "JOB_COMPLETION_INDEX is set, as in an indexed Job of Kubernetes: set "
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, as launch/gke_jobset.yaml does, or "
            "JAX_NUM_PROCESSES=1 where each pod is a run of its own"
        )
    return False


def find(environ: Mapping[str, str], seconds: float = START_SECONDS) -> Place:
    """Which of the processes that `announced` has seen this is.

    What is said outright comes first, then a TPU pod's words, SLURM's, Open MPI's; the number of
    a pod of an indexed Job (Kubernetes) completes an address and a number of processes.

    Args:
      seconds: that a host name may need to become known.

    Raises:
      ValueError: a part is missing or nonsense.
    """
    from jax._src import clusters  # jax's own reading of schedulers; it has no public name

    address = environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number(environ, "JAX_NUM_PROCESSES")
    rank = _number(environ, "JAX_PROCESS_ID")
    port = environ.get("JAX_COORDINATOR_PORT")
    devices = None
    if None in (address, count, rank):
        if _on_tpu(environ):
            cluster: Any = clusters.GceTpuCluster
            if "TPU_WORKER_HOSTNAMES" in environ or "TPU_PROCESS_ADDRESSES" in environ:
                cluster = clusters.GkeTpuCluster
            count = count or cluster.get_process_count()
            rank = cluster.get_process_id() if rank is None else rank
            address = address or cluster.get_coordinator_address(int(seconds), port)
        elif "SLURM_PROCID" in environ:
            count = count or _number(environ, "SLURM_STEP_NUM_TASKS")
            rank = _number(environ, "SLURM_PROCID") if rank is None else rank
            address = address or clusters.SlurmCluster.get_coordinator_address(None, port)
            devices = _own_device(environ, environ.get("SLURM_LOCALID"), _slurm_tasks(environ))
        elif "OMPI_COMM_WORLD_RANK" in environ:
            count = count or _number(environ, "OMPI_COMM_WORLD_SIZE")
            rank = _number(environ, "OMPI_COMM_WORLD_RANK") if rank is None else rank
            address = address or _ompi_address(environ, clusters.OmpiCluster, port)
            here = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
            devices = _own_device(environ, environ.get("OMPI_COMM_WORLD_LOCAL_RANK"), here)
        elif rank is None:
            rank = _number(environ, "JOB_COMPLETION_INDEX")
    named = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": count,
        "JAX_PROCESS_ID": rank,
    }
    if missing := [name for name, value in named.items() if value is None]:
        raise ValueError(
            f"{' and '.join(missing)} missing: several processes need all of {', '.join(named)}, "
            "or a scheduler that says them"
        )
    assert address is not None and count is not None and rank is not None
    if not 0 <= rank < count:
        raise ValueError(
            f"JAX_PROCESS_ID: got {rank}, wanted 0 to {count - 1}, since there are {count} "
            "processes (JAX_NUM_PROCESSES)"
        )
    rollcall.split(address)
    return Place(address, count, rank, devices)


def start_seconds(environ: Mapping[str, str]) -> float:
    """Until everyone must be there: START_SECONDS, or GRPO_JAX_START_SECONDS."""
    text = environ.get("GRPO_JAX_START_SECONDS", str(START_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= 86400.0:
        raise ValueError(f"GRPO_JAX_START_SECONDS: got {text!r}, wanted seconds, 1 to 86400")
    return seconds


def _in_step(environ: Mapping[str, str]) -> bool:
    # An interactive SLURM shell has SLURM_NTASKS but no step of several tasks.
    sizes = (environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _on_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this is a host of a TPU pod, of several hosts or slices."""
    if environ.get("JAX_PLATFORMS", "tpu") == "cpu" and "TPU_WORKER_HOSTNAMES" not in environ:
        return False
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):  # GKE, and some TPU VMs
        if name in environ:
            slices = environ.get("MEGASCALE_NUM_SLICES", "1")
            return len(environ[name].split(",")) > 1 or slices not in ("", "1")
    from jax._src import clusters
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    if not running_in_cloud_tpu_vm or not clusters.GceTpuCluster.is_env_present():
        return False
    return clusters.GceTpuCluster.get_process_count() > 1  # the metadata server knows


def _own_device(
    environ: Mapping[str, str], local_rank: str | None, local_count: int | None
) -> tuple[int, ...] | None:
    """The device of one of several processes of a host; None: whatever it can see.

    jax alone takes one device a process under SLURM and Open MPI, also where a process has a whole
    host, and counts past the end where the scheduler shows each process only its own.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
    alone = local_count == 1 or (visible and "," not in visible)
    if alone or local_rank is None or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    return (int(local_rank),)


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, from a list such as "2(x3),1"."""
    tasks: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            tasks += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return tasks[int(node)] if node.isdigit() and int(node) < len(tasks) else None


def _ompi_address(environ: Mapping[str, str], cluster: Any, port: str | None) -> str:
    if cluster.is_env_present():  # Open MPI 4 says where mpirun was started
        return cluster.get_coordinator_address(None, port)
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environ.get("OMPI_COMM_WORLD_SIZE"):
        job = environ.get("PMIX_NAMESPACE", "").encode()
        drawn = 61440 + int(hashlib.sha256(job).hexdigest(), 16) % 4096
        return f"localhost:{port or drawn}"
    raise ValueError(
        "JAX_COORDINATOR_ADDRESS: not set, and Open MPI 5 does not say on which host process 0 is; "
        "start with `mpirun -x JAX_COORDINATOR_ADDRESS=HOST:PORT`, HOST the first of its hosts"
    )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is not None and not text.isdigit():
        raise ValueError(f"{name}: got {text!r}, wanted a whole number")
    return None if text is None else int(text)
