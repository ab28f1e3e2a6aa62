"""The static side of the table: rules of thumb, readers, uses. Kept as data in facts.yaml."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from quantkit.schema import Frozen


class Rule(Frozen):
    """What people quote for a method, as shares of the FP16 original."""

    title: str
    accuracy: float
    memory_saved: float
    faster: tuple[float, float]
    max_bits: float = Field(math.inf, description="bits a weight up to which the rule is meant")


class Facts(Frozen):
    rules: dict[str, Rule] = Field(description="method name -> rule of thumb")
    runs_on: dict[str, str] = Field(description="format name, or baseline -> readers")
    fits_best: dict[str, str] = Field(description="method name -> use")


@cache
def load_facts() -> Facts:
    """Read facts.yaml, which stands beside this file."""
    return Facts.model_validate(yaml.safe_load(Path(__file__).with_name("facts.yaml").read_text(encoding="utf-8")))
