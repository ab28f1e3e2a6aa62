"""What inference engines take, as data: the models of rules.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import Field

from quantkit.schema import Frozen

Verdict = Literal["takes", "slowly", "refuses"]
VERDICTS: tuple[Verdict, ...] = ("takes", "slowly", "refuses")
"""From the best to the worst."""

FormatName = Literal["bitsandbytes", "autoawq", "autogptq", "compressed-tensors", "gguf"]


class When(Frozen):
    """The conditions of a rule; those that are left out hold always."""

    format: tuple[FormatName, ...] | None = None
    method: tuple[str, ...] | None = None
    dtype: tuple[str, ...] | None = Field(None, description="of the tensors that stay unquantized")
    several_grids: Literal[True] | None = Field(None, description="linears have different bits, groups or symmetry")
    several_gpus: Literal[True] | None = Field(None, description="tensor_parallel is more than 1")
    heads_indivisible: Literal[True] | None = Field(
        None, description="tensor_parallel does not divide the attention heads"
    )
    bits: tuple[int, ...] | None = None
    symmetric: bool | None = None
    group_size: tuple[int | None, ...] | None = Field(None, description="null is the whole row")
    group_size_other_than: tuple[int | None, ...] | None = Field(None, description="null is the whole row")
    types: tuple[str, ...] | None = Field(None, description="ggml's names")
    group_straddles: Literal[True] | None = Field(None, description="a group would lie on two GPUs")
    row_is_split: Literal[True] | None = Field(None, description="a row with one scale would lie on several GPUs")
    shard_shape_other_than: tuple[tuple[int, int], ...] | None = Field(
        None, description="on each GPU, with linears of one input fused, rows and columns are multiples of no such pair"
    )


class Rule(Frozen):
    """What an engine makes of an artifact that fulfils some conditions."""

    when: When
    verdict: Literal["slowly", "refuses"]
    why: str
    hint: str | None = None
    source: str = Field(min_length=8, description="page, source file or thread of the engine")


class Otherwise(Frozen):
    """Why formats that are not listed are refused."""

    why: str
    source: str


class Engine(Frozen):
    """One inference engine. formats: those it reads, with the source of that."""

    name: str
    title: str
    formats: dict[FormatName, str]
    otherwise: Otherwise | None = None
    rules: tuple[Rule, ...]


class Rules(Frozen):
    """The whole file."""

    engines: tuple[Engine, ...]


@cache
def engines() -> tuple[Engine, ...]:
    """Every engine of the file, in its order."""
    text = (files("quantkit.planning") / "rules.yaml").read_text(encoding="utf-8")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of the time, where PyYAML has it compiled
    found: Any = yaml.load(text, Loader=loader)
    return Rules.model_validate(found).engines
