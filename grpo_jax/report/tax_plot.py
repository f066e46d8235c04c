"""The tax plot as inline SVG: gained (up) against lost (right), one mark an arm.

Every text that comes from data is escaped here.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from grpo_jax.report.plots import Scale, grid_y, label_x, mark, padded, short, ticks
from grpo_jax.report.table import Cell

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 960, 540, 58, 16, 46
_RIGHT = WIDTH - 14


class Point(NamedTuple):
    """An arm in the plot."""

    label: str
    css: str  # class that sets its colour
    number: int | None  # sets its shape; None for base
    x: Cell
    y: Cell
    on_front: bool


class _Box(NamedTuple):
    """A rectangle in pixels, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )


def tax_plot(
    points: Sequence[Point],
    floors: Sequence[tuple[str, float]],
    x_title: str,
    y_title: str,
    name: str,
) -> str:
    """Arms with their intervals on both axes, the front as a staircase, floors as lines.

    Args:
      points: the arms; at least one.
      floors: label and height of systems that need no model.
      x_title, y_title: of the axes.
      name: an id that no other plot of the page has.
    """
    ends_x = [v for p in points for v in p.x if v is not None]
    ends_y = [v for p in points for v in p.y if v is not None]
    x_low, x_high = padded([*ends_x, 0.0], 0.1)
    y_low, y_high = padded([*ends_y, *(value for _, value in floors)], 0.12)
    across = Scale(x_low, x_high, LEFT, _RIGHT)
    up = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" ']
    parts.append(f'aria-label="{escape(y_title)} against {escape(x_title)}" ')
    parts.append(
        f'aria-describedby="{name}-about"><desc id="{name}-about">{escape(_spoken(points))}</desc>'
    )
    parts += [grid_y(tick, up, LEFT, _RIGHT) for tick in ticks(y_low, y_high, 6)]
    for tick in ticks(x_low, x_high, 9):
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(label_x(tick, across, HEIGHT - 27))
    taken = [_around(across(p.x.value), up(p.y.value)) for p in points]
    corners = [(across(p.x.value), up(p.y.value)) for p in points if p.on_front]
    parts.append(_front(sorted(corners), taken))
    for label, value in floors:
        parts.append(_floor(label, value, up, taken))
    parts.append(
        f'<text class="hint" x="{LEFT + 8}" y="{TOP + 14}">↖ learned more, lost less</text>'
    )
    taken.append(_Box(LEFT, TOP, LEFT + 160, TOP + 20))
    parts.append(f'<text class="axis" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" ')
    parts.append(f'text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text class="axis" transform="translate(13 {(HEIGHT - BOTTOM) / 2 + 7}) ')
    parts.append(f'rotate(-90)" text-anchor="middle">{escape(y_title)}</text>')
    for point in points:
        parts.append(_errors(point, across, up))
    for point in sorted(points, key=lambda point: not point.on_front):  # they choose their place
        parts.append(_point(point, across, up, taken))
    return "".join([*parts, "</svg>"])


def _spoken(points: Sequence[Point]) -> str:
    said = [f"{p.label}: {short(p.y.value)} at {short(p.x.value)}" for p in points]
    front = ", ".join(p.label for p in points if p.on_front)
    return f"{'; '.join(said)}. On the front: {front}."


def _around(x: float, y: float) -> _Box:
    return _Box(x - 8, y - 8, x + 8, y + 8)


def _floor(label: str, value: float, up: Scale, taken: list[_Box]) -> str:
    """A dashed line; its name stands at the right end, above the line or below it."""
    at, width = up(value), 5.5 * len(label)
    above = _Box(_RIGHT - width, at - 16, _RIGHT, at - 2)
    below = _Box(_RIGHT - width, at + 2, _RIGHT, at + 16)
    box = below if any(above.meets(t) for t in taken) else above
    taken.append(box)
    return (
        f'<line class="floor" x1="{LEFT}" x2="{_RIGHT}" y1="{at}" y2="{at}"/>'
        f'<text class="floor" x="{_RIGHT - 2}" y="{box.bottom - 3:.1f}" '
        f'text-anchor="end">{escape(label)}</text>'
    )


def _front(places: list[tuple[float, float]], taken: list[_Box]) -> str:
    """What can be had: at a given loss, the best score that some arm reaches."""
    if not places:
        return ""
    x, y = places[0]
    path = f"M{x},{y}"
    for across, up in [*places[1:], (_RIGHT, places[-1][1])]:
        path += f"H{across}V{up}"
        taken.append(_Box(x, y - 1, across, y + 1))
        taken.append(_Box(across - 1, up, across + 1, y))
        x, y = across, up
    return f'<path class="front" d="{path}"/>'


def _errors(point: Point, across: Scale, up: Scale) -> str:
    x, y = across(point.x.value), up(point.y.value)
    parts = [f'<g class="{escape(point.css)}">']
    if point.x.low is not None and point.x.high is not None:
        ends = across(point.x.low), across(point.x.high)
        parts.append(f'<line class="error" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>')
    if point.y.low is not None and point.y.high is not None:
        ends = up(point.y.low), up(point.y.high)
        parts.append(f'<line class="error" x1="{x}" x2="{x}" y1="{ends[0]}" y2="{ends[1]}"/>')
    return "".join([*parts, "</g>"])


def _point(point: Point, across: Scale, up: Scale, taken: list[_Box]) -> str:
    """The mark, and a label that keeps clear of the boxes in `taken`."""
    x, y = across(point.x.value), up(point.y.value)
    spoken = f"{point.label}: {short(point.y.value)} at {short(point.x.value)}"
    parts = [f'<g class="point {escape(point.css)}"><title>{escape(spoken)}</title>']
    box = _label_place(x, y, 6.6 * len(point.label), taken)
    taken.append(box)
    if box.left > x + 14 or box.right < x - 14 or box.top > y + 14 or box.bottom < y - 16:
        near = min(max(x, box.left), box.right), min(max(y, box.top), box.bottom)
        parts.append(f'<line class="leader" x1="{x}" y1="{y}" x2="{near[0]:.1f}" ')
        parts.append(f'y2="{near[1]:.1f}"/>')
    parts.append(mark(point.number, x, y, 6.5))
    parts.append(f'<text class="name" x="{box.left:.1f}" y="{box.bottom - 3:.1f}">')
    return "".join([*parts, escape(point.label), "</text></g>"])


def _label_place(x: float, y: float, length: float, taken: list[_Box]) -> _Box:
    """The nearest free place for a label around a mark; beside it when none is free."""
    places = []
    for distance in (9, 22, 38, 56, 76, 100, 130, 165, 205):
        half = distance / 2
        for dx, dy in (
            (distance, 0), (-distance - length, 0), (distance, -distance), (distance, distance),
            (-distance - length, -distance), (-distance - length, distance),
            (-length / 2, -distance - 6), (-length / 2, distance + 6),
            (distance, -half), (distance, half), (-distance - length, -half),
            (-distance - length, half), (half, -distance), (half, distance),
            (-half - length, -distance), (-half - length, distance),
        ):  # fmt: skip
            places.append(_Box(x + dx, y + dy - 8, x + dx + length, y + dy + 8))
    inside = _Box(LEFT, TOP, _RIGHT + 6, HEIGHT - BOTTOM)
    return next(
        (
            p
            for p in places
            if p.left > inside.left
            and p.right < inside.right
            and p.top > inside.top - 6
            and p.bottom < inside.bottom
            and not any(p.meets(t) for t in taken)
        ),
        places[0],
    )
