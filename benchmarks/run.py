"""python -m benchmarks.run: measures grpo_jax and its peers on the same work, in turns.

For every task, size and peer, both programs are started, run once to compile and warm up, and then
run in turn: ours, peer, ours, peer, ... Each is a process of its own, a peer's in a virtual
environment of its own that the first run installs. Results go to a JSON-lines file, one record a
comparison, and to a table. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import environments, models, work
from benchmarks.table import compare, render
from benchmarks.workers import REPOSITORY, Worker, WorkerError


def main() -> None:
    args = _arguments()
    tasks = work.override(work.GPU_TASKS if args.gpu else work.TASKS, args.set)
    chosen = args.only or list(tasks)
    if unknown := [name for name in chosen if name not in tasks]:
        raise ValueError(f"--only: no task {', '.join(unknown)}; there are {', '.join(tasks)}")
    records = []
    with tempfile.TemporaryDirectory(prefix="benchmark-models-") as temporary:
        for name in chosen:
            task = tasks[name]
            # Encoder tasks have one model, whatever sizes are asked for.
            for size in task.sizes if task.kind == "encoding" else args.size or task.sizes:
                for peer in _peers(args, task, size):
                    record = _measure(args, Path(temporary), name, task, size, peer)
                    records.append(record)
                    with open(args.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(record) + "\n")
                    print(render([record]), file=sys.stderr, flush=True)
    print(render(records))
    if any("error" in record for record in records):
        sys.exit(1)


def _peers(args: argparse.Namespace, task: work.Task, size: str) -> list[str | None]:
    """Whom a task is measured against here; None: it is measured alone."""
    if not task.peers:
        return [None]
    wanted = task.peers if args.peers is None else [p for p in task.peers if p in args.peers]
    return [peer for peer in wanted if (size, peer) not in work.UNSUPPORTED]


def _measure(
    args: argparse.Namespace,
    cache: Path,
    name: str,
    task: work.Task,
    size: str,
    peer: str | None,
) -> dict[str, Any]:
    """One record: ours, and where there is one the peer, in turns."""
    record: dict[str, Any] = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _revision(),
        "task": name,
        "size": size,
        "against": peer,
        "device": "gpu" if args.gpu else "cpu",
        "dtype": args.dtype,
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0], "cpu": _cpu()},
        "work": dataclasses.asdict(task.work),
    }
    print(f"== {name} {size} against {peer or 'nobody'}", file=sys.stderr, flush=True)
    try:
        spec = _specification(args, cache, task, size)
        with contextlib.ExitStack() as stack:
            workers = []
            for program in ["ours", peer] if peer else ["ours"]:
                log = args.folder / "log" / f"{name}-{size}-{peer or 'alone'}-{program}.txt"
                python = _python(args, program)
                worker = Worker(program, python, spec, log, args.timeout)
                workers.append(stack.enter_context(worker))
            for _ in range(1 + args.repeats):
                for worker in workers:
                    worker.run()
            for worker in workers:
                worker.stop()
    except (WorkerError, RuntimeError) as error:
        return {**record, "error": str(error)}
    record["ours"] = workers[0].result()
    if peer:
        record["peer"] = workers[1].result()
        record["ratio"] = compare(name, size, args.dtype, record["ours"], record["peer"])
    return record


def _specification(
    args: argparse.Namespace, cache: Path, task: work.Task, size: str
) -> dict[str, Any]:
    """What both workers read: the same folder, the same prompts or texts."""
    spec: dict[str, Any] = {
        "kind": task.kind,
        "work": dataclasses.asdict(task.work),
        "dtype": args.dtype,
        "device": "gpu" if args.gpu else "cpu",
    }
    if task.kind == "encoding":
        from grpo_jax import assets

        folder = Path(assets.resolve(args.encoder))
        texts, references = models.encoder_texts(folder, task.work)
        return spec | {"folder": str(folder), "texts": texts, "references": references}
    shape = work.SIZES[size]
    folder = cache / size
    if not folder.exists():
        models.write_model(folder, shape, args.dtype)
    prompts = task.work.prompts if isinstance(task.work.prompts, int) else 1
    ids = work.prompt_ids(shape, prompts, task.work.prompt_length)
    return spec | {
        "folder": str(folder),
        "shape": dataclasses.asdict(shape),
        "prompt_ids": ids,
        "prompts": work.prompt_texts(ids),
        "stops": work.stop_ids(shape, getattr(task.work, "mean_length", 0)),
    }


def _python(args: argparse.Namespace, program: str) -> Path:
    """The interpreter that runs a program."""
    if program.startswith("ours"):
        return Path(sys.executable)
    if program in args.python:
        return args.python[program]
    return environments.python_of(program, args.folder / "environments", args.gpu)


def _arguments() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "grpo_jax"
    add("--only", type=names, help=f"tasks, of {', '.join(work.TASKS)}; default: all")
    add("--size", type=names, help=f"models, of {', '.join(work.SIZES)}; default: the tasks' own")
    add("--peers", type=names, help="default: all that a task has")
    add("--repeats", type=int, default=5, help="runs of each program after the first")
    add("--device", choices=("auto", "cpu", "gpu"), default="auto")
    add("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    add("--set", action="append", default=[], metavar="TASK.FIELD=VALUE", help="see work.py")
    add("--folder", type=Path, default=default / "benchmarks", help="environments and logs")
    add("--out", type=Path, default=Path("benchmarks/results.jsonl"), help="appended to")
    add("--encoder", default="asset:all-minilm-l6-v2", help="of the encoder tasks")
    add("--timeout", type=float, default=1800.0, help="seconds to wait for one answer")
    add(
        "--python", action="append", default=[], metavar="PEER=PATH",
        help="use this interpreter for a peer instead of installing an environment",
    )  # fmt: skip
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats: wanted at least 1")
    for size in args.size or []:
        if size not in work.SIZES:
            parser.error(f"--size: no model {size}; there are {', '.join(work.SIZES)}")
    known = (*environments.ENVIRONMENTS, "ours-fixed", "ours-batches", "ours-padded")
    for peer in args.peers or []:
        if peer not in known:
            parser.error(f"--peers: no peer {peer}; there are {', '.join(known)}")
    pairs = [text.partition("=") for text in args.python]
    args.python = {peer: Path(path) for peer, _, path in pairs}
    for peer, path in args.python.items():
        if peer not in environments.ENVIRONMENTS or not path.is_file():
            parser.error(f"--python={peer}={path}: wanted PEER=PATH of an interpreter")
    args.gpu = args.device == "gpu" or (args.device == "auto" and environments.has_gpu())
    args.dtype = args.dtype or ("bfloat16" if args.gpu else "float32")
    return args


def _revision() -> str:
    out = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True
    )
    return out.stdout.strip()


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
