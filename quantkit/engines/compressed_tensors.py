"""compressed-tensors through transformers, which decodes the weights when it has none of a GPU's kernels for them."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from quantkit.engines.base import Engine, Session
from quantkit.engines.transformers import TransformersSession, from_pretrained


class CompressedTensors(Engine):
    """transformers with the compressed-tensors package: speed and memory are those of the decoded weights."""

    name = "compressed-tensors"

    def available(self) -> str | None:
        return None if find_spec("compressed_tensors") else 'pip install "compressed-tensors==0.20.0"'

    def prepare(self) -> None:
        import compressed_tensors  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401  # the models are imported when first asked for

    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        if not _dequantize_at_load(path):
            model = from_pretrained(path, device, dtype)
            return TransformersSession(model, self.name, {"weights": "decoded at the first pass"})
        from transformers import CompressedTensorsConfig

        model = from_pretrained(path, device, dtype, quantization_config=CompressedTensorsConfig(dequantize=True))
        return TransformersSession(model, self.name, {"weights": "decoded while loading"})


def _dequantize_at_load(path: Path) -> bool:
    """Whether packed zeros rule the usual way out: transformers 5.23 with compressed-tensors 0.20.0 then expects them
    unpacked and refuses the package's own files. The other way takes all linears for those of the first config group,
    so it is no way for several."""
    from quantkit.formats.compressed_tensors import CompressedTensorsArtifact

    schemes = CompressedTensorsArtifact(path).schemes
    return len(schemes) == 1 and not schemes[0].grid.symmetric
