"""Factors and damped matrices that stay, where the product has them for a while in the Gram matrix itself."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from quantkit.maths.gram_factor import GramFactor, factored
from quantkit.maths.refine import damped


def factor_of(gram: Tensor, damp: float, act_order: bool) -> GramFactor:
    """The factor of a Gram matrix, which is left alone; zeros below its diagonal."""
    with factored(gram.clone(), damp, act_order) as factor:
        return replace(factor, upper=factor.upper.triu())


def damped_copy(gram: Tensor, damp: float) -> Tensor:
    """A Gram matrix with damping."""
    with damped(gram.clone(), damp) as matrix:
        return matrix.clone()
