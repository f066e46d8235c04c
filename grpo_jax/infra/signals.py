"""SIGTERM and Ctrl-C: training finishes its step and saves; everything else ends at once.

With several processes they agree at the end of each step whether any has noted a signal, so all
stop behind the same step whoever got it and when, and write one checkpoint together. jax's own
preemption service would cost no gather, but it hears of nothing more (in its public builds a notice
is a SIGTERM; Cloud TPU, GKE and SLURM send one), knows no Ctrl-C, stops at a step that still lies
ahead, and swallows every SIGTERM that comes outside of training.

A thread reads the signals as they come, so that it can answer while the main thread waits for a
device or a compiler, where a Python handler would not run for minutes.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from grpo_jax.infra import distributed

_log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_stopping = threading.Event()  # the program is on its way out, for a signal


class Stopped(Exception):
    """A signal ended the training between two steps; the message says where it goes on from."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.number = number  # of the signal
        self.status = 128 + number  # what the program should end with


class Deferred:
    """A context in which the first signal is noted, and a Ctrl-C behind it ends the program.

    The handlers of before are back afterwards. Outside the main thread, where no handler can be
    set, it does nothing.
    """

    def __init__(self) -> None:
        self._number = 0
        self._handling = _handling(self._note)

    def __enter__(self) -> Deferred:
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is Stopped:
            _stopping.set()
        self._handling.__exit__(None, None, None)
        if self._number and kind is None:  # it came behind the last look at `noted`
            signal.raise_signal(self._number)

    def noted(self) -> int:
        """The signal that any process of the run has noted, on all of them; 0 for none.

        With several processes all must call it at the same moment: it is one gather of a number.
        """
        return int(distributed.gather(np.array([self._number], np.int32)).max())

    def _note(self, number: int) -> None:
        if not self._number:
            self._number = number
            name = signal.Signals(number).name
            _log.warning("%s: this step is finished and saved; Ctrl-C leaves at once", name)
        elif number == signal.SIGINT:
            _leave(number, "left at once; the same command goes on from the last checkpoint")


@contextmanager
def ending() -> Iterator[None]:
    """A context in which a signal ends the program with one line, status 128 + its number.

    Behind a `Stopped` only Ctrl-C does: schedulers repeat themselves, and all has been saved.
    """

    def act(number: int) -> None:
        if number == signal.SIGINT or not _stopping.is_set():
            _leave(number, "ended; the same command goes on from here")

    _stopping.clear()
    with _handling(act, deaf_afterwards=_stopping.is_set):
        yield


def _leave(number: int, words: str) -> None:
    """Ends the process without unwinding: what is on disk outlives a kill at any moment."""
    name = signal.Signals(number).name
    print(f"{name}: {words}", file=sys.stderr, flush=True)
    distributed.tell(f"was ended by {name}; start all again and the run goes on")
    os._exit(128 + number)


@contextmanager
def _handling(
    act: Callable[[int], None], deaf_afterwards: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Calls `act`, in a thread of its own, with the number of each signal that comes.

    The handlers of before are back afterwards, but if `deaf_afterwards` SIGTERM is ignored, without
    a moment between in which it would kill.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_listen, args=(reader, act), daemon=True)
    thread.start()
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        for number in _SIGNALS:  # Python writes a signal to the pipe only if it has a handler
            signal.signal(number, lambda *_: None)
        yield
    finally:
        signal.set_wakeup_fd(wakeup)  # first, so that the outer of two contexts misses nothing
        if deaf_afterwards():
            before[signal.SIGTERM] = signal.SIG_IGN
        for number, handler in before.items():  # None: one that Python did not set
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(writer)
        thread.join()
        os.close(reader)


def _listen(reader: int, act: Callable[[int], None]) -> None:
    while numbers := os.read(reader, 64):
        for number in numbers:
            if number in _SIGNALS:
                act(number)
