"""Traces of a few training steps, and what they say: how busy the devices were, and with what.

In: the steps of a loop. Out: the same steps, and a folder with a trace that TensorBoard's profiler
(xprof) and Perfetto open, and with summary.json.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from grpo_jax.infra import distributed
from grpo_jax.infra.files import write_json

WARM = 2  # steps before the trace: they compile
_SHOWN = 5  # programs in the log line

_log = logging.getLogger(__name__)

Interval = tuple[float, float]  # start and end in ns


def profiled(steps: range, count: int, name: str, folder: Path) -> Iterator[int]:
    """Yields the steps of a loop, and traces `count` of them, the first WARM ones left out.

    Args:
      steps: counted from 0; a loop with few of them has its last ones traced.
      count: 0 traces nothing.
      name: of the loop, in the trace.
      folder: where the main process writes; the other processes trace nothing.
    """
    first = max(0, min(WARM, len(steps) - count))
    traced = steps[first : first + count]
    if not traced or not distributed.is_main():
        yield from steps
        return
    yield from steps[:first]
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow the host down, which is what is looked at
    jax.profiler.start_trace(folder, profiler_options=options)
    try:
        for step in traced:
            with jax.profiler.StepTraceAnnotation(name, step_num=step + 1):
                yield step
    finally:
        jax.profiler.stop_trace()
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    found = summarise(newest, name)
    numbers = [step + 1 for step in traced]
    write_json(folder / "summary.json", {"steps": numbers} | found._asdict())
    _log.info("profile of %s %d to %d: %s; %s", name, numbers[0], numbers[-1], found, newest.parent)
    yield from steps[first + count :]


class Profile(NamedTuple):
    """What a trace says of its steps; of several devices the mean."""

    seconds: float  # from the first step's begin to the last one's end
    busy: float  # share of them in which a device computed
    programs: dict[str, float]  # seconds of each jitted function, the longest first

    def __str__(self) -> str:
        shown = list(self.programs.items())[:_SHOWN]
        parts = ", ".join(f"{program} {seconds:.3g} s" for program, seconds in shown)
        return f"devices are busy for {self.busy:.1%} of {self.seconds:.3g} s ({parts})"


def summarise(trace: Path, name: str) -> Profile:
    """Reads a trace of `profiled` steps.

    Args:
      trace: the .xplane.pb file.
      name: as `profiled` had it.

    Raises:
      ValueError: no step of that name is in the trace.
    """
    planes = list(ProfileData.from_file(str(trace)).planes)
    marks = [
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name == name
    ]
    if not marks:
        raise ValueError(f"{trace}: no step of {name!r} is in this trace")
    window = min(start for start, _ in marks), max(end for _, end in marks)
    devices = [found for plane in planes if (found := _executions(plane, window))]
    seconds: dict[str, float] = defaultdict(float)
    busy = 0.0
    for programs in devices:
        busy += _covered([i for intervals in programs.values() for i in intervals]) / len(devices)
        for program, intervals in programs.items():
            seconds[program] += _covered(intervals) / len(devices) / 1e9
    length = window[1] - window[0]
    longest = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    return Profile(length / 1e9, busy / length, longest)


def _executions(plane: Any, window: Interval) -> dict[str, list[Interval]]:
    """When a device ran which program, inside the window: {} for what is no device.

    TPUs have a line of whole programs, GPUs a line a stream, with kernels and copies. A CPU's
    kernels lie in lines of the host's threads; all its devices are one here.
    """
    lines = list(plane.lines)  # of threads several may have one name
    events: Iterator[tuple[str, Any]]
    if whole := [line for line in lines if line.name == "XLA Modules"]:
        events = ((event.name.partition("(")[0], event) for event in whole[0].events)
    else:
        device = plane.name.startswith("/device:")
        events = (
            (str(program or "other"), event)
            for line in lines
            for event in line.events
            if (program := dict(event.stats).get("hlo_module"))
            or (device and line.name.startswith("Stream"))
        )
    out: dict[str, list[Interval]] = defaultdict(list)
    for program, event in events:
        start = max(event.start_ns, window[0])
        end = min(event.start_ns + event.duration_ns, window[1])
        if start < end:
            out[program].append((start, end))
    return dict(out)


def _covered(intervals: list[Interval]) -> float:
    """The length of the intervals' union."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
