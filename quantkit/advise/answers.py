"""From candidates to answers: for each complaint the order that its rule names, and the reasons in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from quantkit.advise.candidates import Candidate, Measured, candidates, result_files
from quantkit.advise.rules import Criterion, Problem, Rules, load_rules
from quantkit.errors import UsageError
from quantkit.memory import parse_bytes
from quantkit.model.blocks import context_length
from quantkit.model.source import Source
from quantkit.schema import Frozen

ADVICE_SCHEMA_VERSION = 1
SHOWN = 3

ProblemName = Literal["first-token", "per-token", "memory", "throughput"]


class Answer(Frozen):
    """What to do about one complaint."""

    problem: str
    question: str
    why: str
    recipes: tuple[str, ...] = Field(description="the best first; empty when nothing fits")
    reasons: tuple[str, ...] = Field(description="why the first one")
    also: tuple[str, ...] = Field(description="what helps without another recipe")


class Advice(Frozen):
    """The document of `quantkit advise --json`."""

    schema_version: int = ADVICE_SCHEMA_VERSION
    memory_bytes: int
    context: int
    model: str | None
    engine: str | None
    answers: tuple[Answer, ...]
    candidates: tuple[Candidate, ...]
    left_out: dict[str, str] = Field(description="recipe -> why it was not considered")
    notes: tuple[str, ...]


def advise(
    memory: str,
    *,
    model: str | None = None,
    engine: str | None = None,
    problem: ProblemName | None = None,
    context: int | None = None,
    results: Path | None = None,
) -> Advice:
    """Answer one complaint, or all four, for a machine with that much memory.

    memory: such as "6GB". model: whose bytes are counted; without it the answer is how large a model may be. results: a
    folder with results.json files; what they measured goes before arithmetic. Raises UsageError, DataError, ModelError.
    """
    rules = load_rules()
    size = parse_bytes(memory, "--memory")
    if size <= 0:
        raise UsageError(f'--memory: found "{memory}", expected more than nothing')
    if engine is not None:
        rules.engine(engine)
    files = [] if results is None else result_files(results)
    source = _open(model)
    longest = None if source is None else context_length(source.config)
    tokens = context or min(rules.context, longest or rules.context)
    found, left_out = candidates(size, rules, source=source, engine=engine, context=tokens, results=files)
    wanted = rules.problems if problem is None else {problem: rules.problems[problem]}
    return Advice(
        memory_bytes=size,
        context=tokens,
        model=model,
        engine=engine,
        answers=tuple(answer(name, rule, found, rules, engine) for name, rule in wanted.items()),
        candidates=tuple(found),
        left_out=left_out,
        notes=tuple(_notes(rules, source, tokens)),
    )


def _open(model: str | None) -> Source | None:
    if model is None:
        return None
    from quantkit.model.reader import open_source

    return open_source(model)


def answer(name: str, rule: Problem, found: Sequence[Candidate], rules: Rules, engine: str | None) -> Answer:
    """The candidates that fit, in the order of one complaint's rule."""
    fitting = [candidate for candidate in found if candidate.fits is not False]
    if name == "throughput" and engine is None:
        served = {form for known in rules.engines.values() if known.serves for form in known.formats}
        fitting = [candidate for candidate in fitting if candidate.format is None or candidate.format in served]
    ordered = sorted(
        fitting, key=lambda candidate: tuple(_rank(candidate, criterion, rules) for criterion in rule.order)
    )
    reasons = _reasons(name, ordered[0], rules) if ordered else [_short(found)]
    return Answer(
        problem=name,
        question=rule.question,
        why=rule.why,
        recipes=tuple(candidate.recipe for candidate in ordered[:SHOWN]),
        reasons=tuple(reasons),
        also=rule.also,
    )


