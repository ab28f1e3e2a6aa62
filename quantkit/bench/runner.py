"""Bench: fresh processes for the baseline and for each artifact, one after another, into one Results."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.bench import rounds
from quantkit.bench.measurement import Layer, Results, Row
from quantkit.bench.process import WorkerFailed, run_worker
from quantkit.bench.unmeasured import missing
from quantkit.bench.worker import Answer, Job
from quantkit.errors import ModelError
from quantkit.progress import Progress, Tracker
from quantkit.sections import AccuracyBench, AnyBench, CalibrationSection, DivergenceBench, SpeculativeBench

if TYPE_CHECKING:
    from quantkit.model.source import Source

TIMEOUT_S = 6 * 3600.0
"""A worker that takes longer has stopped answering: a full run of stock tasks on a CPU takes a few hours."""

DTYPE_LABELS = {"float16": "FP16", "bfloat16": "BF16", "float32": "FP32"}


def bench(
    artifacts: Sequence[Path],
    *,
    baseline: str,
    sections: Sequence[AnyBench],
    name: str,
    device: str,
    progress: Progress,
    labels: Sequence[str] | None = None,
    model_notes: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
) -> Results:
    """Measure a baseline (folder, .gguf file or hub id) and artifacts by it; a measurement that fails says why.

    labels: of the rows, the artifacts' names when None. model_notes: beside those of the model's source. What can be
    wrong with models, texts, tasks and files is checked before the first process starts. Raises UsageError, ModelError,
    DataError.
    """
    import torch

    from quantkit.environment import environment
    from quantkit.formats import open_artifact
    from quantkit.model.blocks import context_length
    from quantkit.model.reader import open_source

    source = open_source(baseline)
    for path in artifacts:
        _same_model(path, open_artifact(path).config, source.config)
    tokenizer = source.tokenizer_folder()
    _check_tasks(sections)
    sections = _within(sections, context_length(source.config), progress)
    with tempfile.TemporaryDirectory(prefix="quantkit-bench-") as folder:
        scratch = Path(folder)
        texts = _write_texts(sections, tokenizer, scratch)
        common: dict[str, Any] = {
            "sections": tuple(sections),
            "device": device,
            "threads": torch.get_num_threads(),
            "scratch": folder,
            "tokenizer_folder": str(tokenizer.absolute()),
            "baseline": str(source.path.absolute()),
        }
        # a hub id has been fetched by now; its folder is what the worker opens
        jobs = [Job(kind="baseline", path=str(source.path.absolute()), **common)]
        shown = ["baseline", *(labels or [path.name for path in artifacts])]
        first = _measure(jobs[0], shown[0], progress, timeout_s)
        # the baseline has fetched what there is to fetch
        offline = "accuracy" in first.seconds
        jobs += [Job(kind="artifact", path=str(path.absolute()), offline=offline, **common) for path in artifacts]
        answers = [first]
        answers += [_measure(job, label, progress, timeout_s) for job, label in zip(jobs[1:], shown[1:], strict=True)]
        base, *others = _further_rounds(jobs, shown, answers, progress, timeout_s)
    row = Row(
        label=_dtype_label(source),
        notes=[*source.notes, *base.notes],
        measurements=base.measurements,
        samples=base.samples,
    )
    rows = [_row(path, label, answer) for path, label, answer in zip(artifacts, shown[1:], others, strict=True)]
    return Results(
        name=name,
        model=_model_name(baseline),
        model_notes=list(dict.fromkeys([*source.notes, *model_notes])),
        baseline=row,
        rows=rows,
        settings={"bench": [section.model_dump(mode="json") for section in sections], "texts": texts},
        environment=environment(device),
    )


def _measure(job: Job, label: str, progress: Progress, timeout_s: float) -> Answer:
    """The answer of a worker. An artifact whose engine ends the process is measured again on decoded weights.

    When there is no answer at all, every measurement is missing with the reason.
    """
    with progress.task(f"bench {label}", len(job.sections) + 1) as tracker:
        started = time.monotonic()
        try:
            answer = run_worker(job, timeout_s, tracker)
        except WorkerFailed as error:
            progress.say(f"bench {label}: {error}")
            answer = _second_try(job, str(error), timeout_s, tracker)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in answer.seconds.items())
        total = time.monotonic() - started
        progress.say(f"bench {label}: {stages or 'nothing measured'}; process {total:.1f} s")
    return answer


def _further_rounds(
    jobs: Sequence[Job], labels: Sequence[str], answers: Sequence[Answer], progress: Progress, timeout_s: float
) -> list[Answer]:
    """The answers with speed and memory measured in further processes; the models take turns, so that what else the
    machine does meanwhile meets all of them."""
    sections = rounds.of_the_machine(jobs[0].sections)
    later: list[list[Answer | str]] = [[] for _ in jobs]
    for number in range(2, rounds.wanted(sections) + 1):
        for job, label, answer, found in zip(jobs, labels, answers, later, strict=True):
            if not rounds.timed(answer):
                continue
            again = job.model_copy(update={"sections": sections})
            with progress.task(f"bench {label}, round {number}", len(sections) + 1) as tracker:
                try:
                    found.append(run_worker(again, timeout_s, tracker))
                except WorkerFailed as error:
                    progress.say(f"bench {label}, round {number}: {error}")
                    found.append(str(error))
    return [rounds.merged(answer, found) for answer, found in zip(answers, later, strict=True)]


def _second_try(job: Job, reason: str, timeout_s: float, tracker: Tracker) -> Answer:
    failed = Answer(measurements=missing(job.sections, reason), notes=[reason])
    if job.kind == "baseline" or job.without_engine is not None:
        return failed
    try:
        again = run_worker(job.model_copy(update={"without_engine": reason}), timeout_s, tracker)
    except WorkerFailed:
        return failed
    note = f"the engine failed, so quality is that of decoded weights: {reason}"
    return again.model_copy(update={"notes": [*again.notes, note]})


def _row(path: Path, label: str, answer: Answer) -> Row:
    """The row of an artifact: what was measured, and what its manifest tells."""
    from quantkit.formats import open_artifact
    from quantkit.inspection import method_label
    from quantkit.manifest import read_manifest

    manifest = read_manifest(path)
    opened = open_artifact(path)
    return Row(
        label=label,
        artifact=path.name,
        method=manifest.method if manifest else method_label(opened.quantization),
        method_name=manifest.method_name if manifest else None,
        format=opened.format_name,
        quantize_s=manifest.quantize_s if manifest else None,
        fallbacks=manifest.fallbacks() if manifest else [],
        notes=answer.notes,
        recipe=manifest.recipe if manifest else None,
        layers=[Layer(**record.model_dump(include=set(Layer.model_fields))) for record in manifest.tensors]
        if manifest
        else [],
        measurements=answer.measurements,
        samples=answer.samples,
    )


def _same_model(path: Path, config: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    """Refuse an artifact of another model. Raises ModelError."""
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if config.get(key) != reference.get(key):
            raise ModelError(
                f"{path}: {key} is {config.get(key)}, that of the baseline {reference.get(key)}: not made from it",
                hint="give --baseline the model that the artifact was made from; `quantkit inspect` names it",
            )


def _check_tasks(sections: Sequence[AnyBench]) -> None:
    from quantkit.bench.tasks import check_tasks

    for section in sections:
        if isinstance(section, AccuracyBench):
            check_tasks(section.tasks, section.data)


def _within(sections: Sequence[AnyBench], context: int | None, progress: Progress) -> list[AnyBench]:
    """The sections with texts no longer than the model has positions for."""
    found: list[AnyBench] = []
    for section in sections:
        if isinstance(section, DivergenceBench) and context and section.length > context:
            progress.say(f"bench.divergence.length: {context} instead of {section.length}, all the model's positions")
            section = section.model_copy(update={"length": context})
        found.append(section)
    return found


def _write_texts(sections: Sequence[AnyBench], tokenizer: Path, scratch: Path) -> list[dict[str, Any]]:
    """Leave the token ids of every section that reads text in the scratch folder, and say which they are."""
    import numpy as np

    from quantkit.bench.divergence import ids_path
    from quantkit.model.calibration import load_calibration

    texts: list[dict[str, Any]] = []
    for section in sections:
        if isinstance(section, DivergenceBench):
            wanted = CalibrationSection(set=section.set, sequences=section.sequences, length=section.length)
        elif isinstance(section, SpeculativeBench):
            wanted = CalibrationSection(set=section.set, sequences=section.prompts, length=section.prompt_tokens)
        else:
            continue
        text = load_calibration(wanted, tokenizer, "evaluation")
        np.save(ids_path(scratch, section), text.ids.numpy())
        texts.append({"set": text.name, "part": text.part, "fingerprint": text.fingerprint})
    return texts


def _dtype_label(source: Source) -> str:
    """What the weights of the baseline are stored in, such as "FP16"."""
    names = [name for name in source.names() if len(source.shape(name)) == 2]
    dtype = str(Counter(source.dtype(name) for name in names).most_common(1)[0][0]).removeprefix("torch.")
    return DTYPE_LABELS.get(dtype, dtype)


def _model_name(baseline: str) -> str:
    """A short name of the model: the last part of a path, the whole of a hub id."""
    path = Path(baseline).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else baseline
