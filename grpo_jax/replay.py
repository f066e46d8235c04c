"""python -m grpo_jax.replay WORKDIR DUMP [--rows=20]: which rows of a step were not finite.

A run keeps the batch of a step whose loss or gradient was not finite, as WORKDIR/nonfinite/
ARM-STEP.npz. This opens the run again, without training, restores the parameters that the step
began with, or the nearest saved before, and says of each row of the batch what it does to them:
log-probs, loss and gradient, one row at a time, without dropout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.config_dicts import from_dict
from grpo_jax.infra.checkpoint import Checkpoints
from grpo_jax.infra.files import Lock, read_json
from grpo_jax.infra.workdir import Workdir
from grpo_jax.learn.objectives import Loss, build_sft_loss, token_weights
from grpo_jax.learn.optimizer import build_optimizer
from grpo_jax.learn.step import batch_logps, build_loss, policy_variables
from grpo_jax.stages import weights
from grpo_jax.stages.learner import first_state
from grpo_jax.stages.nonfinite import FOLDER, read_dump
from grpo_jax.stages.programs import grpo_loss
from grpo_jax.stages.run import OpenArm, Run, open_run
from grpo_jax.structs import TrainBatch

# Finite, and still worth a look.
UNLIKELY = -50.0  # nats: a token that the model all but rules out
DRIFTED = 2.0  # nats between the sampler's log-probs and these
LARGE = 0.25  # of the sum of all gradients' norms, for one row of eight or more


class Found(NamedTuple):
    """What one completion does, all on the host."""

    row: int  # of the training rows
    completion: int  # its number among those of the prompt
    tokens: int  # that carry loss
    bad_logps: int  # of them, log-probs that are not finite
    lowest: float  # log-prob, in nats
    drift: float  # the largest difference from the sampler's log-probs, in nats; 0 without them
    advantage: float
    loss: float  # its share of the batch's
    gradient: float  # norm of its share
    text: str


def replay(workdir: str, dump: str) -> tuple[str, list[Found]]:
    """Opens the run and measures the rows of a dump.

    Args:
      dump: a file below WORKDIR/nonfinite, or its name there.

    Returns:
      Which parameters they were measured with, in words, and every completion of the batch.

    Raises:
      ValueError, FileNotFoundError: what is missing or does not fit, and the remedy.
    """
    folder = Path(workdir).expanduser().absolute()
    path = folder / FOLDER / dump if Path(dump).name == dump else Path(dump)
    record, batch = read_dump(path if path.suffix == ".npz" else path.with_suffix(".npz"))
    entry = read_json(folder / "config.json")
    if entry is None:
        raise FileNotFoundError(f"workdir {folder}: no run here (no config.json)")
    cfg = from_dict(entry["config"])
    lock = Lock(folder / ".lock")  # opening checkpoints beside a run would disturb its saves
    if not lock.take():
        raise ValueError(f"workdir {folder}: in use by {lock.holder()}; replay when that has ended")
    try:
        run = open_run(cfg, Workdir(folder, cfg, entry["seed"], [lock]))
        if record["arm"] not in run.arms:
            raise ValueError(f"{path}: of arm {record['arm']!r}; the run has {', '.join(run.arms)}")
        arm = run.arms[record["arm"]]
        trained, frozen, words = _parameters(run, arm, record)
        return words, _measure(run, arm, record, batch, trained, frozen)
    finally:
        lock.release()


def _parameters(run: Run, arm: OpenArm, record: dict[str, Any]) -> tuple[dict, dict | None, str]:
    """The trained tree nearest to the step's beginning, the frozen one, and what they are."""
    step, lora = record["step"], run.cfg.model.lora
    untouched = len(record["left_out"]) == len(record["updates"])
    folder = run.workdir.checkpoints / arm.name
    with Checkpoints(folder, run.cfg.checkpoint.keep) as checkpoints:
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        # A step none of whose updates was made ends with the parameters that it began with.
        usable = [s for s in steps if s < step or (s == step and untouched)]
        start = frozen = None
        if lora.rank or not usable:
            start = weights.load_params(run, arm.start)
        if lora.rank and start is not None:
            frozen = weights.frozen_copy(start, run.model.dtype)
        if usable:
            state, _ = checkpoints.restore(weights.abstract_state(run, arm), max(usable))
        else:
            assert start is not None
            state = first_state(run, arm, build_optimizer(arm.optimizer, 1), start)
    at = max(usable, default=0)
    if at >= step - 1:
        return state.params, frozen, f"the parameters that step {step} of {arm.name} began with"
    return (
        state.params,
        frozen,
        f"the parameters after step {at} of {arm.name}, the nearest that are saved before step "
        f"{step}: rows that were not finite then may be so now",
    )


def _loss(arm: OpenArm) -> tuple[Loss, str, int, float]:
    """The arm's loss function, its normalisation, and the temperature of its log-probs."""
    if arm.method != "grpo":
        return build_sft_loss(), "dapo", 1, 1.0
    cfg = arm.cfg.grpo
    length = arm.cfg.data.max_completion_length
    return grpo_loss(cfg), cfg.loss_type, length, cfg.sampling.temperature


