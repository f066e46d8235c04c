"""What checkpoints cost a training loop: seconds that `save` blocks it, and steps with and without.

    python -m benchmarks.saving [--rounds 4] [--every 1 5] [--folder FOLDER]

Trains a model of 10M parameters, with Adam's moments a state of about 120 MB, on rows of 128
tokens. Loops without saves and with one every N steps take turns, 10 steps each, so that whatever
else the machine does falls on all alike. `blocked` is the time within `Checkpoints.save`: waiting
for the write before, checksums and the copy to the host. The write itself goes on behind the next
steps and takes cores from them, which on CPU, and only there, slows those too. `written at once` is
a save that is waited for. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import Lora, Optimizer
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.learn.objectives import build_sft_loss
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import build_update, init_state
from grpo_jax.models.decoder import Decoder, DecoderConfig
from grpo_jax.structs import TrainBatch, TrainState

MODEL = DecoderConfig(
    vocab_size=8000, hidden_size=320, intermediate_size=896, num_layers=6, num_heads=5,
    num_kv_heads=5, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
ROWS, PROMPT, COMPLETION = 8, 64, 64
STEPS = 10  # of a turn


class Loop:
    """A training loop of its own, with its state and its checkpoints."""

    def __init__(self, folder: Path, every: int):
        self.every = every  # steps between saves; 0: none
        self.seconds: list[float] = []  # of a step, without what `save` blocked
        self.blocked: list[float] = []  # of a save
        self.checkpoints = Checkpoints(folder, keep=1)
        self._state, self._step = state(), 0

    def turn(self, update: Any, batch: TrainBatch) -> None:
        """STEPS steps, with saves behind the first of each interval; the last write is awaited."""
        for number in range(STEPS):
            began = time.monotonic()
            self._state, stats = update(self._state, None, batch, jax.random.key(self._step))
            jax.block_until_ready(stats)
            self._step += 1
            trained = time.monotonic()
            self.seconds.append(trained - began)
            if self.every and number % self.every == 0:
                self.checkpoints.save(self._step, self._state, {})
                self.blocked.append(time.monotonic() - trained)
        self.checkpoints.wait()

    def write_at_once(self) -> float:
        """Seconds of a save that is waited for."""
        self._step += 1  # a step that is there is not written again
        began = time.monotonic()
        self.checkpoints.save(self._step, self._state, {})
        self.checkpoints.wait()
        return time.monotonic() - began


def state() -> TrainState:
    """Random weights and fresh moments."""
    ids, lengths = jnp.zeros((1, 2), jnp.int32), jnp.ones((1,), jnp.int32)
    params = jax.jit(Decoder(MODEL).init)(jax.random.key(0), ids, lengths)["params"]
    return init_state(params, build_optimizer(Optimizer(), 1000))


def random_batch() -> TrainBatch:
    """Full rows: a prompt and one completion each."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, MODEL.vocab_size, (ROWS, n), np.int32) for n in (PROMPT, COMPLETION)]
    return TrainBatch(
        prompt_ids=jnp.asarray(ids[0]),
        prompt_lengths=jnp.full((ROWS,), PROMPT, jnp.int32),
        ids=jnp.asarray(ids[1][:, None]),
        mask=jnp.ones((ROWS, 1, COMPLETION), bool),
        advantages=jnp.ones((ROWS, 1), jnp.float32),
        old_logps=None,
        ref_logps=None,
    )


def measure(folder: Path, intervals: list[int], rounds: int) -> list[str]:
    """The size of the state, a blank line, and the table's rows, that without saves first."""
    update = build_update(
        Decoder(MODEL), build_optimizer(Optimizer(), 1000), build_sft_loss(), Lora()
    )
    batch = random_batch()
    loops = [Loop(folder / str(every), every) for every in (0, *intervals)]
    for number in range(rounds + 1):
        for loop in loops:
            loop.turn(update, batch)
            if number == 0:  # everything was compiled meanwhile
                loop.seconds.clear()
                loop.blocked.clear()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state()))
    rows = [f"| none | {np.median(loops[0].seconds):.3f} s | | | |"]
    for loop in loops[1:]:
        name = "every step" if loop.every == 1 else f"every {loop.every} steps"
        seconds = (
            np.median(loop.seconds),
            np.median(loop.blocked),
            np.max(loop.blocked),
            np.median([loop.write_at_once() for _ in range(3)]),
        )
        rows.append(f"| {name} | " + " | ".join(f"{s:.3f} s" for s in seconds) + " |")
    for loop in loops:
        loop.checkpoints.close()
    return [f"State: {size / 1e6:.0f} MB.", "", *rows]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4, help=f"turns of {STEPS} steps of a loop")
    parser.add_argument("--every", type=int, nargs="+", default=[1, 5], help="steps between saves")
    parser.add_argument("--folder", help="on the disk to measure; default: the temporary one")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        head, blank, *rows = measure(Path(folder), flags.every, flags.rounds)
    print(head, blank, sep="\n")
    print(
        "| saves | step, median | blocked, median | highest | written at once |\n"
        + "|---" * 5
        + "|"
    )
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
