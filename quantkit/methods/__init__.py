"""The registry of methods: to add one, write its file and put its class into the union below."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from quantkit.methods.awq import AWQ
from quantkit.methods.base import Method
from quantkit.methods.ggml import GGML
from quantkit.methods.gptq import GPTQ
from quantkit.methods.int8 import INT8
from quantkit.methods.nf4 import NF4
from quantkit.methods.rtn import RTN

AnyMethod = Annotated[INT8 | NF4 | AWQ | GPTQ | GGML | RTN, Field(discriminator="name")]

_KINDS = get_args(get_args(AnyMethod)[0])
METHODS: dict[str, type[Method]] = {kind.model_fields["name"].default: kind for kind in _KINDS}
"""Every method by the name that recipes give it."""
