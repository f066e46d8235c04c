"""Damaged files for every reader: `python -m tests.faults.fuzz [--reader NAME] [--inputs N]`.

Each input is a folder of whole files with a few changes (tests.faults.mutate). A reader may refuse
it with ValueError or OSError, in one message that a terminal can show, or accept it and give what
the rest of the program relies on. Anything else is a crash: another exception, a process that dies,
more than TOO_LONG seconds or TOO_MUCH memory, a file opened beside the folder, a process started, a
connection opened, an object unpickled.

Inputs that reach pairs of lines of grpo_jax that no input has reached before become starting points
themselves (coverage-guided); one input in TRACED is watched for that. The same seed gives the same
inputs. Every reader runs in a process of its own, which is started again behind an input that kills
it. The table goes to standard output, and `--keep FOLDER` keeps the first input of each crash.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.faults import readers
from tests.faults.mutate import CANARY, Case, mutate

TRACED = 8  # one input in so many is traced, which makes it some times slower
TOO_LONG = 5.0  # processor seconds for one input
HUNG = 30.0  # seconds without an end of it
_LOOK = 0.05  # seconds between two looks at the child
TOO_MUCH = 1 << 30  # bytes of address space beyond what the whole files took
LONGEST_MESSAGE = 20_000  # characters
FORBIDDEN = (
    "pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
    "os.forkpty", "socket.connect", "webbrowser.open",
)  # fmt: skip
PACKAGE = str(Path(__file__).resolve().parents[2] / "grpo_jax")


class TooSlow(BaseException):
    """One input took longer than TOO_LONG."""


class Forbidden(BaseException):
    """A reader did what no file may make it do."""


class Result:
    """What became of the inputs of one reader."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tried = self.accepted = 0
        self.seconds = self.slowest = 0.0
        self.megabytes = 0  # of growth
        self.pairs = 0  # of lines reached
        self.crashes: dict[str, tuple[int, int]] = {}  # what -> how often, the first input

    def crash(self, what: str, index: int) -> bool:
        """Counts a crash; whether it is the first of its kind."""
        count, first = self.crashes.get(what, (0, index))
        self.crashes[what] = (count + 1, first)
        return count == 0


