"""What each arm took: runs in; tokens, seconds and memory out, alone and with what lies behind."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grpo_jax.report.runs import Arm, Json, Run, section
from grpo_jax.report.table import is_number


def costs(arms: Sequence[Arm], runs: Sequence[Run]) -> dict[str, Json]:
    """Costs of each arm that has any, the mean over the runs that know them.

    Returns:
      {arm: {"tokens", "seconds", "peak_bytes": of its training; "total_tokens", "total_seconds": of
      this and of all arms that it comes from; "evaluation_seconds", "evaluation_tokens"}}.
    """
    found: dict[str, Json] = {}
    for arm in arms:
        rows: list[Json] = []
        for run in runs:
            evaluation = run.evaluations.get(arm.name, {})
            cost = section(evaluation, "cost")
            rows.append(
                {
                    "tokens": cost.get("tokens"),
                    "seconds": cost.get("seconds"),
                    "peak_bytes": cost.get("peak_bytes"),
                    "evaluation_seconds": evaluation.get("seconds"),
                    "evaluation_tokens": evaluation.get("tokens"),
                }
            )
        entry = {
            name: float(np.mean(known))
            for name in rows[0]
            if (known := [float(row[name]) for row in rows if is_number(row[name])])
        }
        if entry:
            found[arm.name] = entry
    by_name = {arm.name: arm for arm in arms}
    for name, own in found.items():
        behind = _behind(name, by_name)
        for kind in ("tokens", "seconds"):
            parts = [found[one][kind] for one in behind if kind in found.get(one, {})]
            if parts and len(parts) == len(behind):
                own[f"total_{kind}"] = float(sum(parts))
    return found


def _behind(name: str, arms: dict[str, Arm]) -> list[str]:
    """The arm itself and all that it comes from, each once; base and floors cost nothing."""
    seen: dict[str, None] = {}
    waiting = [name]
    while waiting:
        arm = arms.get(waiting.pop())
        if arm is None or arm.method in ("base", "floor") or arm.name in seen:
            continue
        seen[arm.name] = None
        waiting += [arm.start, str(arm.overrides.get("interpolate.toward", ""))]
    return list(seen)
