"""The registry of formats: to add one, write its file and put its class into `FORMATS` and `AnyFormat` below."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from quantkit.errors import ModelError
from quantkit.formats.autoawq import AutoAWQ
from quantkit.formats.autogptq import AutoGPTQ
from quantkit.formats.base import ArtifactSource, Format
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.gguf import GGUF

AnyFormat = Annotated[BitsAndBytes | AutoAWQ | AutoGPTQ | GGUF, Field(discriminator="name")]

FORMATS: dict[str, type[Format]] = {
    "bitsandbytes": BitsAndBytes,
    "autoawq": AutoAWQ,
    "autogptq": AutoGPTQ,
    "gguf": GGUF,
}

DEFAULT_FORMAT = {
    "int8": "bitsandbytes",
    "nf4": "bitsandbytes",
    "awq": "autoawq",
    "gptq": "autogptq",
    "rtn": "autogptq",
    "ggml": "gguf",
}
"""The format of a method's artifact when the recipe names none."""

SUITABLE_FORMATS = {
    **{method: (name,) for method, name in DEFAULT_FORMAT.items()},
    "awq": ("autoawq", "autogptq"),
    "gptq": ("autogptq", "autoawq"),
    "rtn": ("autogptq", "autoawq"),
}
"""The formats that can hold what a method makes, the default first; bit widths and shapes are for `Format.misfits`."""


def open_artifact(path: Path) -> ArtifactSource:
    """Read a finished artifact of any known format back.

    Raises ModelError when the path does not exist or no format recognizes it.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such artifact", hint="give the folder or the .gguf file that quantize wrote")
    for known in FORMATS.values():
        if known.recognizes(path):
            return known.open(path)
    raise ModelError(
        f"{path}: not a quantized artifact of a known format; expected one of {', '.join(FORMATS)}",
        hint="a folder needs a config.json with quantization_config; a GGUF file ends in .gguf",
    )
