"""What the smaller verbs do: bench, compare, recipes validate, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quantkit.errors import DataError, ModelError, RecipeError
from quantkit.output import check_file, check_results, write_results
from quantkit.progress import Progress
from quantkit.shipped import header_comment
from quantkit.validation import suggestion

if TYPE_CHECKING:
    from quantkit.bench.measurement import Results
    from quantkit.reference.results import ComparisonResults
    from quantkit.sections import AnyBench


def bench(
    artifacts: Sequence[Path],
    *,
    baseline: str,
    recipe: str | None,
    out: Path | None,
    device: str,
    force: bool,
    progress: Progress,
) -> Results:
    """Measure artifacts beside their baseline, and write the results to `out` when it is given.

    recipe: name or file of the recipe or suite whose `bench` section says what to measure; None is everything that
    needs no network. Raises, before anything is read or runs, UsageError when `out` cannot be written or exists
    without `force`, ModelError when an artifact is missing.
    """
    missing = [str(path) for path in artifacts if not path.exists()]
    if missing:
        raise ModelError("\n".join(f"{path}: no such artifact" for path in missing), hint="quantkit quantize makes one")
    if out is not None:
        check_results(out, force=force)
    sections, name = _bench_sections(recipe)

    from quantkit.bench.runner import bench as measure
    from quantkit.device import resolve_device

    results = measure(
        list(artifacts),
        baseline=baseline,
        sections=sections,
        name=name,
        device=resolve_device(device).type,
        progress=progress,
    )
    if out is not None:
        write_results(out, (results.model_dump_json(indent=2) + "\n").encode())
    return results


def compare(
    recipes: Sequence[str],
    *,
    engines: str | None,
    model: str | None,
    settings: Sequence[str],
    runs: int,
    out: Path | None,
    timeout_s: float,
    max_memory: str | None,
    device: str,
    force: bool,
    progress: Progress,
) -> ComparisonResults:
    """Give a recipe's job to several engines, and write the figures to `out` when it is given.

    engines: names with commas between them; None is every engine that does the method. max_memory: a size under which
    quantkit's rows run once more. Raises UsageError, before
    anything is read or runs, when `out` cannot be written or exists without `force`.
    """
    if out is not None:
        check_results(out, force=force)

    from quantkit.memory import memory_limit
    from quantkit.reference.compare import compare as measure

    results = measure(
        recipes,
        engines=None if engines is None else [name.strip() for name in engines.split(",") if name.strip()],
        model=model,
        settings=settings,
        runs=runs,
        timeout_s=timeout_s,
        limit_bytes=memory_limit(max_memory).limit_bytes,
        device=device,
        progress=progress,
    )
    if out is not None:
        write_results(out, (results.model_dump_json(indent=2) + "\n").encode())
    return results


def _bench_sections(recipe: str | None) -> tuple[Sequence[AnyBench], str]:
    from quantkit.recipe import load_any
    from quantkit.sections import AccuracyBench, DivergenceBench, MemoryBench, Suite, ThroughputBench

    everything = (MemoryBench(), ThroughputBench(), DivergenceBench(), AccuracyBench())
    if recipe is None:
        return everything, "bench"
    loaded = load_any(recipe)
    if not loaded.bench:
        raise RecipeError(f"{recipe}: bench: empty, nothing to measure", hint="leave --recipe out for all of it")
    return loaded.bench, loaded.name if isinstance(loaded, Suite) else Path(recipe).stem


def validate(files: Sequence[str]) -> list[str]:
    """The files, all of them valid. Raises RecipeError with every problem of every file."""
    from quantkit.recipe import HINT, validate_file

    problems = [line for file in files for line in validate_file(file)]
    if problems:
        raise RecipeError.from_problems(problems, HINT)
    return list(files)


def calibration_sets() -> list[tuple[str, str]]:
    """Name and description of every calibration set that ships."""
    from quantkit.model.calibration_sets import list_definitions

    return [(name, header_comment(path.read_text())) for name, path in list_definitions().items()]


def calibration_text(name: str) -> str:
    """The definition of a calibration set as it was written. Raises DataError with the names there are."""
    from quantkit.model.calibration_sets import list_definitions

    known = list_definitions()
    if name not in known:
        raise DataError(f'"{name}": no calibration set of that name; {suggestion(name, known)}')
    return known[name].read_text()


def build_calibration(
    name: str,
    model: str,
    sequences: int,
    length: int,
    seed: int,
    part: Literal["calibration", "evaluation"],
    out: Path,
    *,
    force: bool,
) -> str:
    """Tokenize and pack a set with a model's tokenizer, and write it as JSON. Returns the fingerprint of the ids."""
    from quantkit.model.calibration import build
    from quantkit.model.reader import open_source

    check_file(out, force=force)
    return build(name, open_source(model).tokenizer_folder(), out, sequences, length, seed, part).fingerprint
