"""Checkpoints of a stage, over Orbax: FOLDER/STEP/, written in the background, each one whole.

With the state goes a checksum of every leaf, computed on the devices from its bits, and one of all
that is said about the step. Orbax notices a missing or truncated file but not a flipped bit;
`restore` compares the checksums and so notices both, sets a damaged checkpoint aside and takes the
one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from grpo_jax.infra import distributed
from grpo_jax.infra.files import require_space

_log = logging.getLogger(__name__)


class Checkpoints:
    """The newest `keep` checkpoints in a folder, and besides them the one with the best score."""

    def __init__(self, folder: Path, keep: int):
        self._folder = Path(folder).absolute()
        if distributed.is_main():
            self._folder.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        self._set_aside_unreadable()
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        self._orbax = ocp.training.Checkpointer(
            self._folder,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
        )
        self._saving: Any = None  # Orbax's answer for the write in the background
        self._sum_bits = jax.jit(sum_bits)
        logging.getLogger("absl").addFilter(_without_traces)  # background threads log there

    def save(self, step: int, state: Any, aux: dict[str, Any], score: float | None = None) -> None:
        """Starts to write a checkpoint and returns once `state` may be donated.

        A step that is there already is not written again.

        Args:
          state: a tree of arrays.
          aux: JSON-ready facts that belong to the step.
          score: higher is better; None or not finite: not considered for the best.

        Raises:
          OSError: there is no room for it, or the write before this one failed.
        """
        self.wait()
        if step in self._steps():
            return
        if distributed.is_main():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            require_space(self._folder, size + size // 10, f"checkpoint {step}")
        json.dumps(aux, allow_nan=False)  # what is not JSON fails here, not in the background
        score = None if score is None or not math.isfinite(score) else float(score)
        said = {"aux": aux, "leaves": self._describe(state), "score": score}
        with self._explained(f"checkpoint {step} could not be written"):
            self._saving = self._orbax.save_checkpointables_async(
                step,
                {"state": state},
                force=True,
                metrics=None if score is None else {"score": score},
                custom_metadata=said | {"digest": _digest(said)},
            )

    def latest(self) -> int | None:
        """The newest step, or None."""
        steps = self._steps()
        return max(steps) if steps else None

    def best(self) -> int | None:
        """The step with the highest score, the newest of equals; None if none has a score.

        A checkpoint whose metadata are damaged has none, and a warning says so.
        """
        scored = []
        for step in self._steps():
            try:
                scored.append((self._said(step)["score"], step))
            except _Damaged as damage:
                _log.warning("checkpoint %s: %s; not considered for the best", step, damage)
        scored = [found for found in scored if found[0] is not None]
        return max(scored)[1] if scored else None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint, bit for bit as it was saved.

        Args:
          abstract_state: a tree of ShapeDtypeStructs with the shardings that the result shall have.
          step: None takes the newest whole one; damaged ones are named in a warning and set aside.

        Returns:
          The state and the aux of its step.

        Raises:
          FileNotFoundError: there is no checkpoint, or none at `step`.
          ValueError: the saved state has other leaves, or the checkpoint asked for is damaged.
        """
        self.wait()
        if step is not None and step not in self._steps():
            raise FileNotFoundError(f"{self._folder}: no checkpoint {step}, only {self._steps()}")
        for candidate in [step] if step is not None else sorted(self._steps(), reverse=True):
            try:
                return self._read(candidate, abstract_state)
            except _Damaged as damage:
                if step is not None:
                    raise ValueError(
                        f"{self._folder / str(step)}: damaged ({damage}); restore another step"
                    ) from None
                self._set_aside(candidate, str(damage))
        raise FileNotFoundError(
            f"{self._folder}: no whole checkpoint to restore; run the stage that writes it again"
        )

    def wait(self) -> None:
        """Waits until the write in the background, if any, has ended; OSError if it failed."""
        saving, self._saving = self._saving, None
        with self._explained("the last checkpoint could not be written"):
            try:
                if saving is not None:  # unasked, its thread and three open files stay for good
                    saving.result()
            finally:
                self._orbax.wait()  # it knows of the same failure, and forgets it now
        self._clear_leftovers()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._orbax.close()
            logging.getLogger("absl").removeFilter(_without_traces)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def _said(self, step: int) -> dict[str, Any]:
        """aux, leaves and score of a step, as they were saved; _Damaged if they are not."""
        try:
            saved = dict(self._orbax.checkpointables_metadata(step).custom_metadata)
            digest = saved.pop("digest")
            said = {name: saved[name] for name in ("aux", "leaves", "score")}
        except Exception as error:  # Orbax has no one error for unreadable files
            raise _Damaged(f"its metadata cannot be read: {_first_line(error)}") from None
        if digest != _digest(said):
            raise _Damaged("the checksum of its metadata differs")
        return said

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        said = self._said(step)
        leaves, aux = said["leaves"], said["aux"]
        _check_same_leaves(self._folder / str(step), leaves, _shapes(abstract_state))
        try:
            loaded = self._orbax.load_checkpointables(step, {"state": abstract_state})
        except Exception as error:
            raise _Damaged(f"its arrays cannot be read: {_first_line(error)}") from None
        state = loaded["state"]
        for name, (*_, bits) in self._describe(state).items():
            if bits != leaves[name][2]:
                raise _Damaged(f"the checksum of {name} differs")
        return state, aux

    def _describe(self, state: Any) -> dict[str, list[Any]]:
        """Path -> [dtype, shape, checksum] of each leaf."""
        sums = jax.device_get([self._sum_bits(leaf) for leaf in jax.tree.leaves(state)])
        shapes = _shapes(state).items()
        return {k: [*v, int(bits)] for (k, v), bits in zip(shapes, sums, strict=True)}

    def _set_aside(self, step: int, damage: str) -> None:
        self._move_aside(step, damage)
        distributed.barrier("damaged checkpoint set aside")
        self._orbax.reload()

    def _move_aside(self, step: int, damage: str) -> None:
        aside = self._folder / f"damaged-{step}"
        _log.warning("checkpoint %s is damaged (%s); moved to %s", step, damage, aside)
        if distributed.is_main():
            shutil.rmtree(aside, ignore_errors=True)
            (self._folder / str(step)).rename(aside)

    def _set_aside_unreadable(self) -> None:
        """Moves away steps whose mere presence would keep Orbax from opening the folder."""
        if not (reason := _unreadable(self._folder)):
            return
        if jax.process_count() > 1:  # one of them alone cannot open a folder
            raise ValueError(
                f"{self._folder}: one of the checkpoints is damaged ({reason}); move it away"
            )
        for path in sorted(self._folder.iterdir()):
            if path.name.isdecimal() and path.is_dir():
                with tempfile.TemporaryDirectory() as alone:
                    (Path(alone) / path.name).symlink_to(path)
                    reason = _unreadable(Path(alone))
                if reason:
                    self._move_aside(int(path.name), f"its metadata cannot be read: {reason}")

    def _clear_leftovers(self) -> None:
        """Removes what a kill or a failure in the middle of a write left; Orbax only ignores it."""
        if distributed.is_main():
            for leftover in self._folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (
            Exception
        ) as error:  # the file systems' failures reach us as ValueError, XlaError ...
            steps = ", ".join(map(str, sorted(self._steps()))) or "none"
            raise OSError(
                f"{self._folder}: {what} ({_first_line(error)}); whole checkpoints: {steps}. "
                "If the disk is full make room; the same command goes on from the last of them"
            ) from error


