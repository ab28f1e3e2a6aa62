"""A comparison as a document: what each engine took, what it gave, who could not do the job, and the floor."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from quantkit.errors import DataError
from quantkit.reference.results import COMPARISON_SCHEMA_VERSION, ComparisonResults, EngineRow, Figure, Floor
from quantkit.report.layout import Document, Listing, TextTable

NOTHING = "-"


def document(results: ComparisonResults) -> Document:
    """The tables and notes of one comparison, for the terminal and for Markdown."""
    done = [row for row in results.rows if row.runs]
    parts: list[TextTable | Listing] = []
    if done:
        parts += [_cost(results, done), _outcome(results, done)]
    reasons = [f"{row.label}: {row.reason}" for row in results.rows if row.reason]
    if reasons:
        parts.append(Listing("What did not work", reasons))
    if results.floor is not None:
        parts.append(Listing("The floor", _floor(results.floor, done)))
    return Document(f"{results.name}: {results.job}, {results.model}", _lead(results), parts)


def show(results: ComparisonResults) -> None:
    """Print a comparison on stdout."""
    from quantkit.report.screen import show_documents

    show_documents([document(results)])


def load(path: Path) -> ComparisonResults:
    """Read what `compare --out` wrote. Raises DataError when it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != COMPARISON_SCHEMA_VERSION:
            raise DataError(f"{path}: schema_version is {version}; expected {COMPARISON_SCHEMA_VERSION}")
        return ComparisonResults.model_validate(content)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", hint="give what `quantkit compare --out` wrote") from error
    except ValidationError as error:
        raise DataError(f"{path}: not a comparison: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def _lead(results: ComparisonResults) -> list[str]:
    machine = results.environment
    settings = results.settings
    recipe, evaluation = settings["recipe"], settings["evaluation"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, {machine.get('gpu', 'no GPU')}; "
        f"Python {machine['python']}, torch {machine['packages']['torch']}; {results.created[:10]}"
    ]
    if settings["calibration"]:
        # the first recipe need not be the one that calibrates; older files leave the numbers to it
        used = recipe["calibration"] | settings["calibration"]
        lines.append(f"calibrated on {used['sequences']} x {used['length']} tokens of {used['set']}")
    lines.append(
        f"quality: weights decoded to one dtype, on {evaluation['sequences']} x {evaluation['length']} tokens of "
        f"{evaluation['set']}; the unquantized model's perplexity is {_figure(results.baseline_perplexity, 2)}"
    )
    runs = settings["runs"]
    spread = f"medians of {runs} runs, lowest to highest in brackets" if runs > 1 else "one run"
    lines.append(f"{spread}; each a fresh process, one after another; ± is one standard error")
    return [*lines, *results.model_notes]


def _cost(results: ComparisonResults, rows: list[EngineRow]) -> TextTable:
    headers = ["engine", "quantize s", "load to save s", "process s", "CPU s", "peak RSS MB", "process vs first row"]
    vram = any(row.spread("peak_vram_bytes") for row in rows)
    if vram:
        headers.append("peak VRAM MB")
    first = rows[0].spread("wall_s")
    assert first is not None, "a row that ran has a time"
    lines = []
    for row in rows:
        wall = row.spread("wall_s")
        assert wall is not None
        line = [row.label, *(_seconds(row, name) for name in ("quantize_s", "folder_s", "wall_s", "cpu_s"))]
        line += [_megabytes(row, "peak_rss_bytes"), f"{wall[0] / first[0]:.2f}×"]
        lines.append([*line, _megabytes(row, "peak_vram_bytes")] if vram else line)
    return TextTable("What it took", headers, lines)


def _outcome(results: ComparisonResults, rows: list[EngineRow]) -> TextTable:
    headers = ["engine", "format", "MB", "bits/weight", "perplexity", "KL nats", "top-1 %"]
    lines = []
    for row in rows:
        size = NOTHING if row.bytes is None else f"{row.bytes / 1e6:.1f}"
        bits = NOTHING if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}"
        quality = [_figure(row.perplexity, 2), _figure(row.kl, 4), _figure(row.top1, 1, 100)]
        lines.append([row.label, row.format or NOTHING, size, bits, *quality])
    return TextTable("What it gave", headers, lines, frozenset({0, 1}))


def _floor(floor: Floor, rows: list[EngineRow]) -> list[str]:
    lines = [
        f"float32 products run at {floor.gemm_flop_per_s / 1e9:.0f} GFLOP/s here",
        f"one pass, every linear once: {floor.one_pass_flop / 1e12:.2f} TFLOP, {floor.one_pass_s:.1f} s",
        "two passes, once for the statistics and once quantized: "
        f"{floor.two_pass_flop / 1e12:.2f} TFLOP, {floor.two_pass_s:.1f} s",
    ]
    for row in rows:
        seconds = row.spread("quantize_s")
        if seconds is not None:
            one, two = seconds[0] / floor.one_pass_s, seconds[0] / floor.two_pass_s
            lines.append(f"{row.label}: {one:.2f} times the floor of one pass, {two:.2f} times that of two")
    return lines


def _seconds(row: EngineRow, name: str) -> str:
    found = row.spread(name)
    if found is None:
        return NOTHING
    middle, low, high = found
    return f"{middle:.1f}" if len(row.runs) == 1 else f"{middle:.1f} ({low:.1f}-{high:.1f})"


def _megabytes(row: EngineRow, name: str) -> str:
    found = row.spread(name)
    return NOTHING if found is None else f"{found[0] / 1e6:.0f}"


def _figure(figure: Figure | None, digits: int, factor: float = 1.0) -> str:
    if figure is None:
        return NOTHING
    error = "" if figure.error is None else f" ±{figure.error * factor:.{digits}f}"
    return f"{figure.value * factor:.{digits}f}{error}"
