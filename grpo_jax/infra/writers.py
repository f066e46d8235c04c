"""Metrics out: WORKDIR/metrics.jsonl, WORKDIR/samples.jsonl and WORKDIR/tensorboard/STAGE/.

Rows are valid JSON: a value that is not finite becomes null, and is counted and warned about.
Only the main process writes; on the others every call returns at once.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from typing import Any

import jax
import numpy as np

from grpo_jax.infra import distributed
from grpo_jax.infra.workdir import Workdir

_log = logging.getLogger(__name__)


class MetricWriter:
    """Writes rows of scalars, and samples of text."""

    def __init__(self, workdir: Workdir):
        self._workdir = workdir
        self._not_finite: Counter[str] = Counter()
        self._boards: dict[str, Any] = {}  # stage -> tensorboardX.SummaryWriter

    def write(self, stage: str, step: int, metrics: dict[str, Any]) -> None:
        """Appends one row {"stage", "step", **metrics}; values are scalars of any kind."""
        if not distributed.is_main():
            return
        clean = {name: self._clean(name, x) for name, x in jax.device_get(metrics).items()}
        self._board(stage, int(step)).file_writer.add_summary(_summary(clean), int(step))
        row = {"stage": stage, "step": int(step)} | clean
        self._workdir.append(self._workdir.metrics, [row])

    def samples(self, stage: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends {"stage", "step", **row} for each row: prompt, completion, rewards and so on."""
        if distributed.is_main():
            place = {"stage": stage, "step": int(step)}
            clean = [{name: self._clean(name, x) for name, x in row.items()} for row in rows]
            self._workdir.append(self._workdir.samples, [place | row for row in clean])

    def close(self) -> None:
        """Flushes TensorBoard's files; one that cannot be written is not worth the run."""
        for board in self._boards.values():
            try:
                board.close()
            except OSError as error:
                folder = self._workdir.tensorboard
                _log.warning("%s: cannot be written (%s)", folder, error.strerror)
        self._boards.clear()

    def _board(self, stage: str, step: int) -> Any:
        if stage not in self._boards:
            from tensorboardX import SummaryWriter

            # purge_step hides what an interrupted run wrote behind the step that is written now.
            folder = self._workdir.tensorboard / stage
            purge = step if folder.exists() else None
            self._boards[stage] = SummaryWriter(str(folder), purge_step=purge)
        return self._boards[stage]

    def _clean(self, name: str, value: Any) -> Any:
        """Python values; null for what is not finite, however deep."""
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            value = np.asarray(value).tolist()
        if isinstance(value, dict):
            return {k: self._clean(f"{name}/{k}", v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(name, v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            self._not_finite[name] += 1
            count = self._not_finite[name]
            if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
                _log.warning("%s is %s; written as null (%d so far)", name, value, count)
            return None
        return value


def _summary(metrics: dict[str, Any]) -> Any:
    """The numbers among them as one event: a tenth of the time that one event a number takes."""
    from tensorboardX.proto.summary_pb2 import Summary

    numbers = {name: x for name, x in metrics.items() if isinstance(x, float | int)}
    return Summary(value=[Summary.Value(tag=k, simple_value=v) for k, v in numbers.items()])
