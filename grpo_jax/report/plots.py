"""Plots as inline SVG: numbers in, strings out. Colours and fonts are the page's own (CSS classes).

Every text that comes from data is escaped here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from grpo_jax.report.table import Cell

SHAPES = ("circle", "square", "diamond", "up", "down", "cross", "pentagon")


class Line(NamedTuple):
    """One curve of a chart."""

    name: str  # of its arm; "" when the chart has one line
    css: str  # class that sets its colour
    steps: Sequence[float]
    values: Sequence[float]
    last: float  # the last value itself, where `values` are means of stretches
    spread: Sequence[float] | None = None  # drawn as a band values +- spread
    dash: int = 0  # which of the dashes of report.css; 0: none
    arm: str = ""  # its name, where the chart shows several


class Scale(NamedTuple):
    """Linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number in about four significant digits: 0.0312, 12.4, 1 530, 2.1e-07."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    size = abs(value)
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    if size >= 1e5:
        return f"{value / 1e6:.2f}M" if size >= 1e6 else f"{value / 1e3:.0f}k"
    digits = max(0, 3 - int(math.floor(math.log10(size))) - 1) if size >= 1 else 3
    text = f"{value:.{max(digits, 0)}f}" if size >= 0.1 else f"{value:.4f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def padded(values: Sequence[float], pad: float = 0.08) -> tuple[float, float]:
    """A range a little wider than the values, never empty."""
    low, high = min(values), max(values)
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return low - room, high + room


def interval(found: Cell, low: float, high: float) -> str:
    """A value and its interval on a common scale [low, high], as a bar under a number."""
    scale = Scale(low, high, 3, 77)
    parts = ['<svg class="ci" viewBox="0 0 80 8" aria-hidden="true">']
    parts.append('<line class="track" x1="3" x2="77" y1="4" y2="4"/>')
    if found.low is not None and found.high is not None:
        parts.append(f'<line class="bar" x1="{scale(found.low)}" x2="{scale(found.high)}"')
        parts.append(' y1="4" y2="4"/>')
    parts.append(f'<circle cx="{scale(found.value)}" cy="4" r="2.6"/></svg>')
    return "".join(parts)


def mark(index: int | None, x: float, y: float, r: float) -> str:
    """An arm's mark: its shape tells arms apart where colours do not; None is a ring."""
    if index is None:
        return f'<circle class="marker ring" cx="{x}" cy="{y}" r="{r - 0.5:g}"/>'
    shape = SHAPES[index % len(SHAPES)]
    if shape == "circle":
        return f'<circle class="marker" cx="{x}" cy="{y}" r="{r:g}"/>'
    corners = {
        "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
        "up": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "down": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
        "cross": [
            (-0.4, -1.1), (0.4, -1.1), (0.4, -0.4), (1.1, -0.4), (1.1, 0.4), (0.4, 0.4),
            (0.4, 1.1), (-0.4, 1.1), (-0.4, 0.4), (-1.1, 0.4), (-1.1, -0.4), (-0.4, -0.4),
        ],
        "pentagon": [(0, -1.1), (1.05, -0.34), (0.65, 0.9), (-0.65, 0.9), (-1.05, -0.34)],
    }[shape]  # fmt: skip
    points = " ".join(f"{x + a * r:.1f},{y + b * r:.1f}" for a, b in corners)
    return f'<polygon class="marker" points="{points}"/>'


