"""Looking on at a block that runs: what comes to a group of linears, before the first of them multiplies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantkit.model.blocks import Block, LinearGroup


@dataclass(frozen=True)
class Arrived:
    """What has come to a group of linears: its inputs, the hidden states that it will be `added` to or else reads
    normalized; None where neither is told of it."""

    inputs: Tensor
    entered: Tensor | None
    added: bool

    @property
    def states(self) -> Tensor | None:
        """The hidden states that its outputs will be added to as they are; None where they go elsewhere."""
        return self.entered if self.added else None


_STATES: ContextVar[Tensor | None] = ContextVar("_STATES", default=None)
"""The hidden states that entered the last norm; each row that waits in a greenlet has a context, and so states, of its
own."""


@contextmanager
def watched(module: nn.Module, block: Block, group: LinearGroup, see: Callable[[Tensor], None]) -> Iterator[None]:
    """While this lasts, `see` is called with the inputs of a group's first linear before it runs."""

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # the mixed arithmetic is the block's: what looks on, and what runs while a row waits, is not meant
        with torch.autocast(inputs[0].device.type, enabled=False):
            see(inputs[0])

    reader = module.get_submodule(group.linears[0].removeprefix(block.prefix))
    handle = reader.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def watched_with_states(
    module: nn.Module, block: Block, group: LinearGroup, see: Callable[[Arrived], None]
) -> Iterator[None]:
    """`watched`, with the hidden states that entered the norm before the group."""
    norm = group.added_to or (group.producer if group.producer_kind == "norm" else None)

    def enter(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _STATES.set(inputs[0])

    def arrive(inputs: Tensor) -> None:
        see(Arrived(inputs, _STATES.get(), group.added_to is not None))

    with ExitStack() as hooks:
        if norm:
            before = module.get_submodule(norm.removeprefix(block.prefix))
            hooks.callback(before.register_forward_pre_hook(enter).remove)
        hooks.enter_context(watched(module, block, group, arrive))
        yield
