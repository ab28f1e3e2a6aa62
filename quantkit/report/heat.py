"""A map of the noise in every layer: blocks across, roles down, the noisiest strongest."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from quantkit.bench.measurement import Layer
from quantkit.report.layers import UNQUANTIZED, place_of
from quantkit.report.model import Line
from quantkit.report.svg import WIDTH, wrap

LABELS = 66
ROW = 15
HEAD = 24
FOOT = 30
FAINTEST = 0.10
"""Opacity of the best layer: still seen as a cell."""

SAME_BITS = 0.3
"""Layers of one grid differ by less: a scale a group costs a short row more."""

HEAT_STYLE = ".cell{fill:var(--accent)}.none{fill:none;stroke:var(--line)}"


def noise_map(line: Line, *, alone: bool = False) -> str | None:
    """SQNR of an artifact's layers as an <svg> element, None when it is known of fewer than two layers."""
    known = [layer.sqnr_db for layer in line.layers if layer.sqnr_db is not None and layer.applied != UNQUANTIZED]
    if len(known) < 2:
        return None
    low, high = min(known), max(known)
    reach = high - low or 1.0

    def shade(layer: Layer) -> float | None:
        if layer.sqnr_db is None or layer.applied == UNQUANTIZED:
            return None
        return FAINTEST + (1 - FAINTEST) * (high - layer.sqnr_db) / reach

    return _map(line, f"{line.label}: SQNR, dB", (f"{low:.1f}", f"{high:.1f}"), shade, alone=alone)


def bits_map(line: Line, *, alone: bool = False) -> str | None:
    """Bits per weight of an artifact's layers likewise, None where all layers have the same."""
    bits = [layer.bits_per_weight for layer in line.layers if place_of(layer) is not None]
    if not bits or max(bits) - min(bits) < SAME_BITS:
        return None
    low, high = min(bits), max(bits)

    def shade(layer: Layer) -> float:
        return FAINTEST + (1 - FAINTEST) * (high - layer.bits_per_weight) / (high - low)

    return _map(line, f"{line.label}: bits/weight", (f"{low:.2f}", f"{high:.2f}"), shade, alone=alone)


def _map(
    line: Line, title: str, ends: tuple[str, str], shade: Callable[[Layer], float | None], *, alone: bool
) -> str | None:
    placed = [(place, layer) for layer in line.layers if (place := place_of(layer)) is not None]
    if not placed:
        return None
    blocks = 1 + max(block for (block, _), _ in placed)
    roles = list(dict.fromkeys(role for (_, role), _ in placed))
    side = (WIDTH - LABELS - 8) / blocks
    parts = [f'<text class="title" x="4" y="14">{escape(title)}</text>']
    for number, role in enumerate(roles):
        at = HEAD + ROW * number + 10.5
        parts.append(f'<text class="tick" text-anchor="end" x="{LABELS - 6}" y="{at}">{escape(role)}</text>')
    for (block, role), layer in placed:
        strength = shade(layer)
        ink = 'class="none"' if strength is None else f'class="cell" fill-opacity="{strength:.2f}"'
        at_x, at_y = LABELS + side * block, HEAD + ROW * roles.index(role)
        parts.append(
            f'<rect {ink} x="{at_x:.1f}" y="{at_y:g}" width="{max(side - 1, 1):.1f}" height="{ROW - 1}">'
            f"<title>{escape(_tip(layer))}</title></rect>"
        )
    height = HEAD + ROW * len(roles) + FOOT
    parts += _legend(blocks, ends, height)
    return wrap(title, f"{ends[0]} to {ends[1]}, the stronger the lower.", parts, WIDTH, height, alone=alone)


def _tip(layer: Layer) -> str:
    noise = "" if layer.sqnr_db is None else f"\n{layer.sqnr_db:.1f} dB"
    return f"{layer.name}\n{layer.applied}\n{layer.bits_per_weight:.2f} bits/weight{noise}"


def _legend(blocks: int, ends: tuple[str, str], height: float) -> list[str]:
    """Numbers of the first and the last block, and the strongest and the faintest shade with their values."""
    y = height - FOOT + 12
    parts = [f'<text class="tick" x="{LABELS}" y="{y}">block 0</text>']
    if blocks > 1:
        parts.append(f'<text class="tick" text-anchor="end" x="{WIDTH - 8}" y="{y}">{blocks - 1}</text>')
    for place, (text, opacity) in enumerate(((ends[0], 1.0), (ends[1], FAINTEST))):
        left = LABELS + 70 * place
        parts.append(
            f'<rect class="cell" fill-opacity="{opacity}" x="{left}" y="{y + 5}" width="10" height="10"/>'
            f'<text class="tick" x="{left + 15}" y="{y + 14}">{text}</text>'
        )
    return parts