def _rank(candidate: Candidate, criterion: Criterion, rules: Rules) -> float:
    """Where a candidate stands by one criterion, the least first."""
    bits, size = candidate.bits_per_weight, candidate.weight_bytes
    match criterion:
        case "quality":
            # KL of this very model goes before bits; another model's says nothing about this one
            known = [m.kl for m in candidate.measured if m.same_model and m.kl is not None]
            return min(known) if known else 0.0 if candidate.format is None else math.inf
        case "bits":
            # a tenth of a bit is a scale a group: no reason to prefer one method to another
            return -round(bits * 2) / 2
        case "usable":
            return 0.0 if bits >= rules.usable_bits else 1.0
        case "kernels":
            return 1.0 if candidate.format in rules.decoded_first else 0.0
        case "bytes":
            return bits if size is None else size
        case "decode":
            return -_speed(candidate, "decode_speedup", 16 / bits)
        case "prefill":
            # unmeasured, the codes have to be decoded on top of the same products: no faster than 16 bits
            return -_speed(candidate, "prefill_speedup", 1.0 if candidate.format is None else 0.99)
        case "sequences":
            return -(candidate.sequences or 0)
        case "calibrated":
            return 0.0 if candidate.calibrated else 1.0


def _speed(candidate: Candidate, name: str, expected: float) -> float:
    """The speed-up that was measured, the least of several; else what arithmetic expects."""
    measured = _values(candidate.measured, name)
    return min(measured) if measured else expected


def _values(measured: Sequence[Measured], name: str) -> list[float]:
    return [value for found in measured if (value := getattr(found, name)) is not None]


def _reasons(problem: str, best: Candidate, rules: Rules) -> list[str]:
    """Why the first candidate stands first, in numbers."""
    reasons = [f"{best.bits_per_weight:.2f} bits a weight in the quantized layers"]
    if best.needed_bytes is not None and best.weight_bytes is not None:
        cache = best.cache_bytes or 0
        rest = best.needed_bytes - best.weight_bytes - cache
        reasons.append(
            f"needs {_mb(best.needed_bytes)}: weights {_mb(best.weight_bytes)}, KV cache of one sequence {_mb(cache)}, "
            f"allowance for the engine {_mb(rest)}"
        )
        if problem == "throughput" and best.sequences is not None:
            reasons.append(f"the caches of {best.sequences} sequences fit beside the weights")
    else:
        reasons.append(f"up to {best.parameters_that_fit / 1e9:.1f}B parameters fit, before any KV cache")
    wanted = {"per-token": "decode_speedup", "first-token": "prefill_speedup"}.get(problem)
    told = False
    for measured in best.measured:
        facts = []
        if wanted and (value := getattr(measured, wanted)) is not None:
            facts.append(f"{wanted.removesuffix('_speedup')} at {value:.2f} times the baseline's speed")
            told = True
        if measured.kl is not None:
            facts.append(f"KL {measured.kl:.4f} nats")
        if measured.recovered is not None:
            facts.append(f"accuracy recovered {100 * measured.recovered:.1f}%")
        if facts:
            reasons.append(f"measured on {measured.where}: {', '.join(facts)}")
    if wanted and not told:
        reasons.append(
            "no speed of it was measured: by arithmetic alone; --results DIR takes measurements into account"
        )
    return reasons


def _short(found: Sequence[Candidate]) -> str:
    """How far the smallest candidate is from fitting."""
    sizes = [candidate for candidate in found if candidate.needed_bytes is not None]
    if not sizes:
        return "no shipped recipe makes what this engine reads"
    least = min(sizes, key=lambda candidate: candidate.needed_bytes or 0)
    return f"nothing fits: the smallest, {least.recipe}, needs {_mb(least.needed_bytes or 0)}"


def _mb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _notes(rules: Rules, source: Source | None, context: int) -> list[str]:
    overhead = rules.overhead
    notes = [
        f"the allowance for the engine is assumed, not measured: {100 * overhead.share:g}% of the weights and "
        f"{_mb(overhead.fixed_bytes)}"
    ]
    if source is None:
        notes.append("no model was named: sizes are per parameter, all of them quantized; --model counts the bytes")
    else:
        notes.append(f"KV cache: {context} tokens, {rules.cache_bytes_per_value} bytes a value")
    return notes
