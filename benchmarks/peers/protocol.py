"""How a worker talks: JSON lines, commands on standard input, answers on standard output.

    in   {"task": ..., "folder": ..., ...}    the specification, once
    out  {"event": "ready", ...}              loaded; how long that took, versions, a check value
    in   {"command": "run"}
    out  {"event": "run", "seconds": ..., "cpu_seconds": ..., ...}
    in   end of file, or {"command": "stop"}
    out  {"event": "end", "peak_rss": ..., ...}

What libraries print goes to standard error. Only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any


class Channel:
    """The worker's end. Read `spec`, load, call `ready`; then `wait` and `done` in turn."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        # Libraries may print: keep the real standard output to ourselves.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        line = sys.stdin.readline()
        if not line:
            sys.exit("no specification on standard input; benchmarks.run starts this program")
        self.spec: dict[str, Any] = json.loads(line)

    def ready(self, packages: tuple[str, ...], **more: Any) -> None:
        """Says that everything is loaded and commands are welcome."""
        versions = {name: metadata.version(name) for name in packages}
        self._send(
            event="ready",
            load_seconds=time.perf_counter() - self._started,
            versions={"python": platform.python_version(), **versions},
            **more,
        )

    def wait(self) -> bool:
        """Waits for a command. True: run once more, the clock is running. False: stop."""
        line = sys.stdin.readline()
        if not line or json.loads(line).get("command") != "run":
            return False
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return True

    def done(self, **more: Any) -> None:
        """Says that a run is over; results must be on the host by now."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self._send(event="run", seconds=wall, cpu_seconds=cpu, peak_rss=peak_rss(), **more)

    def end(self, **more: Any) -> None:
        """Says goodbye; call it once, at the very end."""
        self._send(event="end", peak_rss=peak_rss(), **more)

    def serve(self, run: Callable[[int], dict[str, Any]]) -> None:
        """Answers every command with run(number of the command)."""
        count = 0
        while self.wait():
            self.done(**run(count))
            count += 1

    def _send(self, **message: Any) -> None:
        print(json.dumps(message), file=self._out, flush=True)


def peak_rss() -> int:
    """Bytes of resident memory at the highest, since the start or `reset_peak_rss`."""
    # Unlike ru_maxrss, VmHWM begins at 0 when the program starts.
    if found := _status("VmHWM"):
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> int:
    """Starts the peak anew and returns the bytes that are resident now; 0 where Linux is not."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return 0
    return _status("VmRSS")


def _status(name: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith(name + ":"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def torch_setup(spec: dict[str, Any]) -> tuple[Any, Any, str]:
    """(torch, dtype, device) of a worker that uses PyTorch."""
    import torch

    torch.manual_seed(0)
    return torch, getattr(torch, spec["dtype"]), "cuda" if spec["device"] == "gpu" else "cpu"


def torch_device_peak(torch: Any, device: str) -> int:
    """Bytes of accelerator memory at the highest; 0 on CPU."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else 0


def jax_device_peak(jax: Any) -> int:
    """Bytes of accelerator memory at the highest; 0 where the backend does not count."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("peak_bytes_in_use", 0))


def text_stats(lengths: list[int]) -> dict[str, Any]:
    """What a run generated."""
    return {
        "tokens": int(sum(lengths)),
        "mean_length": sum(lengths) / len(lengths),
        "longest": int(max(lengths)),
    }
