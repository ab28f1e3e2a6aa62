"""The models of recipes and suites: every key a user may write, its default, and what has to agree with what."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from quantkit.errors import UsageError
from quantkit.formats import DEFAULT_FORMAT, FORMATS, SUITABLE_FORMATS, AnyFormat
from quantkit.formats.base import Format
from quantkit.gates.outcome import BarName
from quantkit.memory import parse_bytes
from quantkit.methods import AnyMethod
from quantkit.methods.base import Method
from quantkit.patterns import regex_problem
from quantkit.schema import Frozen
from quantkit.settings import Change
from quantkit.validation import Problem, Problems, found, problems_of

SCHEMA_VERSION = 1


class ModelSection(Frozen):
    """Which model: a folder, a .gguf file or a hub id."""

    id: str | None = Field(None, description="folder, .gguf file or hub id; --model overrides it")
    revision: str = Field("main", description="of a hub id: branch, tag or commit")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of tensors that stay unquantized")


class CalibrationSection(Frozen):
    """Which text the statistics are taken from."""

    set: str = Field("pydoc", description="name of a definition under calibration/, or a local file")
    sequences: int = Field(96, ge=1)  # with the length: what the default set has in every tokenizer
    length: int = Field(512, ge=8, description="tokens a sequence")
    seed: int = Field(0, description="of the order in which texts are packed")
    precision: Literal["auto", "float32"] = Field(
        "auto",
        description="of the products; auto: bfloat16 and integers of 8 or 4 bits where the processor is faster at them",
    )


class TargetSection(Frozen):
    """Which engine will run the artifact; what it would refuse is refused before the run."""

    engine: Literal["vllm", "transformers", "sglang", "tgi", "tensorrt-llm", "llama.cpp", "deepspeed"]
    tensor_parallel: int = Field(1, ge=1, description="GPUs that each layer is split over")


class MemoryBench(Frozen):
    """Bytes on disk, bits per weight, loaded and peak memory."""

    name: Literal["memory"] = "memory"


class ThroughputBench(Frozen):
    """Prefill and decode tokens per second, time to the first token and for each that follows."""

    name: Literal["throughput"] = "throughput"
    prompt_tokens: (
        Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    ) = Field(128, description="length of the prompts; of several, decode and larger batches take the first")
    decode_tokens: int = Field(32, ge=1)
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    warmup: int = Field(1, ge=0, description="runs that are not counted")
    repetitions: int = Field(3, ge=1, description="runs that are, in one process; their median counts")
    rounds: int = Field(
        3, ge=1, description="fresh processes for each model, taking turns; medians and intervals are over them"
    )

    def prompt_lengths(self, batch_size: int) -> tuple[int, ...]:
        """Prompt lengths at one batch size, the one that decode is measured behind first: all of them at the first
        batch size, that one alone at others."""
        lengths = (self.prompt_tokens,) if isinstance(self.prompt_tokens, int) else self.prompt_tokens
        return lengths if batch_size == self.batch_sizes[0] else lengths[:1]


class DivergenceBench(Frozen):
    """Perplexity, KL divergence, top-1 agreement and total variation on held-out text."""

    name: Literal["divergence"] = "divergence"
    set: str = Field("pydoc", description="a calibration set (its evaluation part) or a local text file")
    sequences: int = Field(8, ge=1)
    length: int = Field(256, ge=8, description="tokens a sequence")


class AccuracyBench(Frozen):
    """Tasks of lm-eval by name, and quantkit's own offline task `basics`."""

    name: Literal["accuracy"] = "accuracy"
    tasks: tuple[str, ...] = ("basics",)
    data: dict[str, str] = Field(default_factory=dict, description="task -> local file with the rows of that task")
    limit: int | None = Field(None, ge=1, description="questions a task; null is all")
    batch_size: int = Field(8, ge=1)


class SpeculativeBench(Frozen):
    """The artifact drafts for its baseline: share of its tokens that are accepted, and the speed-up."""

    name: Literal["speculative"] = "speculative"
    set: str = Field("pydoc", description="where the prompts come from: a calibration set or a local text file")
    prompts: int = Field(4, ge=1)
    prompt_tokens: int = Field(64, ge=8)
    decode_tokens: int = Field(64, ge=2)
    draft_tokens: int = Field(5, ge=1, description="tokens drafted a round")
    repetitions: int = Field(1, ge=1)


