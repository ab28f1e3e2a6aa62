"""The registry of methods: to add one, write its file and put its class into `Method` below."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from quantkit.methods.awq import AWQ
from quantkit.methods.base import Method
from quantkit.methods.ggml import GGML
from quantkit.methods.gptq import GPTQ
from quantkit.methods.int8 import INT8
from quantkit.methods.nf4 import NF4
from quantkit.methods.rtn import RTN

AnyMethod = Annotated[INT8 | NF4 | AWQ | GPTQ | GGML | RTN, Field(discriminator="name")]

METHODS: dict[str, type[Method]] = {"int8": INT8, "nf4": NF4, "awq": AWQ, "gptq": GPTQ, "ggml": GGML, "rtn": RTN}
