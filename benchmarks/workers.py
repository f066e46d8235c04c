"""The other end of peers/protocol.py: starts worker programs and gives them commands in turn."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = {
    "transformers": {"sampling": "transformers_generate"},
    "trl": {"step": "trl_grpo"},
    "tunix": {"sampling": "tunix_sample", "step": "tunix_grpo"},
    "sentence-transformers": {"encoding": "sentence_transformers_embed"},
}


class WorkerError(RuntimeError):
    """A worker died, said nothing for too long or said something else than expected."""


@dataclass
class Worker:
    """A worker process and what it has reported.

    Args:
      program: "ours", a variant of it, or a peer.
      python: its interpreter.
      spec: what it reads first; `kind` picks the module.
      log: where its standard error goes.
      timeout: seconds to wait for an answer.
    """

    program: str
    python: Path
    spec: dict[str, Any]
    log: Path
    timeout: float
    ready: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    ended: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> Worker:
        kind = self.spec["kind"]
        module = "ours" if self.program.startswith("ours") else MODULES[self.program][kind]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._errors = open(self.log, "w", encoding="utf-8")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(self.python), "-m", f"benchmarks.peers.{module}"],
            cwd=REPOSITORY,
            env=_environment(self.spec["device"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._rest = b""
        try:
            self._tell({**self.spec, "program": self.program})
            self.ready = self._hear("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def run(self) -> None:
        """One measured run."""
        self._tell({"command": "run"})
        self.runs.append(self._hear("run"))

    def stop(self) -> None:
        """Lets the worker end by itself and report its peaks."""
        self._tell({"command": "stop"})
        self.ended = self._hear("end")

    def result(self) -> dict[str, Any]:
        """The record of this program: the first run apart from the others."""
        first, *steady = self.runs
        steady = steady or self.runs
        out = {
            "program": self.program,
            "versions": self.ready["versions"],
            "load_seconds": self.ready["load_seconds"],
            "check": self.ready.get("check"),
            "first_seconds": first["seconds"],
            "seconds": [run["seconds"] for run in steady],
            "cpu_seconds": [run["cpu_seconds"] for run in steady],
            "median_seconds": statistics.median(run["seconds"] for run in steady),
            "median_cpu_seconds": statistics.median(run["cpu_seconds"] for run in steady),
            "peak_rss": self.ended["peak_rss"],
            "device_peak": self.ended.get("device_peak", 0),
            "last_run": steady[-1],
        }
        unit = {"sampling": "tokens", "encoding": "texts"}.get(self.spec["kind"])
        if unit:
            rates = [run[unit] / run["seconds"] for run in steady]
            out |= {"unit": unit, "rates": rates, "median_rate": statistics.median(rates)}
        return out

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("died") from None

    def _hear(self, event: str) -> dict[str, Any]:
        """The next message, which must be this event."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise self._failed(f"said nothing for {self.timeout:.0f} s")
                chunk = os.read(self._process.stdout.fileno(), 1 << 16)
                if not chunk:
                    raise self._failed("died")
                self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        message = json.loads(line)
        if message.get("event") != event:
            raise self._failed(f"said {message}, wanted {event!r}")
        return message

    def _failed(self, what: str) -> WorkerError:
        self._errors.flush()
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-12:])
        return WorkerError(f"{self.program} {what}; {self.log} ends with\n{tail}")


def _environment(device: str) -> dict[str, str]:
    """The workers' environment variables: no network, no compilation cache, the right device."""
    own = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "TOKENIZERS_PARALLELISM": "true",
        "PYTHONUNBUFFERED": "1",
    }
    if device == "cpu":
        own |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # Two programs share the device while they take turns.
        own |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return {**os.environ, **own}
