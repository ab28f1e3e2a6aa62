"""Linears that multiply in 8-bit integers while statistics are gathered."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from quantkit.arena import converted
from quantkit.maths.eight_bit import TRIED, Balance, EightBitInputs, EightBitWeight, balance, eight_bit_weight
from quantkit.maths.four_bit import FourBitWeight, four_bit_weight
from quantkit.tensors import GroupTensor


class Fresh(Tensor):
    """What a linear has just given, which nobody reads but to add it: hidden states that are added to it are written
    over it, to the same numbers, so that their sum takes no memory of its own. Sums are plain tensors; what gives back
    the tensor itself, as a dropout that is off, leaves it what it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __add__(self, other: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        alike = isinstance(other, Tensor) and (other.shape, other.dtype) == (self.shape, self.dtype)
        return plain.add_(other) if alike else plain + other

    __radd__ = __add__

    def __iadd__(self, other: Any) -> Tensor:  # type: ignore[misc]
        return self.as_subclass(Tensor).add_(other)


class Readers:
    """Linears that read the same inputs, one after another: how these are balanced, and their codes until the last of
    the linears has come for them."""

    def __init__(self, linears: Sequence[EightBitLinear]):
        # weak: they hold this, and with a circle of them their weights would stay until garbage is looked for
        self._linears = [ref(linear) for linear in linears]
        self._balance: Balance | None = None
        self._meant: dict[int, int] = {}  # for which linears that did not ask yet, and which weights of theirs, by id
        self._read: tuple[Tensor, Tensor, EightBitInputs] | None = None
        self._to_come = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Readers:
        made = memo[id(self)] = Readers([])
        made._linears = [ref(copy.deepcopy(linear, memo)) for linear in self._there()]
        return made

    def _there(self) -> list[EightBitLinear]:
        return [linear for one in self._linears if (linear := one()) is not None]

    def balance(self, linear: EightBitLinear, inputs: Tensor) -> Balance:
        """The balance of a linear that has its weight with the others that have theirs when the first of them asks."""
        if self._balance is None or self._meant.get(id(linear)) != id(linear.weight):
            together = [one for one in self._there() if not one.weight.is_meta]
            self._balance = balance([one.to_code(inputs) for one in together], inputs)
            self._meant = {id(one): id(one.weight) for one in together}
        del self._meant[id(linear)]
        return self._balance

    def coded(self, weight: EightBitWeight, inputs: Tensor) -> EightBitInputs:
        """Inputs as the weight of one of the linears takes them; they must not change until all have come for them."""
        if self._read is None or self._read[0] is not inputs or self._read[1] is not weight.factors:
            self._read = (inputs, weight.factors, weight.coded(inputs))
            self._to_come = len(self._linears)
        found = self._read[2]
        self.has_come()
        return found

    def has_come(self) -> None:
        """One of the linears has come, if only to go without codes."""
        self._to_come -= 1
        if self._to_come < 1:
            self._read = None


class EightBitLinear(nn.Linear):
    """A linear whose outputs come from 8-bit products, or from what the run multiplies in where those would be too far
    off.

    The weight is coded when the first inputs behind its assignment come, which tell how to balance its columns: later
    batches take it as it is, so the same inputs in the same order give the same outputs. What was assigned is then not
    held beside its codes; it may be bfloat16 or float16 where the run multiplies in another dtype. A handful of tokens,
    such as an expert may get, tells too little of the columns, and goes without. A weight that was rounded to few bits
    can be given as its codes, and is multiplied by these (maths/four_bit.py), or again as any other one.
    """

    wide = False
    """Whether what comes out is added to hidden states and else read by nobody: 8-bit products are then float32 even
    where the run multiplies in less, since they would be widened for that at once, and `Fresh`."""

    readers: Readers
    """All that read its inputs, itself among them."""

    _coded: tuple[Tensor, EightBitWeight | FourBitWeight | None] | None

    _rounded: tuple[Tensor, GroupTensor] | None
    """The empty weight that is in its place, and what stands for it."""

    def take(self, rounded: GroupTensor) -> None:
        """Have a weight that was rounded, which `run_length` knows, as its codes."""
        self.weight = nn.Parameter(torch.empty(rounded.shape, device="meta"), requires_grad=False)
        self._coded, self._rounded = None, (self.weight, rounded)

    def forward(self, inputs: Tensor) -> Tensor:
        coded = self._ready(inputs)
        if coded is None:
            self.readers.has_come()
            return self._as_it_is(inputs)
        dtype = torch.float32 if self.wide else self._multiplied(inputs)
        if isinstance(coded, FourBitWeight):
            outputs = coded(inputs, dtype)
        else:
            outputs = coded.products(self.readers.coded(coded, inputs), dtype)
        return outputs.as_subclass(Fresh) if self.wide else outputs

    def gate(self, inputs: Tensor, gates: Tensor) -> Tensor | None:
        """The outputs times SiLU of gates, which are in what the run multiplies in, over these; None, and nothing done,
        where no loop does that."""
        coded = self._ready(inputs)
        if not isinstance(coded, EightBitWeight) or gates.dtype != self._multiplied(inputs):
            return None
        if not coded.writes_over(gates):
            return None
        coded.write_gated(self.readers.coded(coded, inputs), gates)
        return gates

    def _ready(self, inputs: Tensor) -> EightBitWeight | FourBitWeight | None:
        """The weight in codes, which are made where there are none yet; None where it is used as it is."""
        if self._coded is None or self._coded[0] is not self.weight:
            if inputs.numel() < TRIED * self.in_features:
                return None
            coded = self._code(inputs)
            if coded is not None:
                self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)
            self._coded = (self.weight, coded)
        return self._coded[1]

    def _multiplied(self, inputs: Tensor) -> torch.dtype:
        """What the run multiplies in."""
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype

    def _code(self, inputs: Tensor) -> EightBitWeight | FourBitWeight | None:
        rounded, self._rounded = self._taken(), None
        if rounded is not None:
            coded = four_bit_weight(rounded, self.bias, inputs)
            if coded is not None:
                return coded
            self.weight = nn.Parameter(rounded.dequantize(), requires_grad=False)
        return eight_bit_weight(self.to_code(inputs), self.bias, inputs, self.readers.balance(self, inputs))

    def to_code(self, inputs: Tensor) -> Tensor:
        """The weight as it is coded: loops read no float16."""
        if self.weight.dtype != torch.float16:
            return self.weight
        return converted(self.weight, self.weight.device, self._multiplied(inputs))

    def _taken(self) -> GroupTensor | None:
        """What stands for the weight, unless another one was assigned behind it."""
        return self._rounded[1] if self._rounded is not None and self._rounded[0] is self.weight else None

    def _as_it_is(self, inputs: Tensor) -> Tensor:
        """The outputs without 8 bits; a weight that came in another half precision than the run multiplies in is
        converted once, codes stay for more inputs."""
        rounded = self._taken()
        if rounded is not None:
            return nn.functional.linear(inputs, rounded.dequantize().to(inputs.dtype), self.bias)
        dtype = self._multiplied(inputs)
        if self.weight.dtype in (torch.bfloat16, torch.float16) and self.weight.dtype != dtype:
            tried = self._coded is not None and self._coded[0] is self.weight
            self.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
            if tried:
                self._coded = (self.weight, None)
        return super().forward(inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> EightBitLinear:
        self._coded = self._rounded = None  # other tensors take the place of these
        return super()._apply(fn, recurse)


def use_eight_bits(modules: Iterable[nn.Module], *, wide: bool = False) -> None:
    """Let the plain linears among these, which read the same inputs, multiply in 8-bit integers. wide: these give
    float32."""
    linears = []
    for module in modules:
        if type(module) is nn.Linear:
            module.__class__ = EightBitLinear
            assert isinstance(module, EightBitLinear)
            module.wide = wide
            module._coded = module._rounded = None  # its dictionary grows now, not among tensors of a batch
            linears.append(module)
    readers = Readers(linears)
    for linear in linears:
        linear.readers = readers