AnyBench = Annotated[
    MemoryBench | ThroughputBench | DivergenceBench | AccuracyBench | SpeculativeBench, Field(discriminator="name")
]


def _size(value: Any) -> Any:
    try:
        return parse_bytes(value, "") if isinstance(value, str) else value
    except UsageError as error:
        raise ValueError(error.message.removeprefix(": ")) from error


Size = Annotated[
    int,
    Field(ge=1),
    BeforeValidator(_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}]}, mode="validation"),
]


class GateSection(Frozen):
    """Bars that rows have to clear; one fails only when the interval of the measurement excludes it."""

    row: str | None = Field(None, description="label of the row; null is every row")
    min_recovery: float | None = Field(None, gt=0, description="accuracy, as a share of the baseline's")
    max_kl: float | None = Field(None, ge=0, description="nats a token to the baseline")
    max_bytes: Size | None = Field(None, description="of the weight files: 90MB, 85MiB or a number")
    min_speedup: float | None = Field(None, gt=0, description="decode, as a multiple of the baseline's")

    def bars(self) -> dict[BarName, float]:
        """The bars that are set, by their keys."""
        values = {bar: getattr(self, bar) for bar in get_args(BarName)}
        return {bar: value for bar, value in values.items() if value is not None}


Overrides = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {"type": "object", "additionalProperties": {"anyOf": [{"const": "skip"}, {"type": "object"}]}},
        mode="validation",
    ),
]


