"""How much memory there is, and how much this process has needed."""

from __future__ import annotations

import resource
import sys

import jax
import numpy as np

from grpo_jax.infra import distributed


def device_bytes() -> int:
    """What a program may use of the smallest device of all processes.

    0 where a device does not say, as on CPU.
    """
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in jax.local_devices()]
    mib = np.array([min(limits) // 2**20], np.int32)  # jax has no int64 unless told to
    return int(distributed.gather(mib).min()) * 2**20


def peak_bytes() -> int:
    """The most that one device has held since the process began.

    Where devices do not say (CPU), the most that the process itself has held.
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    known = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if known:
        return int(max(known))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
