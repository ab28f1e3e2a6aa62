"""Recipes and suites: what a user writes in YAML, validated before anything else happens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantkit.formats import AnyFormat
from quantkit.methods import AnyMethod
from quantkit.schema import Frozen

SCHEMA_VERSION = 1


class ModelSection(Frozen):
    """Which model: a folder, a .gguf file or a hub id."""

    id: str | None = None
    revision: str = "main"
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of tensors that stay unquantized")


class CalibrationSection(Frozen):
    """Which text the statistics are taken from."""

    set: str = Field("pydoc", description="name of a definition under calibration/, or a local file")
    sequences: int = Field(128, ge=1)
    length: int = Field(512, ge=8, description="tokens a sequence")
    seed: int = 0


class MemoryBench(Frozen):
    name: Literal["memory"] = "memory"


class ThroughputBench(Frozen):
    name: Literal["throughput"] = "throughput"
    prompt_tokens: int = Field(128, ge=1)
    decode_tokens: int = Field(32, ge=1)
    batch_sizes: tuple[int, ...] = (1,)
    warmup: int = Field(1, ge=0)
    repetitions: int = Field(5, ge=1)


class DivergenceBench(Frozen):
    name: Literal["divergence"] = "divergence"
    set: str = Field("pydoc", description="a calibration set (its evaluation part) or a local text file")
    sequences: int = Field(8, ge=1)
    length: int = Field(256, ge=8)


class AccuracyBench(Frozen):
    name: Literal["accuracy"] = "accuracy"
    tasks: tuple[str, ...] = ("basics",)
    data: dict[str, str] = Field(default_factory=dict, description="task -> local file with the rows of that task")
    limit: int | None = Field(None, ge=1, description="questions a task")
    batch_size: int = Field(8, ge=1)


AnyBench = MemoryBench | ThroughputBench | DivergenceBench | AccuracyBench


class Recipe(Frozen):
    """One model, one method, one artifact."""

    schema_version: Literal[1] = 1
    model: ModelSection = ModelSection()
    method: AnyMethod
    format: AnyFormat | None = Field(None, description="the format that suits the method when left out")
    calibration: CalibrationSection = CalibrationSection()
    overrides: dict[str, Any] = Field(default_factory=dict, description='regex -> method settings, or "skip"')
    skip: tuple[str, ...] = Field(("lm_head",), description="regexes of layers that stay as they are")
    bench: tuple[AnyBench, ...] = ()
    seed: int = 0


class SuiteEntry(Frozen):
    recipe: str
    label: str | None = None
    set: dict[str, Any] = Field(default_factory=dict)


class Suite(Frozen):
    """One model, one baseline, several recipes, one table."""

    schema_version: Literal[1] = 1
    name: str
    model: ModelSection = ModelSection()
    calibration: CalibrationSection | None = None
    recipes: tuple[SuiteEntry, ...]
    bench: tuple[AnyBench, ...]
