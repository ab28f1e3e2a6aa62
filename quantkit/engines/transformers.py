"""transformers: the baseline, and artifacts in bitsandbytes' format."""

from __future__ import annotations

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantkit.engines.base import ROOM, Engine, Session, dtype_name
from quantkit.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersSession(Session):
    """Any transformers model; `engine` names who computes its linears."""

    def __init__(self, model: PreTrainedModel, engine: str, details: dict[str, Any] | None = None):
        self.engine = engine
        self.model: PreTrainedModel = model.eval()
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.device = embedding.device
        self.dtype = dtype_name(embedding.dtype)
        self.details = details or {}
        self._cache: Any = None

    def logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        with torch.inference_mode():
            output = self.model(ids[None].to(self.device), use_cache=False, logits_to_keep=last or ids.numel())
        return output.logits[0].float().cpu()  # type: ignore[no-any-return]

    def prefill(self, ids: Tensor, room: int = ROOM) -> Tensor:
        self._cache = None
        return self._step(ids)

    def decode(self, tokens: Tensor) -> Tensor:
        assert self._cache is not None, "prefill comes before decode"
        return self._step(tokens[:, None])

    def _step(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            output = self.model(ids.to(self.device), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = output.past_key_values
            return output.logits[:, -1].argmax(-1).cpu()  # type: ignore[no-any-return]

    def close(self) -> None:
        self._cache = None
        del self.model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class Transformers(Engine):
    """transformers with bitsandbytes' kernels."""

    name = "transformers"

    def available(self) -> str | None:
        missing = [package for package in ("transformers", "accelerate", "bitsandbytes") if find_spec(package) is None]
        return f"pip install {' '.join(missing)}" if missing else None

    def prepare(self) -> None:
        import bitsandbytes  # noqa: F401
        from transformers import LlamaForCausalLM  # noqa: F401  # the models are imported when first asked for

    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        model = from_pretrained(path, device, dtype)
        compute_in(model, dtype)
        return TransformersSession(model, self.name)


def compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a model of bitsandbytes compute in `dtype`: it keeps that of the file for what is not quantized.

    Half precision, which files usually ask for, is several times slower than float32 on most CPUs.
    """
    from bitsandbytes.nn import Linear4bit

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype


def from_pretrained(path: Path, device: torch.device, dtype: torch.dtype, **settings: Any) -> PreTrainedModel:
    """A model folder through transformers' own loader, with more of its settings; all local. Raises ModelError."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            device_map={"": str(device)},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ModelError(f"{path}: transformers refuses it: {_first_line(error)}") from error
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise ModelError(f"{path}: transformers loads it with {kind.replace('_', ' ')}: {sorted(report[kind])[:4]}")
    return model  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
