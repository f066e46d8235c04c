"""SIGTERM and Ctrl-C: the step is finished and saved, and a second Ctrl-C does not wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax import main
from grpo_jax.infra import distributed, signals
from grpo_jax.infra.writers import MetricWriter
from tests import whole
from tests.test_loop import checkpoint, read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


def send(number: int) -> None:
    """To this process; returns when the thread that listens has heard of it."""
    os.kill(os.getpid(), number)
    time.sleep(0.2)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_the_handlers_come_back(number: int) -> None:
    before, threads = handlers(), threading.active_count()
    with pytest.raises(KeyError), signals.Deferred() as stop:
        assert stop.noted() == 0 and handlers() != before
        send(number)
        assert stop.noted() == number
        send(signal.SIGTERM)  # schedulers repeat themselves
        assert stop.noted() == number
        raise KeyError
    assert handlers() == before and threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_a_signal_behind_the_last_look_is_not_lost() -> None:
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background has none
    try:
        with pytest.raises(KeyboardInterrupt), signals.Deferred():
            send(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    found = []

    def work() -> None:
        with signals.Deferred() as stop:
            found.append((handlers(), stop.noted()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(handlers(), 0)]


def test_one_process_of_several_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, [0, signal.SIGTERM]])

    monkeypatch.setattr(distributed, "gather", gather)
    assert signals.Deferred().noted() == signal.SIGTERM


def child(code: str) -> subprocess.Popen[str]:
    """A program that has said that it is ready."""
    text = "import time, signal\nfrom grpo_jax.infra import signals\n" + textwrap.dedent(code)
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


# What blocks here blocks as a compiler or a device does: no Python handler runs meanwhile.
BLOCKED = "import threading; blocked = threading.Lock(); blocked.acquire(); blocked.acquire()"


def test_outside_of_training_a_signal_ends_the_program_with_a_line() -> None:
    cases = {signal.SIGINT: 130, signal.SIGTERM: 143}
    code = f"with signals.ending():\n    print('ready', flush=True)\n    {BLOCKED}"
    processes = [(child(code), number, status) for number, status in cases.items()]
    for process, number, status in processes:
        process.send_signal(number)
        error = process.communicate(timeout=20)[1]
        assert process.returncode == status
        assert (
            error == f"{signal.Signals(number).name}: ended; the same command goes on from here\n"
        )


def test_a_second_ctrl_c_leaves_at_once() -> None:
    code = f"with signals.Deferred():\n    print('ready', flush=True)\n    {BLOCKED}"
    process = child(code)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "SIGINT: this step is finished and saved; Ctrl-C leaves at once" in error
    assert "SIGINT: left at once; the same command goes on from the last checkpoint" in error


def test_signals_behind_a_stop_change_nothing() -> None:
    process = child(
        """
        import os, sys, threading
        def again(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2)
        join = threading.Thread.join
        threading.Thread.join = lambda *thread: (again(), join(*thread))  # as handlers change
        try:
            with signals.ending():
                with signals.Deferred() as stop:
                    print("ready", flush=True)
                    while not stop.noted(): time.sleep(0.01)
                    again()
                    raise signals.Stopped(stop.noted(), "")
        except signals.Stopped as stop:
            again()
            sys.exit(stop.status)
        """
    )
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 143 and error.splitlines()[1:] == []


def test_a_stopped_run_goes_on_as_if_nothing_had_been(base: Path) -> None:
    unbroken, cfg = whole.finished(base, "short"), whole.short_config()
    folder = base / "stopped"
    cfg.stages = ("sft", "grpo")
    cfg.checkpoint.every = 100  # so that no checkpoint is due where the signal comes
    write, moments = MetricWriter.write, [("sft", 2), ("grpo", 1)]

    def writing(self: MetricWriter, name: str, step: int, metrics: dict) -> None:
        write(self, name, step, metrics)
        if (name, step) in moments:
            moments.remove((name, step))
            send(signal.SIGTERM)

    for arm, step in tuple(moments):
        with whole.machine(base) as patch, pytest.raises(signals.Stopped) as stop:
            patch.setattr(MetricWriter, "write", writing)
            main.train(cfg, str(folder))
        assert stop.value.status == 143
        assert str(stop.value) == (
            f"SIGTERM: stopped {arm} after step {step} of 3, which is saved in {folder}; the same "
            "command goes on from there"
        )
        assert [path.name for path in (folder / "checkpoints" / arm).iterdir()] == [str(step)]
    with whole.machine(base):
        main.train(cfg, str(folder))
    for arm in ("sft", "grpo"):
        ours, theirs = (checkpoint(f / "checkpoints" / arm / "3") for f in (folder, unbroken))
        assert ours == theirs
    for file in ("metrics.jsonl", "samples.jsonl"):
        assert read_rows(folder / file) == read_rows(unbroken / file)


def test_the_command_ends_with_the_signal_s_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(cfg: object, workdir: str) -> None:
        raise signals.Stopped(signal.SIGINT, "SIGINT: stopped sft after step 2 of 3")

    monkeypatch.setattr(main, "train", train)
    monkeypatch.setattr(main, "_CONFIG", type("Flag", (), {"value": None}))
    monkeypatch.setattr(main, "_WORKDIR", type("Flag", (), {"value": None}))
    for name, value in {"handlers": [], "level": 0, "propagate": True}.items():
        monkeypatch.setattr(main._log, name, value)
    before = handlers()
    with pytest.raises(SystemExit) as end:
        main._main(["main"])
    assert end.value.code == 130 and handlers() == before
    assert capsys.readouterr().err == "SIGINT: stopped sft after step 2 of 3\n"
