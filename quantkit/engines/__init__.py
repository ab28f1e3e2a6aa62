"""The registry of engines: to add one, write its file and put its class into the tuple below."""

from __future__ import annotations

from quantkit.engines.base import Engine, Session
from quantkit.engines.compressed_tensors import CompressedTensors
from quantkit.engines.decoded import Decoded
from quantkit.engines.gptqmodel import GPTQModel
from quantkit.engines.llama_cpp import LlamaCpp
from quantkit.engines.transformers import Transformers

__all__ = ["DECODED", "ENGINES", "Engine", "Session"]

ENGINES: dict[str, Engine] = {kind.name: kind() for kind in (Transformers, GPTQModel, CompressedTensors, LlamaCpp)}
"""Every engine that runs artifacts, by the name that `Format.engines` has."""

DECODED = Decoded()
"""What stands in for the quality of an artifact where none of its engines is installed; it runs no format."""
