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

from grpo_jax.evals.table import Cell

MAX_POINTS = 400  # a line; longer series are averaged over equal stretches


class Point(NamedTuple):
    """An arm in a scatter plot."""

    label: str
    css: str  # class that sets its colour
    x: Cell
    y: Cell


class Scale(NamedTuple):
    """Linear map from data to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


class Box(NamedTuple):
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float


def _box(left: float, bottom: float, width: float, height: float) -> Box:
    return Box(left, bottom - height, left + width, bottom)


def _overlap(a: Box, b: Box) -> bool:
    return a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom


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


def line_chart(
    name: str,
    steps: Sequence[float],
    values: Sequence[float],
    spread: Sequence[float] | None = None,
    css: str = "",
    note: str = "",
) -> str:
    """One metric over steps as a <figure>, with a moving average once the series is long.

    Args:
      name: shown above the plot.
      steps, values: the series; at least one point.
      spread: drawn as a band values +- spread.
      css: extra class, which sets the colour.
      note: small text beside the name.
    """
    x, y, band = _thin(steps, values, spread)
    width, height = 340, 150
    bounds = [*y, *(y - band), *(y + band)] if band is not None else list(y)
    low, high = padded([float(b) for b in bounds], 0.06)
    across = Scale(float(x[0]), float(x[-1]) if x[-1] > x[0] else float(x[0]) + 1, 44, width - 8)
    up = Scale(low, high, height - 20, 8)
    smooth = _smooth(y)
    parts = [f'<figure class="chart {css}"><figcaption><b>{_breakable(name)}</b>']
    parts.append(f'<output data-last="{short(float(values[-1]))}">{short(float(values[-1]))}')
    parts.append(f"</output><i>{escape(note)}</i></figcaption>")
    parts.append(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(name)}: ')
    parts.append(f'from {short(float(values[0]))} to {short(float(values[-1]))}">')
    parts += [_grid_y(tick, up, 44, width - 8) for tick in ticks(low, high)]
    parts += [_label_x(tick, across, height) for tick in ticks(float(x[0]), float(x[-1]))]
    if band is not None:
        top = [f"{across(a)},{up(b)}" for a, b in zip(x, y + band, strict=True)]
        bottom = [f"{across(a)},{up(b)}" for a, b in zip(x, y - band, strict=True)]
        parts.append(f'<polygon class="band" points="{" ".join(top + bottom[::-1])}"/>')
    if smooth is not None:
        parts.append(_polyline(x, y, across, up, "raw"))
    parts.append(_polyline(x, y if smooth is None else smooth, across, up, "line"))
    if len(x) <= 24:
        dots = zip(x, y, strict=True)
        parts += [f'<circle class="dot" cx="{across(a)}" cy="{up(b)}" r="2.2"/>' for a, b in dots]
    parts.append('<line class="cursor" y1="8" y2="130"/><circle class="cursor" r="3.5"/>')
    series = [
        [across(float(a)), up(float(b)), a, short(float(b))] for a, b in zip(x, y, strict=True)
    ]
    data = escape(json.dumps(series), quote=True)
    parts.append(f'<rect class="hit" x="44" width="{width - 52}" height="{height}" ')
    parts.append(f'data-series="{data}"/></svg></figure>')
    return "".join(parts)


def tax_plot(
    points: Sequence[Point], floors: Sequence[tuple[str, float]], x_title: str, y_title: str
) -> str:
    """Gained (up) against lost (right), one point an arm with its intervals, floors as lines."""
    width, height, left, bottom = 440, 310, 56, 44
    ends_x = [v for p in points for v in (p.x.value, p.x.low, p.x.high) if v is not None]
    ends_y = [v for p in points for v in (p.y.value, p.y.low, p.y.high) if v is not None]
    x_low, x_high = padded([*ends_x, 0.0], 0.16)
    y_low, y_high = padded([*ends_y, *(value for _, value in floors)], 0.12)
    across = Scale(x_low, x_high, left, width - 14)
    up = Scale(y_low, y_high, height - bottom, 14)
    parts = [f'<figure class="tax"><svg viewBox="0 0 {width} {height}" role="img" aria-label="']
    parts.append(f'{escape(y_title)} against {escape(x_title)}">')
    parts += [_grid_y(tick, up, left, width - 14) for tick in ticks(y_low, y_high, 5)]
    for tick in ticks(x_low, x_high, 5):
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="14" y2="{height - bottom}"/>')
        parts.append(_label_x(tick, across, height - 26))
    for label, value in floors:
        parts.append(f'<line class="floor" x1="{left}" x2="{width - 14}" ')
        parts.append(f'y1="{up(value)}" y2="{up(value)}"/>')
        parts.append(f'<text class="floor" x="{width - 16}" y="{up(value) - 5}" ')
        parts.append(f'text-anchor="end">{escape(label)}</text>')
    parts.append(f'<text class="hint" x="{left + 8}" y="28">↖ learned more, forgot less</text>')
    parts.append(f'<text class="axis" x="{(left + width) / 2}" y="{height - 4}" ')
    parts.append(f'text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text class="axis" transform="translate(13 {(height - bottom) / 2 + 7}) ')
    parts.append(f'rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    taken = [_box(across(p.x.value) - 8, up(p.y.value) + 8, 16, 16) for p in points]
    for point in points:
        parts.append(_marked_point(point, across, up, width - 14, taken))
    return "".join([*parts, "</svg></figure>"])


def _marked_point(point: Point, across: Scale, up: Scale, right: int, taken: list[Box]) -> str:
    """An arm: error bars, marker and a label that keeps clear of the boxes in `taken`."""
    x, y = across(point.x.value), up(point.y.value)
    spoken = f"{point.label}: {short(point.x.value)}, {short(point.y.value)}"
    parts = [f'<g class="{escape(point.css)}"><title>{escape(spoken)}</title>']
    if point.x.low is not None and point.x.high is not None:
        parts.append(f'<line class="error" x1="{across(point.x.low)}" ')
        parts.append(f'x2="{across(point.x.high)}" y1="{y}" y2="{y}"/>')
    if point.y.low is not None and point.y.high is not None:
        parts.append(f'<line class="error" x1="{x}" x2="{x}" y1="{up(point.y.low)}" ')
        parts.append(f'y2="{up(point.y.high)}"/>')
    length = 8.2 * len(point.label)
    places = [_box(x + dx, y + dy, length, 15) for dy in (-9, 20) for dx in (10, -10 - length)]
    box = next(
        (p for p in places if p.right < right and not any(_overlap(p, t) for t in taken)), places[0]
    )
    taken.append(box)
    parts.append(f'<circle class="marker" cx="{x}" cy="{y}" r="6"/>')
    parts.append(f'<text class="name" x="{box.left:.1f}" y="{box.bottom:.1f}">')
    return "".join([*parts, escape(point.label), "</text></g>"])


def _breakable(name: str) -> str:
    """A metric's name that may wrap behind a slash or an underscore."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def _grid_y(tick: float, up: Scale, start: float, end: float) -> str:
    at = up(tick)
    return (
        f'<line class="grid" x1="{start}" x2="{end}" y1="{at}" y2="{at}"/>'
        f'<text class="tick" x="{start - 6}" y="{at + 3.5}" text-anchor="end">{short(tick)}</text>'
    )


def _label_x(tick: float, across: Scale, height: float) -> str:
    at = across(tick)
    return f'<text class="tick" x="{at}" y="{height - 5}" text-anchor="middle">{short(tick)}</text>'


def _polyline(x: np.ndarray, y: np.ndarray, across: Scale, up: Scale, css: str) -> str:
    points = " ".join(f"{across(a)},{up(b)}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{css}" points="{points}"/>'


def _thin(
    steps: Sequence[float], values: Sequence[float], spread: Sequence[float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """At most MAX_POINTS points, each the mean of a stretch of the series."""
    groups = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))

    def mean(series: Sequence[float]) -> np.ndarray:
        array = np.asarray(series, np.float64)
        return np.array([array[group].mean() for group in groups])

    return mean(steps), mean(values), None if spread is None else mean(spread)


def _smooth(y: np.ndarray) -> np.ndarray | None:
    """Centred moving average over a twentieth of the series; None for a short one."""
    if len(y) < 40:
        return None
    half = max(2, len(y) // 40)
    kernel = np.ones(2 * half + 1)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")