def _measure(
    run: Run,
    arm: OpenArm,
    record: dict[str, Any],
    batch: TrainBatch,
    trained: dict,
    frozen: dict | None,
) -> list[Found]:
    loss_of, loss_type, length, temperature = _loss(arm)
    lora = run.cfg.model.lora
    loss = build_loss(run.model, loss_of, lora, temperature)

    @jax.jit
    def measure(
        trained: dict, frozen: dict | None, row: TrainBatch, weights: jax.Array, shares: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        value = jax.value_and_grad(loss, has_aux=True)
        (found, _), gradient = value(trained, frozen, row, weights, shares, None)
        logps = batch_logps(run.model, policy_variables(trained, frozen, lora), row, temperature)
        return logps[0][0, 0], found, optax.tree.norm(gradient)

    whole = jnp.asarray(batch.mask)[None]
    all_weights = np.asarray(token_weights(whole, loss_type, length))[0]
    all_shares = np.asarray(token_weights(whole, "dapo", length))[0]
    P, G, _ = batch.mask.shape
    found = []
    for p in range(P):
        for g in range(G):
            row = _one(batch, p, g)
            part = (all_weights[p : p + 1, g : g + 1], all_shares[p : p + 1, g : g + 1])
            logps, value, norm = jax.device_get(measure(trained, frozen, row, *part))
            mask = row.mask[0, 0]
            seen = logps[mask]
            sampled = None if batch.old_logps is None else batch.old_logps[p, g][mask]
            found.append(
                Found(
                    row=record["rows"][p],
                    completion=g,
                    tokens=int(mask.sum()),
                    bad_logps=int((~np.isfinite(seen)).sum()),
                    lowest=float(seen.min()) if seen.size else 0.0,
                    drift=float(np.abs(seen - sampled).max()) if seen.size and sampled is not None
                    else 0.0,
                    advantage=float(batch.advantages[p, g]),
                    loss=float(value),
                    gradient=float(norm),
                    text=record["completions"][p * G + g],
                )
            )  # fmt: skip
    return found


def _one(batch: TrainBatch, p: int, g: int) -> TrainBatch:
    """One completion of one prompt, as a batch."""
    shared = {"prompt_ids", "prompt_lengths"}
    fields: dict[str, Any] = {}
    for name, x in batch._asdict().items():
        if x is not None:
            fields[name] = x[p : p + 1] if name in shared else x[p : p + 1, g : g + 1]
    return TrainBatch(**fields)


def verdicts(found: list[Found]) -> list[str]:
    """What is wrong with each, in words; '' where nothing is."""
    together = sum(f.gradient for f in found if np.isfinite(f.gradient))
    out = []
    for f in found:
        numbers = {"loss": f.loss, "gradient": f.gradient, "advantage": f.advantage}
        said = [f"{name} {value}" for name, value in numbers.items() if not np.isfinite(value)]
        if f.bad_logps:
            said.append(f"{f.bad_logps} of {f.tokens} log-probs not finite")
        if f.lowest < UNLIKELY:
            said.append(f"a log-prob of {f.lowest:.0f}")
        if f.drift > DRIFTED:
            said.append(f"{f.drift:.1f} nats from the sampler's log-probs")
        if len(found) >= 8 and np.isfinite(f.gradient) and f.gradient > LARGE * together:
            said.append(f"{f.gradient / together:.0%} of all gradients")
        out.append(", ".join(said))
    return out


def table(found: list[Found], rows: int) -> str:
    """The completions of a batch, those with something wrong first; `rows` of the others."""
    said = verdicts(found)
    marked = [(f, words) for f, words in zip(found, said, strict=True) if words]
    others = [(f, words) for f, words in zip(found, said, strict=True) if not words]
    lines = ["   row  compl  tokens  lowest logp      drift  advantage       loss   gradient"]
    for f, words in marked + others[: max(0, rows - len(marked))]:
        numbers = f"{f.lowest:>11.4g}{f.drift:>11.3g}{f.advantage:>11.3g}"
        lines.append(
            f"{f.row:>6}{f.completion:>7}{f.tokens:>8}  {numbers}{f.loss:>11.4g}{f.gradient:>11.4g}"
            + (f"  <- {words}" if words else "")
        )
        lines.append(f"        {f.text[:90]!r}")
    hidden = len(found) - (len(lines) - 1) // 2
    if hidden:
        lines.append(f"and {hidden} more with nothing to say")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m grpo_jax.replay", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("workdir", help="of the run")
    parser.add_argument("dump", help="below its folder nonfinite: ARM-STEP.npz")
    parser.add_argument("--rows", type=int, default=20, help="rows of the table (20)")
    args = parser.parse_args(argv)
    try:
        words, found = replay(args.workdir, args.dump)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    bad = sum(bool(words) for words in verdicts(found))
    print(f"{len(found)} completions with {words}; {bad} not finite or extreme:\n")
    print(table(found, args.rows))


if __name__ == "__main__":
    main()
