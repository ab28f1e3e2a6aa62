"""What will hurt although it works: layers that get other types, tensors that stay large, models that are small."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path

from quantkit.formats.base import LinearPlan
from quantkit.formats.gguf_types import substitutes_of
from quantkit.memory import MemoryLimit
from quantkit.model.blocks import architecture_of
from quantkit.model.scratch import SPARE_BYTES
from quantkit.model.source import Source
from quantkit.output import free_bytes
from quantkit.plan import unmatched
from quantkit.planning.shapes import Work
from quantkit.recipe import Recipe

SMALL_PARAMETERS = 1_000_000_000
"""Below this a model loses visibly at four bits; docs/quality.md has a model of 135 million."""

LARGE_SHARE = 0.1
"""Of all parameters: what stays unquantized above it is named."""


def cautions_of(recipe: Recipe, source: Source, plans: Sequence[LinearPlan], work: Work) -> list[str]:
    """One line each, what weighs most first."""
    found = list(_source(source)) + unmatched("recipe", recipe, source)
    found += _fallbacks(source, plans)
    found += _large_tensors(recipe, source, plans)
    parameters = source.parameter_count()
    bits = 8 * sum(_bits(plan) for plan in plans) / max(1, work.quantized_values) if work.quantized_values else 16
    if parameters < SMALL_PARAMETERS and bits < 6:
        found.append(
            f"small model: {parameters / 1e6:.0f} million parameters; the fewer there are, the more each lost bit "
            "shows (docs/quality.md): compare with 8 bits"
        )
    if work.calibrated and work.tokens < work.widest:
        found.append(
            f"calibration: {work.tokens} tokens for inputs of {work.widest} columns: the Gram matrix cannot have full "
            "rank; take more sequences"
        )
    return found


def over_limit(limit: MemoryLimit, peak_bytes: int) -> list[str]:
    """That a run would hold more than the user's limit."""
    if limit.limit_bytes is None or peak_bytes <= limit.limit_bytes:
        return []
    return [
        f"memory: the limit of {limit.limit_bytes / 1e6:.0f} MB is less than what cannot be spilled, about "
        f"{peak_bytes / 1e6:.0f} MB; the run goes over it"
    ]


def short_disk(folder: Path, artifact_bytes: int, scratch_bytes: int) -> list[str]:
    """That rows which are to wait in a scratch file beside an artifact in `folder` start again, for want of room."""
    free, needed = free_bytes(folder), artifact_bytes + scratch_bytes + SPARE_BYTES
    if free >= needed:
        return []
    return [
        f"disk: that of {folder} has {free / 1e6:.0f} MB free; with less than {needed / 1e6:.0f} MB, rows that are to "
        "wait in a file may start again instead, which takes longer than said here: free some, or give quantize an "
        "--out on another disk"
    ]


def _bits(plan: LinearPlan) -> float:
    """Bytes that a linear's codes and scales take, about; 0 for one that is skipped."""
    if plan.method is None:
        return 0.0
    return plan.method.predicted_bits(plan.out_features, plan.in_features) * plan.out_features * plan.in_features / 8


def _source(source: Source) -> Sequence[str]:
    return [
        f"source: {note}: what it lost before stays lost" if "dequantized" in note else note for note in source.notes
    ]


def _fallbacks(source: Source, plans: Sequence[LinearPlan]) -> list[str]:
    """Linears and the embedding that get another ggml type than the mix wants, together by what happens to them."""
    layers: dict[tuple[str, str, int], list[str]] = defaultdict(list)
    for plan in plans:
        if plan.method is None or plan.method.name != "ggml":
            continue
        given = plan.method.type_for(plan.in_features)
        if given != plan.method.wanted:
            layers[plan.method.wanted, given, plan.in_features].append(plan.name)
    lines = [
        f"{len(names)} linears get {given} instead of {wanted}, whose blocks do not divide {columns} columns: "
        f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for (wanted, given, columns), names in layers.items()
    ]
    if any(plan.method is not None and plan.method.name == "ggml" for plan in plans):
        lines += [f"{record.name}: {record.applied}: {record.reason}" for record in substitutes_of(source, list(plans))]
    return lines


def _large_tensors(recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> list[str]:
    """The embedding and the head, where they stay at full width and that is much of the model."""
    architecture = architecture_of(source.config)
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    total = source.parameter_count()
    if recipe.resolved_format.name == "gguf":
        return []
    count = prod(source.shape(embedding))
    share = count / total
    lines = []
    if source.tied_head and share > LARGE_SHARE:
        lines.append(
            f"tied head: the embedding is the output projection too and stays at {recipe.model.dtype}: "
            f"{share:.0%} of the parameters; GGUF quantizes it"
        )
    elif share > LARGE_SHARE:
        lines.append(f"embedding: stays at {recipe.model.dtype}: {share:.0%} of the parameters")
    skipped = [plan for plan in plans if plan.method is None and f"{plan.name}.weight" != head]
    left = sum(plan.out_features * plan.in_features for plan in skipped) / total
    if left > LARGE_SHARE:
        lines.append(f"skip: {len(skipped)} linears stay at {recipe.model.dtype}: {left:.0%} of the parameters")
    return lines
