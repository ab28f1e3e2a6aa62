from __future__ import annotations

from typing import Literal

from quantkit.formats.base import Format


class BitsAndBytes(Format):
    name: Literal["bitsandbytes"] = "bitsandbytes"
