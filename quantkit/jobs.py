"""What the verbs `quantize` and `run` do, from words on a command line to artifacts on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from quantkit.errors import ModelError, UsageError
from quantkit.manifest import Manifest
from quantkit.memory import NO_LIMIT, MemoryLimit
from quantkit.progress import Progress
from quantkit.quiet import collecting_later, collecting_only_new

if TYPE_CHECKING:
    import torch

    from quantkit.bench.measurement import Results
    from quantkit.model.calibration import CalibrationSet
    from quantkit.model.source import Source
    from quantkit.one_block import Job
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
    restart: bool = False,
    trust_remote_code: bool = False,
) -> Manifest:
    """Make one artifact. Everything cheap is checked first: the recipe, the output, the shapes, the disk.

    max_memory: the most resident memory to take, such as "3GB"; the artifact does not depend on it. restart: begin
    again where a run that did not end has left its work. trust_remote_code: a tokenizer that is code in the model's
    folder is run; the manifest's source says so.
    """
    with collecting_later():
        from quantkit.device import resolve_device
        from quantkit.memory import memory_limit
        from quantkit.output import check_folder
        from quantkit.recipe import load_recipe

    if out is not None:
        check_folder(out)
    loaded = load_recipe(recipe, settings)
    memory = memory_limit(max_memory)
    target = resolve_device(device)
    source, model_name = open_model(
        model, loaded.model.id, loaded.model.revision, recipe, trust_remote_code=trust_remote_code
    )
    name = Path(recipe).stem
    folder = out or Path("artifacts") / f"{model_name}-{name}"
    return run_passes([(name, loaded, folder)], source, target, force, progress, memory, restart)[0]


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
    restart: bool = False,
) -> Results:
    """Quantize every recipe of a suite, bench every artifact beside the baseline, write the report.

    A run that did not end is gone on with, unless `restart` is set; artifacts that it made are not made again.
    Artifacts go to OUT/artifacts/LABEL, results to OUT/results.json, the report beside it: report.md, report.html and
    report.json, and plots/.
    """
    with collecting_later():
        from quantkit import report
        from quantkit.bench.runner import bench
        from quantkit.card import fill_card
        from quantkit.device import resolve_device
        from quantkit.gates.judge import judge, warnings
        from quantkit.memory import memory_limit
        from quantkit.output import check_file, check_folder, write_results
        from quantkit.recipe import load_suite, suite_recipes

    loaded = load_suite(suite, settings)
    folder = out or Path("reports") / loaded.name
    check_folder(folder)
    check_file(folder / "results.json", force=True)
    memory = memory_limit(max_memory)
    target = resolve_device(device)
    source, _ = open_model(model, loaded.model.id, loaded.model.revision, suite)
    pairs = suite_recipes(loaded)
    outs = [(label, recipe, folder / "artifacts" / _file_name(label)) for label, recipe in pairs]
    with collecting_only_new(), passes(outs, source, target, force, progress, memory, restart):
        results = bench(
            [path for _, _, path in outs],
            baseline=model or str(loaded.model.id),
            sections=loaded.bench,
            name=loaded.name,
            device=target.type,
            progress=progress,
            labels=[label for label, _, _ in outs],
        )
        results = results.model_copy(update={"gates": judge(results, loaded.gates)})
        write_results(folder / "results.json", (results.model_dump_json(indent=2) + "\n").encode())
        report.rebuild([folder / "results.json"], folder)
        for path in (path for _, _, path in outs):
            fill_card(path, results)
    for warning in warnings(results.gates):
        progress.say(warning)
    return results


def open_model(
    given: str | None, recipe_model: str | None, revision: str, recipe: str, *, trust_remote_code: bool = False
) -> tuple[Source, str]:
    """The model that the command line or the recipe names, and a short name for it. Raises UsageError for neither."""
    from quantkit.model.reader import open_source

    chosen = named_model(given, recipe_model, recipe)
    source = open_source(chosen, revision=revision, trust_remote_code=trust_remote_code)
    return source, _file_name(Path(chosen.rstrip("/")).name.removesuffix(".gguf"))


def named_model(given: str | None, recipe_model: str | None, recipe: str) -> str:
    """The model that the command line or the recipe names. Raises UsageError for neither."""
    chosen = given or recipe_model
    if chosen is None:
        raise UsageError(
            f"{recipe}: no model: neither model.id in the recipe nor --model on the command line",
            hint="--model DIR, --model FILE.gguf or --model OWNER/NAME",
        )
    return chosen


def _file_name(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", label).strip("-.") or "model"


@collecting_only_new()
def run_passes(
    wanted: Sequence[tuple[str, Recipe, Path]],
    source: Source,
    device: torch.device,
    force: bool,
    progress: Progress,
    memory: MemoryLimit = NO_LIMIT,
    restart: bool = False,
) -> list[Manifest]:
    """Check every job, then make the artifacts: one pass over the model for each calibration set."""
    with passes(wanted, source, device, force, progress, memory, restart) as manifests:
        return manifests


@contextmanager
def passes(
    wanted: Sequence[tuple[str, Recipe, Path]],
    source: Source,
    device: torch.device,
    force: bool,
    progress: Progress,
    memory: MemoryLimit,
    restart: bool,
) -> Iterator[list[Manifest]]:
    """The artifacts of all jobs for as long as the block runs: while it has not ended, the same command goes on."""
    from quantkit.checkpoint import Checkpoints
    from quantkit.given import given
    from quantkit.interrupts import may_be_left
    from quantkit.job_checks import checked
    from quantkit.output import check_output, check_space
    from quantkit.pipeline import quantize as run_pass
    from quantkit.place import refuse_conflicts
    from quantkit.unfinished import unfinished

    jobs = checked(wanted, source, force=force, progress=progress)
    Thread(target=_hash_ahead, args=(source,), daemon=True).start()
    made: dict[str, Manifest] = {}
    with unfinished([job.out for job in jobs.all], given(jobs.all, source, device), restart=restart) as work:
        places = {job.label: place for job, place in zip(jobs.all, work.places, strict=True)}
        planned = []
        for index, (section, together) in enumerate(_passes(jobs.all)):
            checkpoints = Checkpoints(work, index, [places[job.label] for job in together])
            planned.append((section, together, checkpoints))
            if not checkpoints.finished:
                for job in together:
                    check_output(job.out, force=force)
                    refuse_conflicts(job.out, jobs.names.get(job.label, ()))
        check_space(jobs.all[0].out, jobs.needed_bytes - work.held_bytes())
        for note in source.notes:
            progress.say(f"source: {note}")
        with may_be_left(work.last_words):
            for section, together, checkpoints in planned:
                if checkpoints.finished:
                    manifests = checkpoints.publish()
                else:
                    calibration = None if section is None else _calibration(section, source, progress)
                    manifests = run_pass(together, source, calibration, device, progress, checkpoints, memory)
                made |= {job.label: manifest for job, manifest in zip(together, manifests, strict=True)}
        yield [made[job.label] for job in jobs.all]


def _calibration(section: CalibrationSection, source: Source, progress: Progress) -> CalibrationSet:
    """The token ids of a pass, which the model has embeddings for."""
    from quantkit.model.calibration import load_calibration
    from quantkit.model.config_fit import check_ids_fit

    progress.say(f"calibration: {section.set}, {section.sequences} x {section.length} tokens")
    found = load_calibration(section, source.tokenizer_folder(), trust_remote_code=source.trust_remote_code)
    check_ids_fit(source, found.ids)
    return found


def _hash_ahead(source: Source) -> None:
    """Hash a model's files while it is quantized; the manifest asks for it at the end, and meets what goes wrong."""
    with suppress(OSError, ModelError):
        source.lineage()


def _passes(jobs: Sequence[Job]) -> list[tuple[CalibrationSection | None, list[Job]]]:
    """Jobs that go through the model together: those of one calibration set; uncalibrated ones join the first."""
    groups: dict[str, tuple[CalibrationSection | None, list[Job]]] = {}
    plain = []
    for job in jobs:
        if not job.calibrated:
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
