"""Start-up of runs with several processes; a run of one process passes through untouched.

`place` finds out who this process is. All then meet and compare what they were told (`rollcall`),
jax joins them, and from there on they end together (`peers`).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.metadata
import os
import platform
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.infra import rollcall
from grpo_jax.infra.peers import Peers
from grpo_jax.infra.place import announced, find, start_seconds
from grpo_jax.infra.provenance import PACKAGES

HEARTBEAT_SECONDS = 60  # jax's own, behind ours: without a sign of life a process counts as dead
ENDING_SECONDS = 60.0  # in which the others must end too, once a process ends with a status

_peers: Peers | None = None


def initialize(facts: Mapping[str, Any] | None = None) -> None:
    """Joins the processes of one run, before anything touches a device.

    Several processes are announced by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID in the environment, or by SLURM, Open MPI, Kubernetes or a TPU pod. It takes at
    most START_SECONDS until all are there, or all have the same error.

    Args:
      facts: name -> JSON value that must be the same in every process, such as the configuration;
        the code and the packages are compared besides.

    Raises:
      ValueError: the environment says too little or nonsense; processes are missing, or differ.
      OSError: process 0 cannot be reached.
    """
    global _peers
    if jax.distributed.is_initialized() or not announced(os.environ):
        return
    seconds = start_seconds(os.environ)
    end = time.monotonic() + seconds
    place = find(os.environ, seconds)
    if place.count == 1:
        return
    everything = {**code_facts(), **(facts or {})}
    left = max(1.0, end - time.monotonic())
    _peers = rollcall.call(place.address, place.count, place.rank, everything, left)
    atexit.register(_peers.leave, ENDING_SECONDS)  # before jax's own farewell, where all wait
    # Across hosts, what jax takes for CPU devices otherwise cannot communicate.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM from `signals`, which ends the program or its training.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.rank,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",  # `find` has asked it already
        initialization_timeout=int(seconds),
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Around the work of a run: when one process fails, all end, and say which and why.

    Without it the others would wait for that process in their next collective operation. An
    ordinary end, too, is waited for together. A run of one process passes through untouched.
    """
    try:
        yield
    except SystemExit as error:
        if _peers is None:
            raise
        if isinstance(error.code, str):
            _peers.fail(error.code.removeprefix("error: "), error.code)
        if not _peers.leave(None if not error.code else ENDING_SECONDS):
            words = f"it ended with status {error.code} while others worked"
            _peers.fail(words, f"error: {words}")
        raise
    except BaseException as error:
        if _peers is None:
            raise
        last = (traceback.format_exception_only(error)[-1]).strip()
        _peers.fail(last, traceback.format_exc())
    else:
        if _peers is not None:
            _peers.leave()


def tell(words: str) -> None:
    """Says to the other processes, if any, that this one ends and why; they end too."""
    if _peers is not None:
        _peers.tell(words)


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


def check_shared(file: Path, seconds: float = 30.0) -> None:
    """Every process must see a file that process 0 has just written: the workdir is for all.

    Args:
      seconds: that a network file system may need until the others see it.

    Raises:
      ValueError: on every process, if one does not see it, or sees another.
    """
    if jax.process_count() == 1:
        return
    wanted, end = int(gather(_checksum(file))[0]), time.monotonic() + seconds
    while int(_checksum(file)[0]) != wanted and time.monotonic() < end:
        time.sleep(0.5)
    seen = gather(_checksum(file))
    if others := [str(rank) for rank, found in enumerate(seen) if int(found) != wanted]:
        raise ValueError(
            f"workdir {file.parent}: process {', '.join(others[:8])} of {len(seen)} does not see "
            "what process 0 writes there; take a folder on a disk that all hosts share"
        )


def _checksum(file: Path) -> np.ndarray:
    try:
        return np.array([zlib.crc32(file.read_bytes())], np.uint32)
    except OSError:
        return np.array([0], np.uint32)


def code_facts() -> dict[str, str | None]:
    """What of the software must be the same everywhere: our own files and the packages."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    facts: dict[str, str | None] = {
        "grpo_jax's code": digest.hexdigest()[:12],
        "python": platform.python_version(),
    }
    for package in PACKAGES[1:]:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = None
    return facts
