"""`quantkit compare`: the same job for every engine, each run in a fresh process, one after another, and one table."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.bench.process import WorkerFailed
from quantkit.errors import QuantkitError, UsageError
from quantkit.progress import Progress, Tracker
from quantkit.recipe import DivergenceBench, load_recipe
from quantkit.reference.engines import OWN, REFERENCE_ENGINES, Request, chosen_engines
from quantkit.reference.entries import Entry, Setting, own_entry, reference_entry, request_of
from quantkit.reference.process import JobFailed, run_job
from quantkit.reference.results import ComparisonResults, EngineRow, Figure
from quantkit.reference.together import IDS_KEYS, check_engines, shared_sections
from quantkit.sections import CalibrationSection

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.reference.quality import Judge

EVALUATED = 16
"""Held-out sequences, each as long as those of the calibration, where no recipe has a divergence bench."""

FLOORED = ("gptq", "awq")
"""Methods whose time has a floor worth telling: the others do not calibrate."""


def compare(
    recipes: Sequence[str],
    *,
    engines: Sequence[str] | None,
    model: str | None,
    settings: Sequence[str],
    runs: int,
    timeout_s: float,
    limit_bytes: int | None = None,
    device: str,
    progress: Progress,
) -> ComparisonResults:
    """Give the job of the first recipe to every engine; quantkit also does the further recipes, each a row.

    engines: names; None is quantkit and every engine that does the method. runs: of each; the first one's artifact is
    measured. timeout_s: of one run. limit_bytes: quantkit does each recipe once more with at most so much memory, which
    is a row beside. All rows calibrate on the same token ids and are judged on the same text; a recipe
    that asks for others is refused. What an engine cannot do is a row with the reason. Raises RecipeError, UsageError,
    ModelError, DataError before anything runs.
    """
    import torch

    from quantkit.device import resolve_device
    from quantkit.engines.base import dtype_name, speed_dtype
    from quantkit.environment import environment
    from quantkit.jobs import open_model
    from quantkit.model.blocks import blocks_of
    from quantkit.model.calibration import load_calibration
    from quantkit.reference.floor import floor_of, gemm_flop_per_s

    loaded = [load_recipe(recipe, settings) for recipe in recipes]
    first = loaded[0]
    request = request_of(recipes[0], first)
    names = _names(engines, request)
    check_engines(recipes, names, limit_bytes)
    section, held_out = shared_sections(recipes, loaded, model)
    held_out = held_out or _held_out(first.calibration)
    target = resolve_device(device)
    source, model_name = open_model(model, first.model.id, first.model.revision, recipes[0])
    if source.kind != "safetensors" and set(names) != {"quantkit"}:
        raise UsageError(f"{source.path}: a {source.kind} model; the other engines read Hugging Face folders only")
    tokenizer = source.tokenizer_folder()
    wanted = CalibrationSection(set=held_out.set, sequences=held_out.sequences, length=held_out.length)
    text = load_calibration(wanted, tokenizer, "evaluation")
    calibration = load_calibration(section, tokenizer) if section is not None else None
    stored = source.dtype(f"{blocks_of(source)[0].linears[0]}.weight")
    with tempfile.TemporaryDirectory(prefix="quantkit-compare-") as folder:
        scratch = Path(folder)
        ids_file = None
        if calibration is not None:
            ids_file = scratch / "ids.json"
            ids_file.write_text(json.dumps({"fingerprint": calibration.fingerprint, "ids": calibration.ids.tolist()}))
        dtype = dtype_name(speed_dtype(target, stored))
        setting = Setting(source, first, ids_file, target, torch.get_num_threads(), dtype)
        entries = []
        for name in names:
            if name == OWN:
                limits = [None] if limit_bytes is None else [None, limit_bytes]
                for file, one in zip(recipes, loaded, strict=True):
                    entries += [own_entry(setting, one, Path(file).stem, limit) for limit in limits]
            else:
                entries.append(reference_entry(setting, REFERENCE_ENGINES[name], request, progress))
        load_average = os.getloadavg()
        # before and after: the better rate is that of the machine, the other of what else ran on it
        floored = calibration is not None and request.method in FLOORED
        rates = [gemm_flop_per_s(target)] if floored else []
        _run_all(entries, runs, timeout_s, scratch, progress)
        floor = None
        if calibration is not None and floored:
            rate = max(*rates, gemm_flop_per_s(target))
            floor = floor_of(source, len(calibration.ids), calibration.ids.shape[1], rate)
        rows, baseline = _judge(entries, setting, held_out, text.ids, scratch, progress)
    asked = section.model_dump(mode="json", include={*IDS_KEYS}) if section is not None else {}
    return ComparisonResults(
        name=Path(recipes[0]).stem,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model_name,
        model_notes=list(source.notes),
        job=first.method.label(),
        rows=rows,
        baseline_perplexity=baseline,
        floor=floor,
        settings={
            "recipe": first.model_dump(mode="json"),
            "calibration": calibration and {**asked, "set": calibration.name, "fingerprint": calibration.fingerprint},
            "evaluation": {**held_out.model_dump(mode="json"), "set": text.name, "fingerprint": text.fingerprint},
            "runs": runs,
            "timeout_s": timeout_s,
            "load_average_before": list(load_average),
        },
        environment=environment(target.type),
    )


def _names(engines: Sequence[str] | None, request: Request) -> list[str]:
    if engines is not None:
        return chosen_engines(engines)
    able = [name for name, one in REFERENCE_ENGINES.items() if request.method in one.methods()]
    return [OWN, *able]


def _held_out(calibration: CalibrationSection) -> DivergenceBench:
    """The held-out part of a calibration set, for recipes that name no text to judge by."""
    return DivergenceBench(set=calibration.set, sequences=EVALUATED, length=calibration.length)


def _run_all(entries: Sequence[Entry], runs: int, timeout_s: float, scratch: Path, progress: Progress) -> None:
    """Every engine once, then every engine again: what changes on the machine meanwhile meets them all."""
    for run in range(1, runs + 1):
        for index, entry in enumerate(entries):
            if entry.reason is not None:
                continue
            folder = scratch / f"{index}-{run}"
            folder.mkdir()
            with progress.task(f"{entry.label}: run {run} of {runs}", 0) as tracker:
                failure = _run_once(entry, folder, timeout_s, tracker)
            if failure is not None:
                # figures of earlier runs stand, and say beside them that a later one failed
                entry.reason = failure if run == 1 else f"run {run}: {failure}"
                progress.say(f"{entry.label}: {entry.reason}")
            if run > 1:
                shutil.rmtree(folder, ignore_errors=True)


def _run_once(entry: Entry, folder: Path, timeout_s: float, tracker: Tracker) -> str | None:
    """Run an entry and note what it took. Returns why it failed, None when it did not."""
    job = {**entry.job, "out": str(folder / "out")}
    try:
        done = run_job(entry.command, job, folder, timeout_s, tracker, entry.environment)
    except JobFailed as error:
        return str(error)
    entry.runs.append(done.cost)
    entry.versions = done.versions
    return None


def _judge(
    entries: Sequence[Entry], setting: Setting, section: DivergenceBench, ids: Tensor, scratch: Path, progress: Progress
) -> tuple[list[EngineRow], Figure | None]:
    """The finished rows, and the perplexity of the unquantized model. Artifacts are deleted as they are measured."""
    from quantkit.reference.quality import Judge

    judge, unjudged = None, ""
    rows = []
    with progress.task("quality on held-out text", len(entries) + 1) as tracker:
        if any(entry.runs for entry in entries):
            try:
                judge = Judge(setting.source, section, ids, setting.device.type, scratch)
            except WorkerFailed as error:
                unjudged = f"the unquantized model cannot be measured: {error}"
        tracker.advance(note="the unquantized model")
        for index, entry in enumerate(entries):
            rows.append(_row(entry, scratch / f"{index}-1", judge, unjudged))
            tracker.advance(note=entry.engine)
    return rows, judge.baseline if judge is not None else None


def _row(entry: Entry, folder: Path, judge: Judge | None, unjudged: str) -> EngineRow:
    """A finished row. judge: None when the artifact's quality cannot be measured, and `unjudged` says why."""
    from quantkit.reference.quality import what_was_written

    found: dict[str, Any] = {}
    reasons = [entry.reason] if entry.reason else []
    if entry.runs:
        try:
            found = what_was_written(folder / "out")
            if judge is None:
                reasons.append(unjudged)
            else:
                found |= judge.measure(folder / "out")
        except (QuantkitError, WorkerFailed) as error:
            reasons.append(f"its artifact cannot be measured: {error}")
        shutil.rmtree(folder, ignore_errors=True)
    return EngineRow(
        engine=entry.engine,
        label=entry.label,
        settings=entry.settings,
        versions=entry.versions,
        reason="; ".join(reasons) or None,
        runs=entry.runs,
        **found,
    )
