"""The results as text: one line a comparison, with its target beside it."""

from __future__ import annotations

from typing import Any

from benchmarks.work import TARGETS

CHECK_TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
_COLUMNS = (
    "task", "size", "against", "ours", "peer", "unit", "x faster", "x cpu", "target",
    "ours GB", "peer GB", "memory", "target", "ours start", "peer start", "",
)  # fmt: skip


def compare(task: str, size: str, dtype: str, ours: dict, peer: dict) -> dict[str, Any]:
    """Ratios of one pair of interleaved programs.

    Returns:
      faster: how many times as fast ours is, by rates where a run counts tokens or texts, else by
      seconds; faster_cpu: the same in CPU seconds a unit, which holds on a busy machine; memory:
      our peak over the peer's, on the device where it counts; same_model: whether both computed
      the same check value, None where neither did.
    """
    if "median_rate" in ours:
        faster = ours["median_rate"] / peer["median_rate"]
    else:
        faster = peer["median_seconds"] / ours["median_seconds"]
    cpu = [program["median_cpu_seconds"] for program in (ours, peer)]
    if "median_rate" in ours:
        cpu = [_cpu_per_unit(program) for program in (ours, peer)]
    memory = peak(ours) / peak(peer)
    same = None
    if ours["check"] is not None and peer["check"] is not None:
        same = abs(ours["check"] - peer["check"]) <= CHECK_TOLERANCE[dtype]
    wanted, share = TARGETS.get((task, size, peer["program"]), (None, None))
    return {
        "faster": faster,
        "faster_cpu": cpu[1] / cpu[0],
        "memory": memory,
        "same_model": same,
        "target_faster": wanted,
        "target_memory": share,
    }


def _cpu_per_unit(program: dict[str, Any]) -> float:
    """CPU seconds a token or text, over all runs but the first."""
    pairs = zip(program["rates"], program["seconds"], strict=True)
    return sum(program["cpu_seconds"]) / sum(rate * seconds for rate, seconds in pairs)


def peak(program: dict[str, Any]) -> int:
    """Bytes at the highest: of the accelerator's memory if it was counted, else resident."""
    return program["device_peak"] or program["peak_rss"]


def render(records: list[dict[str, Any]]) -> str:
    """The whole table, and what does not fit into columns below it."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for record in records:
        rows.append(_failure(record) if "error" in record else _row(record))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, *_notes(records)])


def _row(record: dict[str, Any]) -> tuple[str, ...]:
    ours, peer, ratio = record["ours"], record.get("peer"), record.get("ratio")
    unit = f"{ours['unit']}/s" if "unit" in ours else "s"
    cells = [record["task"], record["size"], peer["program"] if peer else "-", _value(ours)]
    if not (peer and ratio):
        gb = _gb(peak(ours))
        cells += ["", unit, "", "", "", gb, "", "", "", _start(ours), "", ""]
        return tuple(cells)
    cells += [_value(peer), unit, f"{ratio['faster']:.2f}", f"{ratio['faster_cpu']:.2f}"]
    cells += [_target(ratio["faster"], ratio["target_faster"], above=True)]
    cells += [_gb(peak(ours)), _gb(peak(peer)), f"{ratio['memory']:.2f}"]
    cells += [_target(ratio["memory"], ratio["target_memory"], above=False)]
    cells += [_start(ours), _start(peer)]
    cells += ["DIFFERENT MODELS" if ratio["same_model"] is False else ""]
    return tuple(cells)


def _failure(record: dict[str, Any]) -> tuple[str, ...]:
    cells = (record["task"], record["size"], record["against"] or "-", "FAILED, see below")
    return cells + ("",) * (len(_COLUMNS) - len(cells))


def _value(program: dict[str, Any]) -> str:
    """Median, with the lowest and highest in brackets."""
    values = program.get("rates", program["seconds"])
    middle = program.get("median_rate", program["median_seconds"])
    return f"{_short(middle)} ({_short(min(values))}..{_short(max(values))})"


def _start(program: dict[str, Any]) -> str:
    """Seconds before the steady state: loading, compiling, the first run."""
    return f"{program['load_seconds'] + program['first_seconds']:.1f} s"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


def _target(value: float, wanted: float | None, above: bool) -> str:
    if wanted is None:
        return ""
    met = value >= wanted if above else value <= wanted
    return f"{'>=' if above else '<='} {wanted:g} {'met' if met else 'MISSED'}"


def _notes(records: list[dict[str, Any]]) -> list[str]:
    """Lines for what has no peer, and for lengths and phases."""
    good = [record for record in records if "error" not in record]
    lines = [
        f"{record['task']} {record['size']}: {record['error']}"
        for record in records
        if "error" in record
    ]
    for record in good:
        run, name = record["ours"]["last_run"], f"{record['task']} {record['size']}"
        if "temporary_bytes" in run:
            lines.append(
                f"{name}: XLA temporaries {_gb(run['temporary_bytes'])} GB, arguments "
                f"{_gb(run['argument_bytes'])} GB, parameters {_gb(run['parameter_bytes'])} GB, "
                f"resident {_gb(run['rss_loaded'])} GB before a run, and during it "
                f"{_gb(run['rss_growth'])} GB more"
            )
        for rows, batch in run.get("batches", {}).items():
            lines.append(
                f"{name}, {rows} rows: decode {batch['tokens_per_second']:.0f} tokens/s, "
                f"{batch['bandwidth_fraction']:.0%} of {run['bandwidth'] / 1e9:.0f} GB/s; update "
                f"{batch['update_seconds']:.3g} s, {batch['flops_fraction']:.0%} of "
                f"{run['peak_flops'] / 1e12:.2f} TFLOP/s"
            )
        if "phases" in run:
            parts = ", ".join(f"{k} {v:.2f} s" for k, v in run["phases"].items())
            lines.append(f"{name} (against {record['against']}): ours {parts}")
        if "mean_length" in run and record["task"] == "sampling_lengths":
            for program in (record["ours"], record.get("peer")):
                if program:
                    last = program["last_run"]
                    lines.append(
                        f"{name}: {program['program']} drew lengths of mean "
                        f"{last['mean_length']:.1f}, longest {last['longest']}"
                    )
    return lines + _vocabulary(good) + _reward_share(good)


def _vocabulary(records: list[dict[str, Any]]) -> list[str]:
    """Peak with the large vocabulary over the peak with the small one."""
    lines = []
    for task in ("memory_logps", "memory_update"):
        found = {r["size"]: r["ours"]["last_run"] for r in records if r["task"] == task}
        for small, large in (("S", "S-152k"), ("tiny", "tiny-4k")):
            if small in found and large in found:
                a, b = found[small], found[large]
                ratio = b["temporary_bytes"] / a["temporary_bytes"]
                beyond = [x["temporary_bytes"] - x["parameter_bytes"] for x in (a, b)]
                lines.append(
                    f"{task}: temporaries {large} / {small} = {ratio:.2f}; less one copy of "
                    f"the parameters: {_gb(beyond[0])} -> {_gb(beyond[1])} GB"
                )
    return lines


def _reward_share(records: list[dict[str, Any]]) -> list[str]:
    """The encoder reward of a step's rows as a share of the step."""
    reward = [r["ours"]["median_seconds"] for r in records if r["task"] == "encoder_step"]
    steps = [r for r in records if r["task"] == "grpo_step"]
    return [
        f"encoder reward: {reward[0] / r['ours']['median_seconds']:.1%} of our {r['size']} step "
        f"(measured against {r['against']})"
        for r in steps[: len(steps) * bool(reward)]
    ]
