"""What the forecasts of memory and time count of a model: its blocks, their inputs, its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from quantkit.device import Arithmetic, arithmetic
from quantkit.formats.base import LinearPlan, calibrates
from quantkit.maths.four_bit import shortest_run
from quantkit.maths.gram import Look
from quantkit.methods.calibrated import grid_of
from quantkit.model.blocks import (
    Architecture,
    architecture_of,
    blocks_of,
    group_shape,
    head_dim,
    heads_of,
    state_columns,
)
from quantkit.model.forward import tokens_apart
from quantkit.model.room import running_bytes
from quantkit.model.source import Source
from quantkit.recipe import Recipe


@dataclass(frozen=True)
class Group:
    """Linears of a block that read one input. columns: of the input. rows: of the linears, stacked."""

    columns: int
    rows: int

    @property
    def values(self) -> int:
        return self.columns * self.rows


@dataclass(frozen=True)
class Work:
    """One recipe on one model, in numbers.

    blocks: how many, all alike: the largest stands for each. groups: of one block. block_bytes: of its stored tensors.
    hidden: width of the states. heads: how many. attention: width of all of them together. tokens, length: of the
    calibration set, 0 without. gram_tokens: of them, those that go into Gram matrices.
    largest_linear_values: of the largest linear that is quantized, but for the head where it goes through in parts.
    source_bytes: of all stored tensors. how: what is multiplied in while calibrating. run_columns: that share a step of
    the inputs where every linear of every block is rounded and multiplied by its codes, else None, though a block of
    such linears alone multiplies by codes all the same.
    """

    blocks: int
    groups: tuple[Group, ...]
    block_bytes: int
    hidden: int
    heads: int
    attention: int
    embedding_values: int
    largest_linear_values: int
    source_bytes: int
    quantized_values: int
    tokens: int
    length: int
    gram_tokens: int
    how: Arithmetic
    architecture: Architecture
    run_columns: int | None
    propagates: bool
    corrects: bool
    calibrated: bool
    gguf: bool
    compiled: bool

    @property
    def kind(self) -> str:
        """Which libraries the run takes: "calibrated", "gguf", "compiled" or "plain"."""
        if self.calibrated:
            return "calibrated"
        return "gguf" if self.gguf else "compiled" if self.compiled else "plain"

    @property
    def ways(self) -> int:
        """How many models run: the unquantized one goes along where there is a correction."""
        return 2 if self.corrects else 1

    @property
    def model_bytes(self) -> float:
        """Of a weight in a block that runs."""
        return running_bytes(self.how, transposed=self.architecture.transposed)

    @property
    def rounded_bytes(self) -> float:
        """Of one that was rounded, in a block that runs."""
        return running_bytes(self.how, transposed=self.architecture.transposed, run=self.run_columns)

    @property
    def eight_bit_linears(self) -> bool:
        return self.how.eight_bit_linears and not self.architecture.transposed

    @property
    def block_values(self) -> int:
        return sum(group.values for group in self.groups)

    @property
    def widest(self) -> int:
        """Columns of the widest input of a linear."""
        return max(group.columns for group in self.groups)


def work_of(recipe: Recipe, source: Source, plans: Sequence[LinearPlan], device: torch.device) -> Work:
    """The numbers of a plan that fits its model."""
    blocks = blocks_of(source)
    sizes = {name: prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names()}
    largest = max(blocks, key=lambda block: sum(sizes[name] for name in block.tensors))
    stacked = [group_shape(source, group) for group in largest.groups]
    values = {plan.name: plan.out_features * plan.in_features for plan in plans if plan.method is not None}
    methods = [plan.method for plan in plans if plan.method is not None]
    architecture = architecture_of(source.config)
    gguf, head = recipe.resolved_format.name == "gguf", architecture.head
    calibrated = calibrates(plans)
    section = recipe.calibration
    tokens = section.sequences * section.length if calibrated else 0
    looks = {method.look for method in methods if method.calibrated}
    stored = source.dtype(f"{blocks[0].linears[0]}.weight")
    how = arithmetic(device, stored, exact=section.precision == "float32")
    chosen = {plan.name: plan.method for plan in plans}
    grids = {grid_of(chosen.get(linear)) for block in blocks for linear in block.linears}
    by_codes = how.four_bit_linears and not architecture.transposed
    embedding = f"{architecture.embedding}.weight"
    heads = heads_of(source.config)
    return Work(
        blocks=len(blocks),
        groups=tuple(Group(columns, rows) for rows, columns in stacked),
        block_bytes=sum(sizes[name] for name in largest.tensors),
        hidden=state_columns(source),
        heads=heads,
        attention=heads * (head_dim(source.config) or 0),
        embedding_values=prod(source.shape(embedding)),
        largest_linear_values=max((count for name, count in values.items() if not (gguf and name == head)), default=0),
        source_bytes=sum(sizes.values()),
        quantized_values=sum(values.values()),
        tokens=tokens,
        length=section.length,
        gram_tokens=max((tokens // tokens_apart(look, tokens) for look in looks - {Look.SQUARES}), default=0),
        how=how,
        architecture=architecture,
        run_columns=shortest_run(grids, {columns for _, columns in stacked}) if by_codes else None,
        propagates=any(getattr(method, "propagate", None) == "quantized" for method in methods),
        corrects=any(getattr(method, "correction", 0) > 0 for method in methods),
        calibrated=calibrated,
        gguf=gguf,
        compiled=any(method.compiled for method in methods),
    )
