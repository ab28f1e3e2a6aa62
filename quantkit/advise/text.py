"""Advice as plain text for a terminal."""

from __future__ import annotations

import textwrap

from quantkit.advise.answers import Advice, Answer
from quantkit.words import columns, megabytes

WIDTH = 100


def text(advice: Advice) -> str:
    """One paragraph a complaint, then the recipes that were considered."""
    head = f"for {megabytes(advice.memory_bytes)}"
    head += f", {advice.model}" if advice.model else ""
    head += f", run by {advice.engine}" if advice.engine else ""
    parts = [head, *map(_answer, advice.answers), _table(advice)]
    parts.append("\n".join(_wrapped(f"note: {note}") for note in advice.notes))
    if advice.left_out:
        reasons: dict[str, list[str]] = {}
        for name, why in advice.left_out.items():
            reasons.setdefault(why, []).append(name)
        parts.append("\n".join(_wrapped(f"left out: {', '.join(names)}: {why}") for why, names in reasons.items()))
    return "\n\n".join(parts)


def _answer(answer: Answer) -> str:
    lines = [f"{answer.question}:"]
    if answer.recipes:
        lines[0] += f" {answer.recipes[0]}"
    lines.append(_wrapped(answer.why, "  "))
    lines += [_wrapped(f"- {reason}", "  ") for reason in answer.reasons]
    if len(answer.recipes) > 1:
        lines.append(_wrapped(f"next: {', '.join(answer.recipes[1:])}", "  "))
    lines.append(_wrapped(f"also: {'; '.join(answer.also)}", "  "))
    return "\n".join(lines)


def _table(advice: Advice) -> str:
    rows = []
    if advice.model is None:
        header = ["recipe", "format", "bits/weight", "largest model, 10^9 parameters"]
        for candidate in sorted(advice.candidates, key=lambda candidate: -candidate.bits_per_weight):
            size = f"{candidate.parameters_that_fit / 1e9:.1f}"
            rows.append([candidate.recipe, candidate.format or "-", f"{candidate.bits_per_weight:.2f}", size])
        return columns([header, *rows], right=(2, 3))
    header = ["recipe", "format", "bits/weight", "weights MB", "needed MB", "fits", "sequences"]
    for candidate in sorted(advice.candidates, key=lambda candidate: -(candidate.needed_bytes or 0)):
        rows.append(
            [
                candidate.recipe,
                candidate.format or "-",
                f"{candidate.bits_per_weight:.2f}",
                f"{(candidate.weight_bytes or 0) / 1e6:.1f}",
                f"{(candidate.needed_bytes or 0) / 1e6:.1f}",
                "yes" if candidate.fits else "no",
                "-" if candidate.sequences is None else str(candidate.sequences),
            ]
        )
    return columns([header, *rows], right=(2, 3, 4, 6))


def _wrapped(line: str, indent: str = "") -> str:
    return textwrap.fill(line, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}  ", break_long_words=False)