class Recipe(Frozen):
    """One model, one method, one artifact."""

    schema_version: Literal[1] = 1
    model: ModelSection = ModelSection()
    method: AnyMethod
    format: AnyFormat | None = Field(None, description="the format that suits the method when left out")
    calibration: CalibrationSection = CalibrationSection()
    overrides: Overrides = Field(
        default_factory=dict,
        description='regex -> settings that replace those of method, or "skip"; the first found in a name counts',
    )
    skip: tuple[str, ...] = Field(("lm_head",), description="regexes of linears that stay as they are")
    target: TargetSection | None = Field(None, description="null: no engine is asked")
    bench: tuple[AnyBench, ...] = ()
    seed: int = 0

    @field_validator("format")
    @classmethod
    def _format_suits_method(cls, value: Format | None, info: ValidationInfo) -> Format | None:
        method = info.data.get("method")
        if value is not None and method is not None:
            _require_suitable(value.name, method, "leave format out")  # type: ignore[attr-defined]
        return value

    @field_validator("skip")
    @classmethod
    def _skip_compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        problems = [Problem((index,), text) for index, pattern in enumerate(value) if (text := _regex_problem(pattern))]
        if problems:
            raise Problems(problems)
        return value

    @field_validator("overrides")
    @classmethod
    def _overrides_make_methods(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        method, chosen = info.data.get("method"), info.data.get("format")
        problems: list[Problem] = []
        methods = [] if method is None else [method]
        for pattern, settings in value.items():
            if text := _regex_problem(pattern):
                problems.append(Problem((pattern,), text))
            if method is None:  # what is wrong with it is reported on its own; nothing to merge onto
                continue
            try:
                merged = merge_override(method, settings)
                if merged is not None:
                    problems += _other_inputs(pattern, merged, methods)
                    methods.append(merged)
                    written = chosen.name if chosen else DEFAULT_FORMAT[method.name]
                    _require_suitable(written, merged, "one artifact has one format")
            except ValidationError as error:
                inner = problems_of(error, AnyMethod)
                problems += [Problem((pattern, *one.path), one.text, one.unknown) for one in inner]
            except ValueError as error:
                problems.append(Problem((pattern,), str(error)))
        if problems:
            raise Problems(problems)
        return value

    @property
    def resolved_format(self) -> Format:
        """The format of the artifact: the recipe's, or the default of its method."""
        default = FORMATS[DEFAULT_FORMAT[self.method.name]]
        return default.model_validate({}) if self.format is None else self.format

    def method_for(self, linear_name: str) -> Method | None:
        """The method for a linear such as "model.layers.0.mlp.up_proj", None when it is skipped; `skip` goes first."""
        if any(re.search(pattern, linear_name) for pattern in self.skip):
            return None
        for pattern, settings in self.overrides.items():
            if re.search(pattern, linear_name):
                return merge_override(self.method, settings)
        return self.method


def _other_inputs(pattern: str, merged: Method, before: Sequence[Method]) -> list[Problem]:
    """That linears are to see other inputs than those of methods before do, which one model that runs cannot give."""
    asked, *others = (one.model_dump().get("propagate") for one in (merged, *before))
    wanted = next((one for one in others if one is not None), None)
    if asked is None or wanted is None or asked == wanted:
        return []
    return [Problem((pattern, "propagate"), f"found {asked}, expected {wanted} as for other linears: one model runs")]


_METHOD: TypeAdapter[Method] = TypeAdapter(AnyMethod)


def merge_override(method: Method, settings: Any) -> Method | None:
    """A method with some settings replaced; None for "skip". Settings that name another method stand alone."""
    if settings == "skip":
        return None
    if not isinstance(settings, dict):
        raise ValueError(f'found {found(settings)}, expected "skip" or settings of the method, such as {{bits: 8}}')
    own_name = method.name  # type: ignore[attr-defined]
    same = settings.get("name", own_name) == own_name
    return _METHOD.validate_python({**method.model_dump(), **settings} if same else settings)


def recipe_sha256(recipe: Recipe) -> str:
    """sha256 of a recipe with its defaults filled in, as canonical JSON: the order of its keys does not matter."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _require_suitable(format_name: str, method: Method, remedy: str) -> None:
    name: str = method.name  # type: ignore[attr-defined]
    suitable = SUITABLE_FORMATS[name]
    if format_name not in suitable:
        known = " or ".join(suitable)
        raise ValueError(f"{format_name} cannot hold what {name} makes, expected {known}: {remedy}")


def _regex_problem(pattern: str) -> str | None:
    problem = regex_problem(pattern)
    return None if problem is None else f"found {found(pattern)}, {problem}"


class SuiteEntry(Frozen):
    """One recipe of a suite, and what the suite changes in it."""

    recipe: str = Field(description="name of a shipped recipe, or a file relative to the suite")
    label: str | None = Field(None, description="of the row in the table; the recipe's name when left out")
    set: dict[str, Any] = Field(default_factory=dict, description="dotted key of the recipe -> value")

    @property
    def row_label(self) -> str:
        return self.label or Path(self.recipe).stem


class Suite(Frozen):
    """One model, one baseline, several recipes, one table."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the name of the report's folder")
    model: ModelSection = Field(ModelSection(), description="the keys given here apply to every recipe")
    calibration: CalibrationSection | None = Field(None, description="the keys given here apply to every recipe")
    recipes: tuple[SuiteEntry, ...] = Field(min_length=1)
    bench: tuple[AnyBench, ...] = Field(min_length=1)
    gates: tuple[GateSection, ...] = Field((), description="what `run` ends with: exit 5 when one fails")

    _folder: Path | None = PrivateAttr(None)  # where the file lies: entries may be relative to it
    _file: str = PrivateAttr("suite")  # how messages call the file
    _changes: tuple[Change, ...] = PrivateAttr(())  # settings of the command line that belong to its recipes

    @field_validator("recipes")
    @classmethod
    def _labels_differ(cls, value: tuple[SuiteEntry, ...]) -> tuple[SuiteEntry, ...]:
        labels = [entry.row_label for entry in value]
        twice = [index for index, label in enumerate(labels) if label in labels[:index]]
        if twice:
            taken = [Problem((index, "label"), f'"{labels[index]}" is taken: give it another') for index in twice]
            raise Problems(taken)
        return value

    @field_validator("gates")
    @classmethod
    def _gates_have_bars_and_rows(cls, value: tuple[GateSection, ...], info: ValidationInfo) -> tuple[GateSection, ...]:
        problems = [
            Problem((index,), "no bar, expected one such as max_kl") for index, it in enumerate(value) if not it.bars()
        ]
        labels = [entry.row_label for entry in info.data.get("recipes", ())]
        problems += [
            Problem((index, "row"), f"found {found(it.row)}, expected a label: {', '.join(labels)}")
            for index, it in enumerate(value)
            if labels and it.row is not None and it.row not in labels
        ]
        if problems:
            raise Problems(problems)
        return value
