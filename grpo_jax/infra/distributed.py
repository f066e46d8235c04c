"""Start-up of runs with several processes; a run of one process passes through untouched."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np


def initialize() -> None:
    """Joins the processes of one run, before anything touches a device.

    Several processes are announced by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment, or by SLURM, Open MPI or a TPU pod, which jax reads itself.

    Raises:
      ValueError: the environment announces a coordinator but not who this process is.
    """
    if jax.distributed.is_initialized() or not announced(os.environ):
        return
    jax.config.update(
        "jax_cpu_collectives_implementation", "gloo"
    )  # the default cannot cross hosts
    if "JAX_COORDINATOR_ADDRESS" not in os.environ or not _has_ranks(os.environ):
        jax.distributed.initialize()  # jax finds out from the cluster
        return
    count, rank = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    if not 0 <= rank < count:
        raise ValueError(
            f"JAX_PROCESS_ID: got {rank}, wanted 0 to {count - 1}, since JAX_NUM_PROCESSES={count}"
        )
    jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], count, rank)


def announced(environ: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one process of several."""
    if "JAX_COORDINATOR_ADDRESS" in environ:
        if not _has_ranks(environ) and not _in_cluster(environ):
            raise ValueError(
                "JAX_COORDINATOR_ADDRESS is set without JAX_NUM_PROCESSES and JAX_PROCESS_ID; set "
                "both, or unset it for a run of one process"
            )
        return True
    return _in_cluster(environ)


def is_main() -> bool:
    """True on the one process that writes files and prints."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def agreed(flag: bool) -> bool:
    """The main process's flag, on every process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.bool_(flag)))


def gather(values: np.ndarray) -> np.ndarray:
    """Joins an array of every process along the first axis, in the order of the processes."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def _has_ranks(environ: Mapping[str, str]) -> bool:
    return "JAX_NUM_PROCESSES" in environ and "JAX_PROCESS_ID" in environ


def _in_cluster(environ: Mapping[str, str]) -> bool:
    # An interactive SLURM shell has SLURM_NTASKS but no step of several tasks.
    sizes = (environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return any(size.isdigit() and int(size) > 1 for size in sizes) or len(hosts) > 1


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdigit():
        raise ValueError(f"{name}: got {text!r}, wanted a whole number")
    return int(text)