class _Damaged(Exception):
    """A checkpoint that cannot be read, or whose bits are not those that were saved."""


def _unreadable(folder: Path) -> str:
    """Why Orbax cannot list the checkpoints of a folder; '' if it can."""
    try:
        with ocp.training.Checkpointer(folder) as orbax:
            for checkpoint in orbax.checkpoints:
                float((checkpoint.metrics or {"score": 0.0})["score"])
    except Exception as error:  # whatever its parsers raise
        return _first_line(error)
    return ""


def sum_bits(x: jax.Array) -> jax.Array:
    """A checksum of any array's bits: uint32 [].

    The sum mod 2^32 of each element's bits times an odd number of its own: the same under every
    sharding, since integer sums do not depend on their order, and changed by any one changed
    element, since odd numbers are invertible mod 2^32.
    """
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, width)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for dimension, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, dimension
        )
    return jnp.sum(bits.astype(jnp.uint32) * (2 * index + 1), dtype=jnp.uint32)


def _digest(said: dict[str, Any]) -> str:
    """A checksum of JSON-ready facts."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _shapes(tree: Any) -> dict[str, list[Any]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [str(x.dtype), list(x.shape)]
        for path, x in leaves
    }


def _check_same_leaves(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    lines = []
    for name in sorted(saved.keys() | wanted.keys()):
        was, now = saved.get(name, [])[:2], wanted.get(name)
        if was != now:
            text = [f"{x[0]} {x[1]}" if x else "nothing" for x in (was, now)]
            lines.append(f"{name}: saved {text[0]}, wanted {text[1]}")
    if lines:
        raise ValueError(
            f"{path}: holds another model or optimizer than this run's; use the model and config "
            "that wrote it, or another --workdir:\n  " + "\n  ".join(lines)
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _without_traces(record: logging.LogRecord) -> bool:
    """Drops Orbax's log records with a stack trace: the same error is raised, and explained."""
    return not (record.exc_info and "orbax" in record.pathname)
