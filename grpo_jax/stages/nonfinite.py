"""Steps whose loss or gradient is not finite: left out or the end of the run, and kept for replay.

The update itself leaves the state as it was (learn/step.py). What is decided here is whether the
run goes on without the step (`on_nonfinite`), and what is written down of it:
WORKDIR/nonfinite/ARM-STEP.npz with the arrays of its batch, and ARM-STEP.json with its rows, texts
and metrics, for `python -m grpo_jax.replay`.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.infra import distributed
from grpo_jax.infra import mesh as mesh_lib
from grpo_jax.infra.files import write_json
from grpo_jax.stages.run import OpenArm, Run
from grpo_jax.structs import TrainBatch

_log = logging.getLogger(__name__)

MOST_IN_A_ROW = 10  # steps left out one after another: nothing is learned any more
MOST_DUMPS = 10  # of an arm
FOLDER = "nonfinite"  # in the working directory


class Nonfinite:
    """Judges each step of an arm; what it knows is in `aux`, so that resuming is exact.

    Args:
      aux: of the checkpoint that the arm goes on from, or {}.
    """

    def __init__(self, run: Run, arm: OpenArm, aux: dict[str, Any]):
        self._run, self._arm = run, arm
        known = aux.get("skipped", {})
        self.updates: int = known.get("updates", 0)  # that were left out so far
        self._in_a_row: int = known.get("in_a_row", 0)  # steps with one, up to now

    def aux(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""
        if not self.updates:
            return {}
        return {"skipped": {"updates": self.updates, "in_a_row": self._in_a_row}}

    def judge(
        self, step: int, updates: list[dict[str, Any]], batch: TrainBatch, rows: list[int]
    ) -> str:
        """Takes a step's updates in; nothing but the dump changes where the run has to stop.

        Args:
          step: of the arm, from 1.
          updates: the stats of each, on the host.
          batch: what they were made from, on the mesh.
          rows: the training rows of all processes.

        Returns:
          '' if the run goes on; else why it has to stop, in words.
        """
        bad = [i for i, stats in enumerate(updates) if stats["skipped"]]
        if not bad:
            self._in_a_row = 0
            return ""
        first = updates[bad[0]]
        names = [name for name in ("loss", "grad_norm") if not math.isfinite(first[name])]
        what = f"{self._arm.name}, step {step}: {' and '.join(names)} not finite"
        replay = self._dump(step, updates, bad, batch, rows)
        stops = self._run.cfg.on_nonfinite == "stop"
        if not stops and self._in_a_row + 1 < MOST_IN_A_ROW:
            self._in_a_row += 1
            self.updates += len(bad)
            _log.warning(
                "%s; the step is left out and the parameters stay as they were (%d so far)%s",
                what, self.updates, replay,
            )  # fmt: skip
            return ""
        if not stops:
            what += f", as in the {MOST_IN_A_ROW - 1} steps before it"
        skip = ", on_nonfinite='skip' leaves such steps out" if stops else ""
        return (
            f"{what}, training rows {rows}{replay}; the last checkpoint is intact. Lower the "
            f"learning rate, set max_grad_norm, use float32, or look at these rows{skip}; the same "
            "command resumes"
        )

    def _dump(
        self,
        step: int,
        updates: list[dict[str, Any]],
        bad: list[int],
        batch: TrainBatch,
        rows: list[int],
    ) -> str:
        """Writes the batch; how to replay it, in words, or '' if there are enough dumps."""
        folder, name = self._run.workdir.path / FOLDER, self._arm.name
        path = folder / f"{name}-{step}.npz"
        arrays = {k: mesh_lib.fetch(v) for k, v in batch._asdict().items() if v is not None}
        if not distributed.is_main():
            return ""
        others = [other for other in folder.glob(f"{name}-*.npz") if other != path]
        if len(others) >= MOST_DUMPS:
            return ""
        decode = self._run.base.tokenizer.decode
        completions = zip(_rows_of(arrays["ids"]), _rows_of(arrays["mask"]), strict=True)
        prompts = zip(arrays["prompt_ids"], arrays["prompt_lengths"], strict=True)
        record = {
            "arm": name,
            "step": step,
            "left_out": bad,  # numbers of the updates
            "updates": [_plain(stats) for stats in updates],
            "rows": rows,
            "prompts": decode([ids[:length].tolist() for ids, length in prompts]),
            "completions": decode([ids[mask].tolist() for ids, mask in completions]),
        }
        try:
            write_json(folder / f"{name}-{step}.json", record)
            _write_arrays(path, arrays)
        except OSError as error:  # the step's own trouble is worth more than this one
            return f" (its batch could not be written: {error.strerror})"
        return f"; look at them: python -m grpo_jax.replay {self._run.workdir.path} {path.name}"


def _rows_of(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])


def _plain(stats: dict[str, Any]) -> dict[str, Any]:
    """JSON-ready: what is not finite by its name, since JSON has no number for it."""
    values = {name: float(value) for name, value in stats.items()}
    return {k: v if math.isfinite(v) else str(v) for k, v in values.items()}


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """One .npz, whole or not at all."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content.getvalue())
    os.replace(temporary, path)


def read_dump(path: Path) -> tuple[dict[str, Any], TrainBatch]:
    """The record and the batch, in host memory.

    Raises:
      FileNotFoundError: there is no such dump.
      ValueError: it is none, or a torn one.
    """
    record_file = path.with_suffix(".json")
    for file in (path, record_file):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such dump of a step")
    try:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        with np.load(path, allow_pickle=False) as arrays:
            batch = TrainBatch(**{name: arrays[name] for name in arrays.files})
        wanted = {"arm": str, "step": int, "left_out": list, "updates": list, "rows": list}
        wanted |= {"prompts": list, "completions": list}
        for name, kind in wanted.items():
            if not isinstance(record[name], kind):
                raise TypeError(f"{name} is no {kind.__name__}")
        P, G, T = np.shape(batch.ids)
        shapes = {"rows": len(record["rows"]), "prompts": len(record["prompts"])}
        if {P} != {*shapes.values()} or len(record["completions"]) != P * G:
            raise ValueError(f"{P} prompts of {G} completions, but {shapes}")
    except (ValueError, TypeError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a dump of this program ({error})") from None
    return record, batch
