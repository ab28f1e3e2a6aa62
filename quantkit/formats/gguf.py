from __future__ import annotations

from typing import Literal

from quantkit.formats.base import Format


class GGUF(Format):
    name: Literal["gguf"] = "gguf"
