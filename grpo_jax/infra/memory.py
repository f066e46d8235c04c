"""How much memory this process has needed."""

from __future__ import annotations

import resource
import sys

import jax


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
