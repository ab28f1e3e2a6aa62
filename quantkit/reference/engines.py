"""The reference engines, as data: what each is, what its environment holds, and which jobs it can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.validation import suggestion

PINS = Path(__file__).parent / "pins"
WORKER = Path(__file__).parent / "worker.py"


@dataclass(frozen=True)
class Ability:
    """Jobs of one method that an engine does. group_sizes: None where any is possible."""

    method: str
    bits: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = (True, False)
    group_sizes: tuple[int | None, ...] | None = None

    def covers(self, request: Request) -> bool:
        """Whether a request of this method is among them."""
        bits = request.bits is None or request.bits in self.bits
        symmetric = request.symmetric is None or request.symmetric in self.symmetric
        return bits and symmetric and (self.group_sizes is None or request.group_size in self.group_sizes)


@dataclass(frozen=True)
class Request:
    """The part of a job that decides whether an engine can do it.

    bits, symmetric: None for methods without. group_size: columns a scale, or values a block; None for whole rows.
    """

    method: str
    bits: int | None
    symmetric: bool | None
    group_size: int | None

    def __str__(self) -> str:
        bits = "" if self.bits is None else f" {self.bits}-bit"
        size = f" g{self.group_size}" if self.group_size else " row" if self.bits else ""
        symmetry = {True: " sym", False: " asym", None: ""}[self.symmetric]
        return f"{self.method}{bits}{size}{symmetry}"


@dataclass(frozen=True)
class ReferenceEngine:
    """One engine.

    name: what a user calls it. version: of the engine. pins: file with every package of its environment, pinned; None
    runs it in quantkit's own. python: lowest and highest minor version of Python 3. options: keys for its worker beyond
    those of every job. dtypes: what it has to compute in for a method, where it refuses the fastest. notes: what a
    reader of the table must know of how it is run, by method. needs_gpu: why it cannot run without one, None when it
    can. prime: a line of Python that its new environment runs once, for what it would otherwise compile within its
    first job. build: packages that have to be there before the others, because they are built from source with them.
    """

    name: str
    version: str
    abilities: tuple[Ability, ...]
    pins: str | None = None
    python: tuple[int, int] = (11, 13)
    options: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    needs_gpu: str | None = None
    prime: str | None = None
    build: tuple[str, ...] = ()
    worker: Path = WORKER

    @cached_property
    def requirements(self) -> str:
        """The pinned list; empty for quantkit's own environment."""
        return (PINS / self.pins).read_text() if self.pins else ""

    def refuses(self, request: Request, *, gpu: bool) -> str | None:
        """Why it cannot do a job here, None when it can."""
        fitting = [ability for ability in self.abilities if ability.method == request.method]
        if not any(ability.covers(request) for ability in fitting):
            return f"{self.name} does not do {request if fitting else request.method}"
        return None if gpu else self.needs_gpu

    def methods(self) -> set[str]:
        """Names of the methods that it does."""
        return {ability.method for ability in self.abilities}

    def note(self, method: str) -> str:
        """How it is run for a method, beyond what the job says; empty when there is nothing to say."""
        return self.notes.get(method, "")


_ENGINES = (
    ReferenceEngine(
        name="gptqmodel",
        version="7.6.0",
        pins="gptqmodel.txt",
        abilities=(Ability("gptq", (2, 3, 4, 8)), Ability("awq", (4,), (False,))),
        dtypes={"awq": "bfloat16"},
        # it remembers the dtypes of what it moves to files, so nothing can be narrowed before it saves
        notes=dict.fromkeys(("gptq", "awq"), "unquantized tensors as computed"),
        prime="from gptqmodel import extension; extension.load('pack_block_cpu')",
    ),
    ReferenceEngine(
        name="llmcompressor",
        version="0.14.0.1",
        pins="llmcompressor.txt",
        abilities=(Ability("gptq", (4, 8)), Ability("awq", (4, 8)), Ability("rtn", (4, 8))),
        notes={"awq": "pin_memory stubbed"},
    ),
    ReferenceEngine(
        name="auto-round",
        version="0.16.1",
        pins="auto-round.txt",
        abilities=(Ability("gptq", (2, 3, 4, 8)), Ability("awq", (4,), (False,)), Ability("rtn", (2, 3, 4, 8))),
        options={"iterations": 200},
        notes={"gptq": "its own sign gradient descent in GPTQ's format, 200 iterations", "rtn": "in GPTQ's format"},
    ),
    ReferenceEngine(
        name="autoawq",
        version="0.2.9",
        pins="autoawq.txt",
        abilities=(Ability("awq", (4,), (False,)),),
        python=(11, 12),
    ),
    ReferenceEngine(
        name="auto-gptq",
        version="0.7.1",
        pins="auto-gptq.txt",
        abilities=(Ability("gptq", (2, 3, 4, 8)),),
        python=(11, 12),
        needs_gpu="auto-gptq 0.7.1 refuses to quantize without CUDA",
        build=("numpy", "setuptools", "wheel"),
    ),
    ReferenceEngine(
        name="bitsandbytes",
        version=version("bitsandbytes"),
        abilities=(Ability("int8"), Ability("nf4", group_sizes=(64,))),
        notes=dict.fromkeys(("int8", "nf4"), "load and save with transformers"),
    ),
)
REFERENCE_ENGINES = {engine.name: engine for engine in _ENGINES}
OWN = "quantkit"


def chosen_engines(names: Sequence[str]) -> list[str]:
    """The names a user gave, checked, each once. Raises UsageError with every name that is none."""
    known = [OWN, *REFERENCE_ENGINES]
    wrong = [f'--engines: "{name}": {suggestion(name, known)}' for name in names if name not in known]
    if wrong or not names:
        raise UsageError("\n".join(wrong) or "--engines: none given", hint=f"there are {', '.join(known)}")
    return list(dict.fromkeys(names))
