"""Plots as SVG, drawn by hand: small, sharp at any size, and the same in the page and in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from quantkit.report.labels import Box, place
from quantkit.report.pareto import Axis, Plot, Point

WIDTH, HEIGHT = 360, 270
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 38
TICKS = 5
FAR = 9
"""A name more px away from its point than this is tied to it by a line."""
LOG_RATIO = 50
"""Numbers that span more than this share an axis only when it is logarithmic."""

LONELY_STYLE = """
svg{--ink:#1c1f23;--soft:#626a73;--line:#dfe2e6;--paper:#fff;--accent:#1a5fb4;
font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
@media(prefers-color-scheme:dark){svg{--ink:#e4e7eb;--soft:#9aa3ad;--line:#30363d;--paper:#14171b;--accent:#78aeff}}
"""
SHAPES_STYLE = """
.ground{fill:var(--paper)}.grid{stroke:var(--line)}.tick{fill:var(--soft)}.title{fill:var(--ink);font-weight:600}
.name{fill:var(--ink);stroke:var(--paper);stroke-width:3px;stroke-linejoin:round;paint-order:stroke}
.bar{stroke:var(--soft);stroke-opacity:.7}.front .bar{stroke:var(--accent)}
.dot{fill:var(--soft)}.front .dot{fill:var(--accent)}
.baseline .dot{fill:var(--paper);stroke:var(--ink);stroke-width:1.5}
.edge{fill:none;stroke:var(--accent);stroke-width:1.5;stroke-dasharray:4 3;stroke-opacity:.8}
.leader{stroke:var(--soft);stroke-width:.75}.level{stroke:var(--ink);stroke-opacity:.45;stroke-dasharray:1 3}
"""


class Scale:
    """Numbers to places on paper, linear or logarithmic, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = min(values), max(values)
        positive = [value for value in values if value > 0]
        self.log = len(positive) == len(values) and high / low > LOG_RATIO
        if self.log:
            low, high = low / 1.3, high * 1.3
        else:
            room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
            low, high = (0.0 if 0 <= low <= room else low - room), high + room
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        if self.log:
            value = min(max(value, self._low), self._high)
            share = math.log(value / self._low) / math.log(self._high / self._low)
        else:
            share = (value - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers on the scale, with as many decimals as tell them apart."""
        if self.log:
            decades = range(math.floor(math.log10(self._low)), math.ceil(math.log10(self._high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            every = [10.0**decade * step for decade in decades for step in steps]
            found = [value for value in every if self._low <= value <= self._high]
            return [(value, f"{value:g}") for value in found]
        rough = (self._high - self._low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
        digits = max(0, -math.floor(math.log10(step) + 1e-9) + (1 if round(step / power, 3) == 2.5 else 0))
        first = math.ceil(self._low / step - 1e-9)
        return [
            (number * step, f"{number * step:.{digits}f}")
            for number in range(first, math.floor(self._high / step + 1e-9) + 1)
        ]


def scatter(plot: Plot, *, alone: bool = False) -> str:
    """A plot as an <svg> element. alone: with its own style and background, as a file."""
    x = Scale([end for point in plot.points for end in point.x], LEFT, WIDTH - RIGHT)
    y = Scale(_up(plot), HEIGHT - BOTTOM, TOP)
    drawn = [point for point in plot.points if not (y.log and point.y[1] <= 0)]
    steps = _steps(plot, drawn, x, y)
    parts = [*_frame(plot, x, y), *_lines(drawn, steps, y)]
    parts += [_mark(plot, point, x, y) for point in drawn]
    parts += _names(drawn, steps, x, y)
    return wrap(plot.title, describe(plot), parts, WIDTH, HEIGHT, alone=alone)


def _up(plot: Plot) -> list[float]:
    """The ends that the vertical axis has to hold; a baseline at zero by definition does not forbid a log axis."""
    values = [end for point in plot.points if not point.baseline for end in point.y]
    everything = [end for point in plot.points for end in point.y]
    positive = [value for value in values if value > 0]
    wide = positive and len(positive) == len(values) and max(values) / min(values) > LOG_RATIO
    return values if wide else everything


def wrap(title: str, text: str, parts: Sequence[str], width: float, height: float, *, alone: bool) -> str:
    """Shapes as an <svg> element with a title and a description for those who do not see it."""
    style = f"<style>{LONELY_STYLE}{SHAPES_STYLE}</style>" if alone else ""
    ground = f'<rect class="ground" width="{width}" height="{height}"/>' if alone else ""
    name = escape(f"{title}. {text}", quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
        f"{style}{ground}{''.join(parts)}</svg>"
    )


def describe(plot: Plot) -> str:
    """The points in words."""
    said = [f"{p.label}: {p.x[1]:.4g} {plot.x.unit}, {p.y[1]:.4g} {plot.y.unit}".strip() for p in plot.points]
    return "; ".join(said) + "."


def _frame(plot: Plot, x: Scale, y: Scale) -> list[str]:
    parts = [f'<text class="title" x="4" y="14">{escape(str(plot.y))}{_way(plot.y, "↑", "↓")}</text>']
    for value, text in y.ticks():
        at = y(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{at + 3.5:.1f}">{text}</text>')
    for value, text in x.ticks():
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {HEIGHT - BOTTOM}v4"/>')
        parts.append(f'<text class="tick" text-anchor="middle" x="{at:.1f}" y="{HEIGHT - BOTTOM + 15}">{text}</text>')
    parts.append(
        f'<text class="tick" text-anchor="end" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}">'
        f"{escape(str(plot.x))}{_way(plot.x, '→', '←')}</text>"
    )
    return parts


def _way(axis: Axis, higher: str, lower: str) -> str:
    """An arrow that points to what is better."""
    arrow = {"higher": higher, "lower": lower}.get(axis.better)
    return f" ({arrow} better)" if arrow else ""


def _steps(plot: Plot, points: Sequence[Point], x: Scale, y: Scale) -> list[tuple[float, float]]:
    """Corners of the staircase through the artifacts that no other beats."""
    front = sorted((point for point in points if point.front), key=lambda point: point.x[1])
    corners = [(point.x[1], point.y[1]) for point in front[:1]]
    for before, after in zip(front, front[1:], strict=False):
        # between two artifacts, what can be had is what the one that still fits gives
        corners.append((after.x[1], before.y[1]) if plot.x.better == "lower" else (before.x[1], after.y[1]))
        corners.append((after.x[1], after.y[1]))
    return [(x(across), y(up)) for across, up in corners]


def _lines(points: Sequence[Point], steps: Sequence[tuple[float, float]], y: Scale) -> list[str]:
    """The level of the baseline and the staircase."""
    parts = [
        f'<path class="level" d="M{LEFT} {y(point.y[1]):.1f}H{WIDTH - RIGHT}"/>' for point in points if point.baseline
    ]
    if len(steps) > 1:
        parts.append(f'<path class="edge" d="M{"L".join(f"{at_x:.1f} {at_y:.1f}" for at_x, at_y in steps)}"/>')
    return parts


def _mark(plot: Plot, point: Point, x: Scale, y: Scale) -> str:
    kind = "baseline" if point.baseline else "front" if point.front else "beaten"
    at_x, at_y = x(point.x[1]), y(point.y[1])
    bars = ""
    if point.x[0] < point.x[2]:
        bars += f'<path class="bar" d="M{x(point.x[0]):.1f} {at_y:.1f}H{x(point.x[2]):.1f}"/>'
    if point.y[0] < point.y[2]:
        bars += f'<path class="bar" d="M{at_x:.1f} {y(point.y[0]):.1f}V{y(point.y[2]):.1f}"/>'
    tip = (
        f"{point.label}\n{plot.x.title}: {_ends(point.x)} {plot.x.unit}\n{plot.y.title}: {_ends(point.y)} {plot.y.unit}"
    )
    dot = f'<circle class="dot" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3.5"/>'
    return f'<g class="{kind}">{bars}{dot}<title>{escape(tip)}</title></g>'


def _ends(values: tuple[float, float, float]) -> str:
    low, value, high = values
    return f"{value:.4g}" if low == high else f"{value:.4g} ({low:.4g} to {high:.4g})"


def _names(points: Sequence[Point], steps: Sequence[tuple[float, float]], x: Scale, y: Scale) -> list[str]:
    """A label beside every point, where it covers least."""
    middles = [(x(point.x[1]), y(point.y[1])) for point in points]
    taken = [Box(at_x - 5, at_y - 5, at_x + 5, at_y + 5) for at_x, at_y in middles]
    for point, (at_x, at_y) in zip(points, middles, strict=True):
        taken.append(Box(x(point.x[0]), at_y - 1, x(point.x[2]), at_y + 1))
        taken.append(Box(at_x - 1, y(point.y[2]), at_x + 1, y(point.y[0])))
    for (x1, y1), (x2, y2) in zip(steps, steps[1:], strict=False):
        taken.append(Box(min(x1, x2) - 1, min(y1, y2) - 1, max(x1, x2) + 1, max(y1, y2) + 1))
    room = Box(LEFT, TOP - 8, WIDTH - 2, HEIGHT - BOTTOM)
    spots = place([point.label for point in points], middles, taken, room)
    parts = []
    for point, spot, (at_x, at_y) in zip(points, spots, middles, strict=True):
        if spot.box.distance((at_x, at_y)) > FAR:
            end_x = min(max(at_x, spot.box.left), spot.box.right)
            end_y = min(max(at_y, spot.box.top + 2), spot.box.bottom - 2)
            parts.append(f'<path class="leader" d="M{at_x:.1f} {at_y:.1f}L{end_x:.1f} {end_y:.1f}"/>')
        name = escape(point.label)
        parts.append(f'<text class="name" text-anchor="{spot.anchor}" x="{spot.x:.1f}" y="{spot.y:.1f}">{name}</text>')
    return parts
