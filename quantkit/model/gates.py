"""Gated MLPs by a compiled loop while statistics are gathered on a CPU.

Most families spell the same forward, and have SiLU as its activation: a module whose class has that one gets it with
the activation and the product in one loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.maths.compiled import readable, writable
from quantkit.model.eight_bit import EightBitLinear
from quantkit.model.mixed import mixed_into


def _spelled(self, x):  # type: ignore[no-untyped-def] # compared with what models have, as it is compiled
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


class CompiledGate(nn.Module):
    """Mixed into the class of an MLP that is spelled as above."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj  # type: ignore[operator]
        inner = up.gate(x, gate) if isinstance(up, EightBitLinear) else None
        if inner is None:
            inner = silu_times(gate, up(x))  # type: ignore[operator]
        del gate  # not held while they are multiplied
        made: Tensor = self.down_proj(inner)  # type: ignore[operator]
        return made


def silu_times(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of one shape and dtype; by the loop for float32 and bfloat16 on a CPU, which writes it over `up`
    where that lies in one piece: nobody else has what the two linears gave."""
    known = gate.dtype == up.dtype in (torch.float32, torch.bfloat16) and gate.device.type == up.device.type == "cpu"
    if not known or gate.shape != up.shape or not up.is_contiguous():
        return nn.functional.silu(gate) * up
    from quantkit.maths import gate_kernel

    rows, made = (tensor.detach().reshape(-1, gate.shape[-1]) for tensor in (gate, up))
    gate_kernel.silu_times(len(made), readable(rows), writable(made))
    return up


def use_compiled_gates(modules: Iterable[nn.Module]) -> None:
    """Let the gated MLPs among these go through the loop."""
    from transformers.activations import SiLUActivation

    for module in modules:
        kind = type(module)
        if _same(kind.forward, _spelled) and type(getattr(module, "act_fn", None)) in (nn.SiLU, SiLUActivation):
            module.__class__ = mixed_into(kind, CompiledGate)


def _same(one: Any, other: Any) -> bool:
    """Whether two functions take the same arguments and do the same to the attributes of the same names."""
    parts = ("co_code", "co_names", "co_varnames", "co_argcount", "co_freevars")
    return (
        isinstance(one, FunctionType)
        and not one.__defaults__
        and all(getattr(one.__code__, part) == getattr(other.__code__, part) for part in parts)
    )
