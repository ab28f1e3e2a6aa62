"""The weights decoded from an artifact, run in transformers: what it computes when its own engine is not here."""

from __future__ import annotations

from pathlib import Path

import torch

from quantkit.engines.base import Engine, Session
from quantkit.engines.transformers import TransformersSession


class Decoded(Engine):
    """Quality only: speed and memory of decoded weights say nothing about the artifact."""

    name = "decoded weights"

    def available(self) -> str | None:
        return None

    def prepare(self) -> None:
        from transformers import LlamaForCausalLM  # noqa: F401

    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        from quantkit.formats import open_artifact
        from quantkit.model.load import load_transformers

        return TransformersSession(load_transformers(open_artifact(path), dtype, device), self.name)
