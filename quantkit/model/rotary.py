"""Rotary positions by a compiled loop while statistics are gathered on a CPU.

Models call a function of their own module for them, so an attention gets a forward that is the same but for what that
name means to it. The module itself, and other models, keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.arena import empty
from quantkit.maths.compiled import readable

NAME = "apply_rotary_pos_emb"
"""What models call the function."""

COMPARED = 64
"""Positions of the first inputs by which the loop is compared with the model's own function."""

Rotation = Callable[..., tuple[Tensor, Tensor]]
"""Queries and keys [batch, heads, length, width], cosines and sines [1, length, width] to queries and keys."""


class CompiledRotation:
    """Takes the place of a model's function. The first inputs of a kind tell whether the loop gives the very same
    numbers; where it does not, or something else is asked for, the model's own goes on."""

    def __init__(self, own: Rotation):
        self._own = own
        self._agrees: dict[tuple[Any, ...], bool] = {}

    def __call__(self, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if named or len(given) != 4:  # another signature, or more is asked for
            return self._own(*given, **named)
        query, key, cos, sin = given
        if not (_plain(query, cos, sin) and _plain(key, cos, sin)):
            return self._own(query, key, cos, sin)
        kind = (query.dtype, key.dtype, query.shape[-1])
        found = None if self._agrees.get(kind) is False else (_rotated(query, cos, sin), _rotated(key, cos, sin))
        if found is not None and kind not in self._agrees:
            if query.shape[2] < 2 or not (query.any() and key.any()):
                return self._own(query, key, cos, sin)  # first positions and zeros are the same by any
            wanted = self._own(query[:, :, :COMPARED], key[:, :, :COMPARED], cos[:, :COMPARED], sin[:, :COMPARED])
            pairs = zip(found, wanted, strict=True)
            self._agrees[kind] = all(
                one.dtype == other.dtype and torch.equal(one[:, :, :COMPARED], other) for one, other in pairs
            )
        return found if found is not None and self._agrees[kind] else self._own(query, key, cos, sin)


def _plain(heads: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the loop is made for these: one table for all of a batch, heads side by side as a linear gives them."""
    tables = all(
        table.dtype == torch.float32 and table.device.type == "cpu" and table.shape == (1, *heads.shape[2:])
        for table in (cos, sin)
    )
    return tables and heads.dtype in (torch.float32, torch.bfloat16) and heads.transpose(1, 2).is_contiguous()


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 [batch, heads, length, width]."""
    from quantkit.maths.rotary_kernel import rotate

    out = empty(heads.shape)
    tables = cos[0].contiguous().numpy(), sin[0].contiguous().numpy()
    rotate(heads.shape[0] * heads.shape[2], readable(heads.transpose(1, 2)), *tables, out.numpy())
    return out


_COMPILED: dict[type[nn.Module], type[nn.Module]] = {}
"""The class that takes an attention's place."""


def use_compiled_rotation(modules: Iterable[nn.Module]) -> None:
    """Let the modules among these that turn queries and keys themselves do it by the loop where it gives the same."""
    for module in modules:
        kind = type(module)
        forward = kind.__dict__.get("forward")
        if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names or forward.__closure__:
            continue
        if kind in _COMPILED.values():
            continue
        if kind not in _COMPILED:
            meant = {**forward.__globals__, NAME: CompiledRotation(forward.__globals__[NAME])}
            made = FunctionType(forward.__code__, meant, forward.__name__, forward.__defaults__)
            made.__kwdefaults__ = forward.__kwdefaults__
            _COMPILED[kind] = type(kind.__name__, (kind,), {"forward": made})
        module.__class__ = _COMPILED[kind]
