"""The registry of formats: to add one, write its file and put its class into the union below."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

from pydantic import Field

from quantkit.errors import ModelError
from quantkit.formats.autoawq import AutoAWQ
from quantkit.formats.autogptq import AutoGPTQ
from quantkit.formats.base import ArtifactSource, Format
from quantkit.formats.bitsandbytes import BitsAndBytes
from quantkit.formats.compressed_tensors import CompressedTensors
from quantkit.formats.gguf import GGUF
from quantkit.methods import METHODS

AnyFormat = Annotated[BitsAndBytes | AutoAWQ | AutoGPTQ | CompressedTensors | GGUF, Field(discriminator="name")]

_KINDS = get_args(get_args(AnyFormat)[0])
FORMATS: dict[str, type[Format]] = {kind.model_fields["name"].default: kind for kind in _KINDS}
"""Every format by the name that recipes give it, in the order in which a file is recognized."""

SUITABLE_FORMATS: dict[str, tuple[str, ...]] = {name: kind.formats for name, kind in METHODS.items()} | {
    "int8": ("bitsandbytes",),
    "nf4": ("bitsandbytes",),
    "awq": ("autoawq", "autogptq", "compressed-tensors"),
    "ggml": ("gguf",),
}
"""The formats that can hold what a method makes, the default first; bit widths and shapes are for `Format.misfits`."""

DEFAULT_FORMAT = {method: names[0] for method, names in SUITABLE_FORMATS.items()}
"""The format of a method's artifact when the recipe names none."""


def recognized(path: Path) -> type[Format] | None:
    """The format of what is on disk, None when it is none of them. Raises ModelError for a damaged config.json."""
    return next((known for known in FORMATS.values() if known.recognizes(path)), None)


def open_artifact(path: Path) -> ArtifactSource:
    """Read a finished artifact of any known format back.

    Raises ModelError when the path does not exist or no format recognizes it.
    """
    if not path.exists():
        raise ModelError(f"{path}: no such artifact", hint="give the folder or the .gguf file that quantize wrote")
    known = recognized(path)
    if known is not None:
        return known.open(path)
    raise ModelError(
        f"{path}: not a quantized artifact of a known format; expected one of {', '.join(FORMATS)}",
        hint="a folder needs a config.json with quantization_config; a GGUF file ends in .gguf",
    )
