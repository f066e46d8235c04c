"""Loading a sharded model: peak host memory, and the rate against a plain read of the same files.

    python benchmarks/load.py [--gigabytes 1.5] [--shards 8] [--devices 1,8] [--dtype bfloat16]

Writes a random llama in a temporary folder and loads it in fresh processes, on CPU with that many
virtual devices (mesh.fsdp takes them all). On CPU the devices' memory is host memory, so the peak
counts what is placed too: it must stay below model + one shard. Rates are measured twice: `warm`
finds the files in the page cache, `cold` after the system was asked to forget them.
"""

from __future__ import annotations

import argparse
import functools
import json
import operator
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def write_model(folder: Path, gigabytes: float, shards: int) -> None:
    """A llama of 24 layers whose bfloat16 weights take about `gigabytes`."""
    import ml_dtypes

    from grpo_jax.assets import tiny
    from grpo_jax.hub.decoder_config import decoder_config
    from grpo_jax.hub.names import decoder_table
    from grpo_jax.hub.writing import write_safetensors

    tiny.write_decoder(folder)  # its tokenizer; config and weights are replaced
    for file in folder.glob("*.safetensors"):
        file.unlink()
    layers = 24
    hidden = round((gigabytes * 1e9 / 2 / layers / 10.5) ** 0.5 / 64) * 64
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": hidden, "intermediate_size": 8 * hidden // 3 // 64 * 64, "head_dim": 64,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "vocab_size": 32000,
        "num_key_value_heads": hidden // 64 // 4 or 1, "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    while config["num_attention_heads"] % config["num_key_value_heads"]:
        config["num_key_value_heads"] -= 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {name: slot.shape for name, slot in decoder_table(decoder_config(folder)).items()}
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(ml_dtypes.bfloat16)
    total = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    tensors = {name: np.resize(noise, shape) for name, shape in shapes.items()}
    write_safetensors(folder, tensors, shard_bytes=-(-total // shards))


def anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def forget(files: list[Path]) -> None:
    """Asks the system to drop the files from the page cache."""
    for file in files:
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def plain_read(files: list[Path]) -> None:
    """Reads the files into one buffer."""
    buffer = bytearray(1 << 24)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def seconds(function: Callable[[], Any]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def measure(folder: Path, dtype: str) -> None:
    """In a fresh process: opens, loads onto all devices, prints one JSON line."""
    import jax

    from grpo_jax import config, hub
    from grpo_jax.infra import mesh as mesh_lib

    mesh = mesh_lib.make_mesh(config.Mesh(fsdp=-1))
    began = time.perf_counter()
    policy = hub.open_decoder(folder, param_dtype=dtype)
    opening = time.perf_counter() - began
    shardings = mesh_lib.param_shardings(mesh, policy.params)

    def placement(path: tuple[str, ...], shape: tuple[int, ...]) -> jax.sharding.Sharding:
        return functools.reduce(operator.getitem, path, shardings)

    jax.block_until_ready(jax.jit(lambda: np.zeros(1))())  # the runtime starts
    files = sorted(folder.glob("*.safetensors"))
    sizes = [file.stat().st_size for file in files]
    row: dict[str, Any] = {"devices": jax.device_count(), "param_dtype": dtype, "open_s": opening}
    before = peak = anonymous_bytes()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    params = jax.block_until_ready(policy.weights.read(placement))
    running = False
    thread.join()
    model, shard = sum(leaf.nbytes for leaf in jax.tree.leaves(params)), max(sizes)
    row |= {"model_gb": model / 1e9, "shard_gb": shard / 1e9, "peak_gb": (peak - before) / 1e9}
    row["limit_gb"] = (model + shard) / 1e9
    del params
    for state in ("cold", "warm"):
        times: dict[str, list[float]] = {"plain": [], "load": []}
        for _ in range(3):
            for name, function in (
                ("plain", lambda: plain_read(files)),
                ("load", lambda: jax.block_until_ready(policy.weights.read(placement))),
            ):
                if state == "cold":
                    forget(files)
                times[name].append(seconds(function))
        best = {name: min(values) for name, values in times.items()}
        row |= {f"{state}_{name}_gb_per_s": sum(sizes) / 1e9 / t for name, t in best.items()}
        row[f"{state}_times_plain"] = best["load"] / best["plain"]
    print(json.dumps(row))


def main() -> None:
    """Writes the model and measures it under each number of devices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--devices", default="1,8")
    parser.add_argument("--dtype", default="bfloat16,float32", help="of the parameters")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the fresh processes
    options = parser.parse_args()
    if options.folder:
        measure(options.folder, options.dtype)
        return
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary), options.gigabytes, options.shards)
        for dtype in options.dtype.split(","):
            for devices in options.devices.split(","):
                flags = f"--xla_force_host_platform_device_count={devices}"
                environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
                command = [sys.executable, __file__, "--folder", temporary, "--dtype", dtype]
                out = subprocess.run(
                    command, env=environment, check=True, stdout=subprocess.PIPE, text=True
                )
                row = json.loads(out.stdout.splitlines()[-1])
                print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
                assert row["peak_gb"] < row["limit_gb"], "more than the model and one shard"


if __name__ == "__main__":
    main()