class Coverage:
    """Pairs of consecutive lines of grpo_jax, as sys.settrace sees them."""

    def __init__(self) -> None:
        self.seen: set[tuple[int, int, int]] = set()
        self.fresh = False

    @contextmanager
    def watch(self) -> Iterator[None]:
        self.fresh = False
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _call(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        code, last = hash(frame.f_code), 0

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal last
            pair = (code, last, frame.f_lineno if event == "line" else -1)
            if pair not in self.seen:
                self.seen.add(pair)
                self.fresh = True
            last = frame.f_lineno
            return line

        return line


_watched: list[str] = []  # while an input is read: the folder's parent


def _audit(event: str, arguments: tuple) -> None:
    """What the interpreter reports of a reader; never removed, so it looks at `_watched` first."""
    if not _watched:
        return
    if event in FORBIDDEN:
        raise Forbidden(f"{event} {arguments!r:.200}")
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = os.fsdecode(arguments[0])
        if path.endswith(CANARY) and "/input/" not in os.path.normpath(path) + "/":
            raise Forbidden(f"opened {path!r}, outside the folder")


def fuzz(name: str, inputs: int, seed: int, keep: Path | None = None, first: int = 0) -> Result:
    """Reads inputs `first` to `inputs` of one reader in this process.

    Args:
      name: of readers.READERS.
      inputs: how many.
      seed: of the changes.
      keep: where the first input of every crash goes.
      first: where to go on behind an input that killed the process.
    """
    with _scratch() as base:
        return _fuzz(name, inputs, seed, keep, first, base, lambda index: None)


@contextmanager
def _scratch() -> Iterator[Path]:
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as base:
        yield Path(base)


def _fuzz(
    name: str, inputs: int, seed: int, keep: Path | None, first: int, base: Path,
    tell: Callable[[int], None],
) -> Result:  # fmt: skip
    reader, result, coverage = readers.READERS[name], Result(name), Coverage()
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    (base / "seeds").mkdir()
    corpus = reader.seeds(base / "seeds")
    whole = len(corpus)
    (base / CANARY).write_text('{"secret": 1}')
    folder = base / "input"
    for case in corpus:  # a reader that refuses whole files would make the rest meaningless
        with coverage.watch():
            _prepare(case, folder)
            reader.read(folder)
    with limits(TOO_MUCH):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        for index in range(first, inputs):
            rng = random.Random(f"{seed}/{name}/{index}")
            # what is damaged already is mostly refused at once: half start from whole files
            case = mutate(rng.choice(corpus[:whole] if rng.random() < 0.5 else corpus), rng)
            tell(index)
            _prepare(case, folder)
            _one(reader, case, folder, index, result, coverage, corpus, keep)
        result.seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result.megabytes = grown // 1024
    result.pairs = len(coverage.seen)
    return result


_installed: list[bool] = []


def _prepare(case: Case, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    readers.store(case, folder)


def _one(
    reader: readers.Reader, case: Case, folder: Path, index: int, result: Result,
    coverage: Coverage, corpus: list[Case], keep: Path | None,
) -> None:  # fmt: skip
    """Reads one input and records what came of it."""
    traced = index % TRACED == 0
    what = ""
    start = time.process_time()
    _watched.append(str(folder))
    signal.setitimer(signal.ITIMER_PROF, TOO_LONG)
    try:
        if traced:
            with coverage.watch():
                reader.read(folder)
        else:
            reader.read(folder)
        result.accepted += 1
    except (ValueError, OSError) as error:
        what = _unfit(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        what = _site(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _watched.pop()
    result.tried += 1
    result.slowest = max(result.slowest, time.process_time() - start)
    if what and result.crash(what, index) and keep:
        readers.store(case, keep / f"{result.name}-{index}")
        (keep / f"{result.name}-{index}.txt").write_text(what + "\n", "utf-8", "replace")
    if traced and coverage.fresh and not what and sum(map(len, case.values())) < 1_000_000:
        corpus.append(case)


def _unfit(error: BaseException) -> str:
    """What is wrong with a message, '' if nothing is."""
    text = str(error)
    if len(text) > LONGEST_MESSAGE:
        return f"a message of more than {LONGEST_MESSAGE} characters at {_place(error)}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"a message that is not UTF-8 at {_place(error)}"
    if any(ord(c) < 32 and c not in "\n\t" for c in text):
        return f"control characters in a message at {_place(error)}"
    if not text.strip():
        return f"an empty message at {_place(error)}"
    return ""


def _place(error: BaseException) -> str:
    """FILE:LINE of ours, the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if f.filename.startswith(PACKAGE)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def _site(error: BaseException) -> str:
    return f"{type(error).__name__} at {_place(error)}: {str(error).splitlines()[:1]!r:.120}"


@contextmanager
def limits(more: int) -> Iterator[None]:
    """A clock that interrupts, and no more than this much new memory."""

    def alarm(number: int, frame: Any) -> None:
        raise TooSlow(f"more than {TOO_LONG} s")

    old = signal.signal(signal.SIGPROF, alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + more, hard))
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# In processes of their own


def guarded(name: str, inputs: int, seed: int, keep: Path | None) -> Result:
    """`fuzz` in a child; one that dies or hangs is counted and started again behind the input."""
    import pickle  # our own child's result, through our own pipe

    total, first = Result(name), 0
    while first < inputs:
        board = mmap.mmap(-1, 8)  # the input that is being read
        board[:] = struct.pack("<q", -1)
        reading, writing = os.pipe()
        with _scratch() as base:
            child = os.fork()
            if child == 0:
                os.close(reading)

                def tell(index: int, board: mmap.mmap = board) -> None:
                    board[:] = struct.pack("<q", index)

                try:
                    result = _fuzz(name, inputs, seed, keep, first, base, tell)
                    with os.fdopen(writing, "wb") as pipe:
                        pickle.dump(vars(result), pipe)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    os._exit(3)
            os.close(writing)
            first = _supervise(child, board, reading, total, first, inputs)
            if first < inputs and keep:
                shutil.copytree(base / "input", keep / f"{name}-{first - 1}")
    return total


def _supervise(
    child: int, board: mmap.mmap, reading: int, total: Result, first: int, inputs: int
) -> int:
    """Waits for a child; where the next one goes on."""
    import pickle

    start, killed = time.perf_counter(), False
    before, looks = -1, 0  # not a clock, which goes on while both processes are stopped
    data = bytearray()
    os.set_blocking(reading, False)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        with suppress(BlockingIOError):
            data += os.read(reading, 1 << 20)
        if done:
            break
        (index,) = struct.unpack("<q", board[:])
        looks = looks + 1 if index == before else 0
        before = index
        if looks * _LOOK > (HUNG if index >= 0 else 10 * HUNG):
            os.kill(child, signal.SIGKILL)
            killed = True
            os.waitpid(child, 0)
            break
        time.sleep(_LOOK)
    os.set_blocking(reading, True)
    while more := os.read(reading, 1 << 20):
        data += more
    os.close(reading)
    total.seconds += time.perf_counter() - start
    if data:
        part = pickle.loads(bytes(data))
        for key in ("tried", "accepted"):
            setattr(total, key, getattr(total, key) + part[key])
        for key in ("slowest", "megabytes", "pairs"):
            setattr(total, key, max(getattr(total, key), part[key]))
        for what, (count, place) in part["crashes"].items():
            old, at = total.crashes.get(what, (0, place))
            total.crashes[what] = (old + count, at)
        return inputs
    (index,) = struct.unpack("<q", board[:])
    if index < 0:
        raise SystemExit(f"{total.name}: the whole files could not be read")
    why = "the process hung" if killed else f"the process died ({status})"
    total.crash(why, index)
    total.tried += index - first + 1
    return index + 1


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; 1 if anything crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.fuzz", description=__doc__)
    parser.add_argument("--reader", action="append", choices=list(readers.READERS))
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the first input of each crash")
    flags = parser.parse_args(arguments)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print("reader           inputs  accepted  seconds  slowest  MiB  pairs  crashes", flush=True)
    crashes = 0
    for name in flags.reader or readers.READERS:
        r = guarded(name, flags.inputs, flags.seed, flags.keep)
        crashes += len(r.crashes)
        print(
            f"{name:<15} {r.tried:>7,} {r.accepted:>9,} {r.seconds:>8.0f} {r.slowest:>8.2f} "
            f"{r.megabytes:>4} {r.pairs:>6,} {len(r.crashes):>8}",
            flush=True,
        )
        for what, (count, first) in sorted(r.crashes.items()):
            print(f"    {count} x, first input {first}: {what}", flush=True)
    return int(crashes > 0)


if __name__ == "__main__":
    sys.exit(main())
