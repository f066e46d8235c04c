"""Traced steps: which ones, and what their summary says of device and host."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.infra import profile


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, of which the third to fifth are traced: some work, then the host sleeps 0.1 s."""
    folder = tmp_path_factory.mktemp("profile")

    def work(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)

    run, x = jax.jit(work), jnp.eye(200)
    for step in profile.profiled(range(10, 16), 3, "loop", folder):
        run(x).block_until_ready()
        if step > 10:  # the first one is not traced
            time.sleep(0.1)
    return folder


def test_the_summary_tells_work_from_idleness(trace: Path) -> None:
    found = json.loads((trace / "summary.json").read_text())
    assert found["steps"] == [13, 14, 15]  # counted from 1, as metrics count them
    assert next(iter(found["programs"])) == "jit_work"
    working = found["busy"] * found["seconds"]
    assert working == pytest.approx(sum(found["programs"].values()), rel=0.05)
    assert 0 < working < found["seconds"] - 0.3  # three times 0.1 s of sleep


def test_the_trace_is_where_tensorboard_looks_for_it(trace: Path) -> None:
    files = {path.suffix for path in (trace / "plugins" / "profile").rglob("*") if path.is_file()}
    assert ".pb" in files and ".gz" in files


def test_another_loops_name_is_not_in_the_trace(trace: Path) -> None:
    (file,) = trace.rglob("*.xplane.pb")
    with pytest.raises(ValueError, match="no step of 'other'"):
        profile.summarise(file, "other")


@pytest.mark.parametrize(
    "steps, count, traced",
    [
        (range(10), 3, [2, 3, 4]),
        (range(5, 9), 3, [6, 7, 8]),
        (range(2), 5, [0, 1]),
        (range(3), 0, []),
        (range(0), 2, []),
    ],
)
def test_every_step_comes_once_whatever_is_traced(
    steps: range, count: int, traced: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: now.append("tracing"))
    monkeypatch.setattr(jax.profiler, "stop_trace", now.clear)
    monkeypatch.setattr(profile, "summarise", lambda *_: profile.Profile(1.0, 0.5, {}))
    (tmp_path / "a.xplane.pb").touch()
    seen = [(step, bool(now)) for step in profile.profiled(steps, count, "loop", tmp_path)]
    assert seen == [(step, step in traced) for step in steps] and not now


def test_a_step_that_fails_ends_the_trace(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in profile.profiled(range(4), 2, "loop", tmp_path):
            1 / 0  # noqa: B018
    with pytest.raises(KeyError):
        for step in profile.profiled(range(4), 4, "loop", tmp_path):
            raise KeyError(step)
    jax.profiler.start_trace(tmp_path)  # would refuse while another trace goes on
    jax.profiler.stop_trace()


class Event:
    """As jax.profiler.ProfileData has them."""

    def __init__(self, name: str, start: float, length: float, **stats: str):
        self.name, self.start_ns, self.duration_ns = name, start, length
        self.stats = list(stats.items())


class Named:
    """A line of events, or a plane of lines."""

    def __init__(self, name: str, parts: list):
        self.name = name
        self.lines = self.events = parts


def test_lines_of_tpus_and_streams_of_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two TPUs, busy for 60 and 20 of 100 ns; a GPU whose streams overlap, 50 of 100."""
    host = Named("/host:CPU", [Named("python", [Event("loop", 0, 40), Event("loop", 50, 50)])])
    tpus = [
        Named(f"/device:TPU:{i}", [
            Named("Steps", [Event("1", 0, 100)]),
            Named("XLA Modules", [Event("jit_update(7)", start, length)]),
            Named("XLA Ops", [Event("fusion.1", start, length, hlo_module="jit_update")]),
        ])
        for i, (start, length) in enumerate([(10, 60), (90, 20)])
    ]  # fmt: skip
    gpu = Named("/device:GPU:0", [
        Named("Stream #7(Compute)", [
            Event("gemm", 0, 30, hlo_module="jit_sample"),
            Event("gemm", 20, 20, hlo_module="jit_update"),
        ]),
        Named("Stream #8(MemcpyD2H)", [Event("MemcpyD2H", 35, 15)]),
    ])  # fmt: skip
    shown: list[Named] = []
    data = SimpleNamespace(from_file=lambda _: SimpleNamespace(planes=shown))
    monkeypatch.setattr(profile, "ProfileData", data)

    shown[:] = [host, *tpus]
    found = profile.summarise(tmp_path, "loop")
    assert found.busy == pytest.approx((60 + 10) / 2 / 100)  # cut at the last step's end
    assert found.programs == {"jit_update": pytest.approx(35e-9)}
    shown[:] = [host, gpu]
    found = profile.summarise(tmp_path, "loop")
    assert found.busy == pytest.approx(0.5)
    seconds = {"jit_sample": 30e-9, "jit_update": 20e-9, "other": 15e-9}
    assert found.programs == {k: pytest.approx(v) for k, v in seconds.items()}
    assert "50.0%" in str(found)
