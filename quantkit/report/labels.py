"""Where the names of points go, so that they cover neither each other nor what is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LETTER = 5.9
"""Mean width of a letter at 11 px, in px."""
RISE = 8
"""Height of a letter at 11 px above its line."""

OFFSETS = tuple(
    (dx * reach, dy * reach)
    for reach in (1.0, 1.7, 2.6, 4.0)
    for dx, dy in ((8, 4), (-8, 4), (0, -8), (0, 16), (7, -6), (-7, -6), (7, 14), (-7, 14))
)
"""From a point to the start, middle or end of its name's line; nearer ones first."""


class Box(NamedTuple):
    """A rectangle in px."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover, in px."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * high if wide > 0 and high > 0 else 0.0

    def distance(self, point: tuple[float, float]) -> float:
        """From its edge to a point, 0 inside."""
        x, y = point
        return math.hypot(max(self.left - x, 0.0, x - self.right), max(self.top - y, 0.0, y - self.bottom))

    def outside(self, room: Box) -> float:
        """By how many px it sticks out of a room."""
        return sum(
            max(0.0, out)
            for out in (
                room.left - self.left,
                room.top - self.top,
                self.right - room.right,
                self.bottom - room.bottom,
            )
        )


class Spot(NamedTuple):
    """Where a name stands: the x, y and text-anchor of its line, and the room that it takes."""

    x: float
    y: float
    anchor: str
    box: Box


def place(names: Sequence[str], points: Sequence[tuple[float, float]], taken: Sequence[Box], room: Box) -> list[Spot]:
    """Where each name goes: the candidate that covers least of what is taken and of the names before.

    A name that stands apart from its point costs a little, so it moves away only where it has to; one that stands
    nearer to another point would be read as that one's.
    """
    covered = list(taken)
    spots: list[Spot] = []
    for name, (x, y) in zip(names, points, strict=True):
        best: tuple[float, Spot] | None = None
        for rank, (dx, dy) in enumerate(OFFSETS):
            anchor = "start" if dx > 0 else "end" if dx < 0 else "middle"
            box = _box(name, x + dx, y + dy, anchor)
            own = box.distance((x, y))
            misread = sum(box.distance(point) < own + 2 for point in points if point != (x, y))
            cost = sum(map(box.overlap, covered)) + 40 * box.outside(room) + 60 * misread + rank
            if best is None or cost < best[0]:
                best = (cost, Spot(x + dx, y + dy, anchor, box))
        assert best is not None
        spots.append(best[1])
        covered.append(best[1].box)
    return spots


def _box(name: str, x: float, y: float, anchor: str) -> Box:
    width = LETTER * len(name)
    left = x if anchor == "start" else x - width if anchor == "end" else x - width / 2
    return Box(left, y - RISE, left + width, y + 2)
