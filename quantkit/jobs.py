"""What the verbs `quantize` and `run` do, from words on a command line to artifacts on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from quantkit.errors import ModelError, RecipeError, UsageError
from quantkit.manifest import Manifest, write_atomic
from quantkit.memory import NO_LIMIT, MemoryLimit
from quantkit.progress import Progress

if TYPE_CHECKING:
    import torch

    from quantkit.bench.measurement import Results
    from quantkit.model.source import Source
    from quantkit.pipeline import Job
    from quantkit.recipe import CalibrationSection, Recipe


def quantize(
    recipe: str,
    *,
    model: str | None,
    out: Path | None,
    settings: Sequence[str],
    device: str,
    force: bool,
    progress: Progress,
    max_memory: str | None = None,
    trust_remote_code: bool = False,
) -> Manifest:
    """Make one artifact. Everything cheap is checked first: the recipe, the output, the shapes, the disk.

    max_memory: the most resident memory to take, such as "3GB"; the artifact does not depend on it.
    trust_remote_code: a tokenizer that is code in the model's folder is run; the manifest's source says so.
    """
    from quantkit.device import resolve_device
    from quantkit.memory import memory_limit
    from quantkit.recipe import load_recipe

    loaded = load_recipe(recipe, settings)
    memory = memory_limit(max_memory)
    target = resolve_device(device)
    source, model_name = open_model(
        model, loaded.model.id, loaded.model.revision, recipe, trust_remote_code=trust_remote_code
    )
    name = Path(recipe).stem
    folder = out or Path("artifacts") / f"{model_name}-{name}"
    return run_passes([(name, loaded, folder)], source, target, force, progress, memory)[0]


def run(
    suite: str,
    *,
    model: str | None,
    out: Path | None,
    settings: Sequence[str],
    device: str,
    force: bool,
    progress: Progress,
    max_memory: str | None = None,
) -> Results:
    """Quantize every recipe of a suite, bench every artifact beside the baseline, write the report.

    Artifacts go to OUT/artifacts/LABEL, results to OUT/results.json, the table to OUT/report.md.
    """
    from quantkit import report
    from quantkit.bench.runner import bench
    from quantkit.device import resolve_device
    from quantkit.memory import memory_limit
    from quantkit.recipe import load_suite, suite_recipes

    loaded = load_suite(suite, settings)
    memory = memory_limit(max_memory)
    target = resolve_device(device)
    source, _ = open_model(model, loaded.model.id, loaded.model.revision, suite)
    folder = out or Path("reports") / loaded.name
    pairs = suite_recipes(loaded)
    outs = [(label, recipe, folder / "artifacts" / _file_name(label)) for label, recipe in pairs]
    run_passes(outs, source, target, force, progress, memory)
    results = bench(
        [path for _, _, path in outs],
        baseline=model or str(loaded.model.id),
        sections=loaded.bench,
        name=loaded.name,
        device=target.type,
        progress=progress,
        labels=[label for label, _, _ in outs],
    )
    write_atomic(folder / "results.json", (results.model_dump_json(indent=2) + "\n").encode())
    report.rebuild([folder / "results.json"], folder)
    return results


def open_model(
    given: str | None, recipe_model: str | None, revision: str, recipe: str, *, trust_remote_code: bool = False
) -> tuple[Source, str]:
    """The model that the command line or the recipe names, and a short name for it. Raises UsageError for neither."""
    from quantkit.model.reader import open_source

    chosen = given or recipe_model
    if chosen is None:
        raise UsageError(
            f"{recipe}: no model: neither model.id in the recipe nor --model on the command line",
            hint="--model DIR, --model FILE.gguf or --model OWNER/NAME",
        )
    source = open_source(chosen, revision=revision, trust_remote_code=trust_remote_code)
    return source, _file_name(Path(chosen.rstrip("/")).name.removesuffix(".gguf"))


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-.") or "model"


def run_passes(
    wanted: Sequence[tuple[str, Recipe, Path]],
    source: Source,
    device: torch.device,
    force: bool,
    progress: Progress,
    memory: MemoryLimit = NO_LIMIT,
) -> list[Manifest]:
    """Check every job, then make the artifacts: one pass over the model for each calibration set."""
    import torch

    from quantkit.model.calibration import load_calibration
    from quantkit.output import check_output, check_space
    from quantkit.pipeline import Job
    from quantkit.pipeline import quantize as run_pass
    from quantkit.plan import check_plans, given_importance, plan_linears, predicted_bytes

    folders = [folder for _, _, folder in wanted]
    twice = {str(folder) for folder in folders if folders.count(folder) > 1}
    if twice:
        raise RecipeError(
            f"two recipes write to {', '.join(sorted(twice))}", hint="give their suite entries different labels"
        )
    jobs: list[Job] = []
    problems: list[RecipeError] = []
    needed = 0
    for label, recipe, folder in wanted:
        check_output(folder, force=force)
        plans = plan_linears(recipe, source)
        try:
            check_plans(label, recipe, source, plans)
            importance = given_importance(label, source, plans)
        except RecipeError as error:
            problems.append(error)
            continue
        needed += predicted_bytes(source, plans, torch.finfo(getattr(torch, recipe.model.dtype)).bits // 8)
        jobs.append(Job(label, recipe, plans, folder, importance))
    if problems:
        raise RecipeError.from_problems([error.message for error in problems], problems[0].hint)
    check_space(folders[0], needed)
    Thread(target=_hash_ahead, args=(source,), daemon=True).start()
    made: dict[str, Manifest] = {}
    passes = _passes(jobs)
    for section, together in passes:
        calibration = None
        if section is not None:
            progress.say(f"calibration: {section.set}, {section.sequences} x {section.length} tokens")
            calibration = load_calibration(
                section, source.tokenizer_folder(), trust_remote_code=source.trust_remote_code
            )
        for job, manifest in zip(
            together, run_pass(together, source, calibration, device, progress, memory), strict=True
        ):
            made[job.label] = manifest
    return [made[job.label] for job in jobs]


def _hash_ahead(source: Source) -> None:
    """Hash a model's files while it is quantized; the manifest asks for it at the end, and meets what goes wrong."""
    with suppress(OSError, ModelError):
        source.lineage()


def _passes(jobs: Sequence[Job]) -> list[tuple[CalibrationSection | None, list[Job]]]:
    """Jobs that go through the model together: those of one calibration set; uncalibrated ones join the first."""
    groups: dict[str, tuple[CalibrationSection | None, list[Job]]] = {}
    plain = []
    for job in jobs:
        if not any(plan.method is not None and plan.method.calibrated for plan in job.plans):
            plain.append(job)
            continue
        section = job.recipe.calibration
        key = json.dumps(section.model_dump(mode="json"), sort_keys=True)
        groups.setdefault(key, (section, []))[1].append(job)
    passes = list(groups.values())
    if not plain:
        return passes
    if not passes:
        return [(None, plain)]
    passes[0][1].extend(plain)
    return passes
