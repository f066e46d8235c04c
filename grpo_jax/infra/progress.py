"""The progress bar: `for ...: bar.update(reward=0.8, kl=0.01, tokens_per_second=3400)`.

On a terminal a tqdm bar; otherwise (a log file, a pipe) a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from grpo_jax.infra import distributed


def track(stage: str, start: int, total: int, seconds: float = 30.0) -> Progress:
    """A progress display for the steps of a stage; a context manager.

    Args:
      start: steps done before, by the run that this one resumes.
      total: steps the stage has.
      seconds: between lines where the output is no terminal.
    """
    return Progress(stage, start, total, seconds, sys.stderr)


class Progress:
    """See `track`."""

    def __init__(self, stage: str, start: int, total: int, seconds: float, file: TextIO):
        self._stage, self._start, self._done, self._total = stage, start, start, total
        self._seconds, self._file = seconds, file
        self._began = time.monotonic()
        self._last_line = -float("inf")
        self._bar: tqdm[Any] | None = None
        self._shown = distributed.is_main()
        if self._shown and file.isatty():
            self._bar = tqdm(
                total=total, initial=start, desc=stage, file=file, unit="step", dynamic_ncols=True
            )

    def update(self, **metrics: float) -> None:
        """One step done; `metrics` are shown in the order given."""
        self._done += 1
        text = " ".join(f"{_short(name)} {_number(value)}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif self._shown and self._due():
            self._last_line = time.monotonic()
            print(
                f"{self._stage} {self._done}/{self._total} {self._pace()} {text}", file=self._file
            )
            self._file.flush()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _due(self) -> bool:
        late = time.monotonic() - self._last_line >= self._seconds
        return late or self._done >= self._total

    def _pace(self) -> str:
        each = (time.monotonic() - self._began) / max(1, self._done - self._start)
        left = int(each * max(0, self._total - self._done))
        return f"[{each:.2f} s/step, {left // 60}:{left % 60:02d} left]"


def _short(name: str) -> str:
    return {"tokens_per_second": "tok/s"}.get(name, name)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
