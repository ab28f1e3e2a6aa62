"""Classes of models with a compiled forward mixed in; the models' own classes stay as they are."""

from __future__ import annotations

from torch import nn

_MIXED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed_into(kind: type[nn.Module], mixin: type[nn.Module]) -> type[nn.Module]:
    """A class of the same name whose methods are the mixin's first; one and the same whenever it is asked for."""
    if (kind, mixin) not in _MIXED:
        _MIXED[kind, mixin] = type(kind.__name__, (mixin, kind), {})
    return _MIXED[kind, mixin]
