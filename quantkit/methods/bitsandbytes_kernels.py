"""The one place that imports bitsandbytes to quantize: both of its methods use its own kernels."""

from __future__ import annotations

from typing import Any

from quantkit.errors import MissingDependencyError


def kernels() -> Any:
    """The module bitsandbytes.functional. Raises MissingDependencyError when it cannot be imported."""
    try:
        from bitsandbytes import functional
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"int8 and nf4 are quantized by bitsandbytes, which cannot be imported: {error}",
            hint="pip install 'bitsandbytes>=0.49.3'",
        ) from error
    return functional