def line_chart(name: str, lines: Sequence[Line], note: str = "", limit: float | None = None) -> str:
    """One metric over steps as a <figure>; long series are drawn with a moving average.

    Args:
      name: shown above the plot.
      lines: the series, each with at least one point.
      note: small text beside the name.
      limit: a height to draw a dashed line at.
    """
    width, height = 340, 150
    series = [(np.asarray(li.steps, float), np.asarray(li.values, float)) for li in lines]
    bounds = [float(v) for _, y in series for v in y]
    for line, (_, y) in zip(lines, series, strict=True):
        if line.spread is not None:
            bounds += [float(v) for v in (*(y - line.spread), *(y + line.spread))]
    bounds += [] if limit is None else [limit]
    first, last = min(x[0] for x, _ in series), max(x[-1] for x, _ in series)
    low, high = padded(bounds, 0.06)
    across = Scale(float(first), float(last if last > first else first + 1), 44, width - 8)
    up = Scale(low, high, height - 20, 8)
    single = len(lines) == 1
    value = short(lines[0].last) if single else ""
    spoken = f"from {short(series[0][1][0])} to {value}" if single else f"{len(lines)} arms"
    parts = [f'<figure class="chart"><figcaption><b>{_breakable(name)}</b>']
    parts.append(f'<output data-last="{value}">{value}</output>')
    parts.append(f'<i>{escape(note)}</i></figcaption><svg viewBox="0 0 {width} {height}" ')
    parts.append(f'role="img" aria-label="{escape(name)}: {spoken}">')
    parts += [grid_y(tick, up, 44, width - 8) for tick in ticks(low, high)]
    parts += [label_x(tick, across, height) for tick in ticks(float(first), float(last))]
    if limit is not None:
        at = up(limit)
        parts.append(f'<line class="floor" x1="44" x2="{width - 8}" y1="{at}" y2="{at}"/>')
    for line, (x, y) in zip(lines, series, strict=True):
        parts.append(_line(line, x, y, across, up, single))
    parts.append('<line class="cursor" y1="8" y2="130"/><circle class="cursor" r="3.5"/>')
    read = [
        [line.name, [[round(float(a), 1), short(float(b))] for a, b in zip(x, y, strict=True)]]
        for line, (x, y) in zip(lines, series, strict=True)
    ]
    data = escape(json.dumps(read, ensure_ascii=False, separators=(",", ":")), quote=True)
    parts.append(f'<rect class="hit" x="44" width="{width - 52}" height="{height}" ')
    parts.append(f'data-series="{data}"/></svg></figure>')
    return "".join(parts)


def _line(line: Line, x: np.ndarray, y: np.ndarray, across: Scale, up: Scale, single: bool) -> str:
    """Band, points and moving average; class "data" is on the polyline that holds the points."""
    smooth = _smooth(y)
    dash = f" dash{line.dash}" if line.dash else ""
    arm = f' data-arm="{escape(line.arm)}"' if line.arm else ""
    parts = [f'<g class="{escape(line.css)}{dash}"{arm}>']
    if line.spread is not None:
        top = [f"{across(a)},{up(b)}" for a, b in zip(x, y + line.spread, strict=True)]
        bottom = [f"{across(a)},{up(b)}" for a, b in zip(x, y - line.spread, strict=True)]
        parts.append(f'<polygon class="band" points="{" ".join(top + bottom[::-1])}"/>')
    if smooth is not None:
        css = "raw data" if single else "raw data faint"
        parts.append(_polyline(x, y, across, up, css))
    parts.append(_polyline(x, y if smooth is None else smooth, across, up,
                           "line data" if smooth is None else "line"))  # fmt: skip
    if len(x) <= 24:
        dots = zip(x, y, strict=True)
        parts += [f'<circle class="dot" cx="{across(a)}" cy="{up(b)}" r="2.2"/>' for a, b in dots]
    return "".join([*parts, "</g>"])


def _breakable(name: str) -> str:
    """A metric's name that may wrap behind a slash or an underscore."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def grid_y(tick: float, up: Scale, start: float, end: float) -> str:
    """A horizontal grid line and its number."""
    at = up(tick)
    return (
        f'<line class="grid" x1="{start}" x2="{end}" y1="{at}" y2="{at}"/>'
        f'<text class="tick" x="{start - 6}" y="{at + 3.5}" text-anchor="end">{short(tick)}</text>'
    )


def label_x(tick: float, across: Scale, height: float) -> str:
    """A number under the horizontal axis."""
    at = across(tick)
    return f'<text class="tick" x="{at}" y="{height - 5}" text-anchor="middle">{short(tick)}</text>'


def _polyline(x: np.ndarray, y: np.ndarray, across: Scale, up: Scale, css: str) -> str:
    points = " ".join(f"{across(a)},{up(b)}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _smooth(y: np.ndarray) -> np.ndarray | None:
    """Centred moving average over a twentieth of the series; None for a short one."""
    if len(y) < 40:
        return None
    half = max(2, len(y) // 40)
    kernel = np.ones(2 * half + 1)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
