"""gptqmodel through transformers and optimum: artifacts in the formats of GPTQ and AWQ."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from quantkit.engines.base import Engine, Session
from quantkit.engines.transformers import TransformersSession, from_pretrained
from quantkit.errors import ModelError

PACKAGES = ("gptqmodel", "optimum")


class GPTQModel(Engine):
    """transformers with gptqmodel's kernels."""

    name = "gptqmodel"

    def available(self) -> str | None:
        missing = [package for package in PACKAGES if find_spec(package) is None]
        return 'pip install "gptqmodel==7.6.0" "optimum==2.3.0"' if missing else None

    def prepare(self) -> None:
        import gptqmodel  # noqa: F401
        import optimum.gptq  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401  # the models are imported when first asked for

    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        from quantkit.formats.folder import read_quantization_config

        try:
            model = from_pretrained(path, device, dtype)
        except ModelError:
            if device.type != "cpu" or (read_quantization_config(path) or {}).get("quant_method") != "awq":
                raise
            from transformers import AwqConfig
            from transformers.utils.quantization_config import AwqBackend

            # where none of the fast kernels takes a shape on a CPU it refuses, though this one takes all;
            # `kernels` shows which it was
            model = from_pretrained(path, device, dtype, quantization_config=AwqConfig(backend=AwqBackend.TORCH_AWQ))
        kernels = sorted({type(module).__name__ for module in model.modules() if hasattr(module, "qweight")})
        return TransformersSession(model, self.name, {"kernels": kernels})
