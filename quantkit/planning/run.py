"""The verb `plan`: from a recipe and a model's headers to everything that can be known before the run."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch

from quantkit.device import resolve_device
from quantkit.errors import RecipeError
from quantkit.formats.base import LinearPlan
from quantkit.jobs import named_model
from quantkit.memory import MemoryLimit, memory_limit
from quantkit.model.blocks import blocks_of
from quantkit.model.config_fit import check_config_fits
from quantkit.model.headers import HeaderSource, open_headers
from quantkit.model.source import Source
from quantkit.plan import check_length, given_importance, plan_linears, problems_of_plans
from quantkit.planning import memory as memory_model
from quantkit.planning import times as time_model
from quantkit.planning.cautions import cautions_of, over_limit, short_disk
from quantkit.planning.document import ArtifactForecast, Disk, Memory, PlanDocument, PlannedModel, Time
from quantkit.planning.memory import memory_of
from quantkit.planning.probe import probe
from quantkit.planning.shapes import work_of
from quantkit.planning.times import time_of
from quantkit.planning.verdicts import check_target, facts_of, verdicts
from quantkit.recipe import Recipe, load_recipe, recipe_sha256


def plan(
    recipe: str,
    *,
    model: str | None,
    settings: Sequence[str],
    device: str,
    max_memory: str | None = None,
    probe_again: bool = False,
) -> PlanDocument:
    """What `quantize` with these words would need and give; no weight is read, none is downloaded."""
    loaded = load_recipe(recipe, settings)
    limit = memory_limit(max_memory)
    where = resolve_device(device)
    chosen = named_model(model, loaded.model.id, recipe)
    source = open_headers(chosen, revision=loaded.model.revision)
    check_config_fits(source)
    label = Path(recipe).stem
    plans = plan_linears(loaded, source)
    misfits, hint = problems_of_plans(label, loaded, source, plans)
    problems, hint = (misfits, hint) if misfits else _refusals(label, loaded, source, plans)
    document = PlanDocument(
        recipe=label,
        recipe_sha256=recipe_sha256(loaded),
        method=loaded.method.label(),
        format=loaded.resolved_format.name,
        device=where.type,
        model=_model(chosen, source, plans),
        fits=not problems,
        problems=problems,
        hint=hint,
        cautions=[],
        artifact=None,
        memory=None,
        disk=None,
        time=None,
        engines=[],
    )
    if misfits:
        return document  # shapes that fit no group have no bytes to count
    return document.model_copy(update=_forecasts(loaded, source, plans, where, limit, probe_again))


def _refusals(label: str, recipe: Recipe, source: Source, plans: list[LinearPlan]) -> tuple[list[str], str | None]:
    """Why `quantize` would refuse a plan whose shapes fit: texts too long, the target, a named importance matrix."""
    problems: list[str] = []
    hint = None
    for check in (check_length, check_target, _check_importance):
        try:
            check(label, recipe, source, plans)
        except RecipeError as error:
            problems += error.message.split("\n")
            hint = hint or error.hint
    return problems, hint


def _check_importance(label: str, recipe: Recipe, source: Source, plans: Sequence[LinearPlan]) -> None:
    given_importance(label, source, plans)


def _model(chosen: str, source: Source, plans: Sequence[LinearPlan]) -> PlannedModel:
    return PlannedModel(
        id=chosen,
        kind=source.kind,
        parameters=source.parameter_count(),
        weight_bytes=_weight_bytes(source),
        blocks=len(blocks_of(source)),
        linears=len(plans),
        tied_head=source.tied_head,
    )


def _weight_bytes(source: Source) -> int:
    return sum(prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names())


def _forecasts(
    recipe: Recipe,
    source: Source,
    plans: list[LinearPlan],
    device: torch.device,
    limit: MemoryLimit,
    probe_again: bool,
) -> dict[str, object]:
    layout = recipe.resolved_format.layout(source, plans, getattr(torch, recipe.model.dtype))
    file_bytes = layout.measure_files()
    written = file_bytes or layout.total_bytes
    quantized = [item for item in plans if item.method is not None]
    count = sum(item.out_features * item.in_features for item in quantized)
    coded = sum(layout.tensor_bytes[f"{item.name}.weight"] for item in quantized)
    work = work_of(recipe, source, plans, device)
    limited = limit.limit_bytes is not None
    room = limit.limit_bytes or limit.room_bytes(torch.device("cpu"))
    device_room = limit.room_bytes(device) if device.type == "cuda" else None
    peak = memory_of(work, device, room, limited=limited, device_room_bytes=device_room)
    took = time_of(work, plans, probe(device.type, again=probe_again), written, peak.filed_bytes, peak.again)
    remote = isinstance(source, HeaderSource) and source.hub_id is not None
    # where quantize writes unless told
    told = short_disk(Path.cwd() / "artifacts", written, peak.scratch_bytes) if peak.filed_bytes else []
    return {
        "cautions": over_limit(limit, peak.peak_rss_bytes) + told + cautions_of(recipe, source, plans, work),
        "artifact": ArtifactForecast(
            tensor_bytes=layout.total_bytes,
            weight_file_bytes=file_bytes,
            weight_file_exact=layout.files_exact and file_bytes is not None,
            bits_per_weight=coded * 8 / count if count else None,
            bits_per_weight_all=written * 8 / source.parameter_count(),
        ),
        "memory": Memory(
            peak_rss_bytes=peak.peak_rss_bytes,
            parts_bytes=peak.host,
            peak_vram_bytes=peak.peak_vram_bytes if device.type == "cuda" else None,
            vram_parts_bytes=peak.device,
            error=memory_model.ERROR,
        ),
        "disk": Disk(
            artifact_bytes=written,
            scratch_bytes=peak.scratch_bytes,
            download_bytes=_weight_bytes(source) if remote else 0,
        ),
        "time": Time(seconds=took.seconds, parts_s=took.parts, error=time_model.ERROR),
        "engines": verdicts(facts_of(recipe, source, plans)),
    }
