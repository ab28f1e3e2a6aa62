"""A plan on a terminal: one screen, what is wrong first."""

from __future__ import annotations

import re
from collections import Counter

from quantkit.planning.document import PlanDocument
from quantkit.words import columns, megabytes

SHOWN_PARTS = 4
VERDICT_WORDS = {"takes": "takes it", "slowly": "takes it slowly", "refuses": "refuses it"}


def text(plan: PlanDocument) -> str:
    """What will come out, what it takes, what hurts, and what each engine makes of it."""
    model = plan.model
    tied = ", tied head" if model.tied_head else ""
    rows = [
        ["model", f"{model.id}: {_count(model.parameters)} parameters, {model.blocks} blocks{tied}"],
        ["method", plan.method],
        ["format", plan.format],
        *_forecast_rows(plan),
    ]
    blocks = [columns(rows)]
    if plan.problems:
        said = "\n".join(_together(plan.problems))
        hint = f"\nhint: {plan.hint}" if plan.hint else ""
        blocks.append(f"quantize would refuse this, {len(plan.problems)} problems:\n{said}{hint}")
    if plan.cautions:
        blocks.append("\n".join(f"note: {caution}" for caution in plan.cautions))
    if plan.engines:
        engines = []
        for engine in plan.engines:
            reason = next(iter(engine.reasons), None)
            engines.append([engine.title, VERDICT_WORDS[engine.verdict], reason.text() if reason else ""])
        blocks.append(columns([["engine", "verdict", "why"], *engines]))
    return "\n\n".join(blocks)


def _together(problems: list[str]) -> list[str]:
    """The problems with those of the same kind in every block as one line; --json names each layer."""
    counted = Counter(re.sub(r"\.\d+\.", ".*.", problem) for problem in problems)
    return [f"- {problem}" + (f" ({count} layers)" if count > 1 else "") for problem, count in counted.items()]


def _forecast_rows(plan: PlanDocument) -> list[list[str]]:
    artifact, memory, disk, time = plan.artifact, plan.memory, plan.disk, plan.time
    if artifact is None or memory is None or disk is None or time is None:
        return []
    size = f"{megabytes(artifact.tensor_bytes)} of tensors ({artifact.tensor_bytes} bytes)"
    if artifact.weight_file_bytes is not None:
        about = "" if artifact.weight_file_exact else "about "
        size += f", {about}{megabytes(artifact.weight_file_bytes)} with headers"
    bits = f"{artifact.bits_per_weight_all:.2f} all"
    if artifact.bits_per_weight is not None:
        bits = f"{artifact.bits_per_weight:.2f} quantized linears, {bits}"
    space = [f"{megabytes(disk.artifact_bytes)} for the artifact"]
    space += [f"{megabytes(disk.scratch_bytes)} of scratch"] if disk.scratch_bytes else []
    space += [f"{megabytes(disk.download_bytes)} to download"] if disk.download_bytes else []
    rows = [
        ["size", size],
        ["bits per weight", bits],
        [
            "peak memory",
            f"{megabytes(memory.peak_rss_bytes)} ±{memory.error:.0%}: "
            + _largest({name: megabytes(size) for name, size in memory.parts_bytes.items()}, memory.parts_bytes),
        ],
    ]
    if memory.peak_vram_bytes is not None:
        rows.append(["GPU memory", f"{megabytes(memory.peak_vram_bytes)}, by the same terms; not checked on a GPU"])
    seconds = {name: _duration(part) for name, part in time.parts_s.items()}
    rows += [
        ["disk", ", ".join(space)],
        ["time", f"{_duration(time.seconds)} ±{time.error:.0%} on {plan.device}: " + _largest(seconds, time.parts_s)],
    ]
    return rows


def _largest(shown: dict[str, str], sizes: dict[str, int] | dict[str, float]) -> str:
    names = sorted(shown, key=lambda name: -sizes[name])[:SHOWN_PARTS]
    return ", ".join(f"{name} {shown[name]}" for name in names)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} billion" if parameters >= 1e9 else f"{parameters / 1e6:.1f} million"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
