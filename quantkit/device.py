"""Where to compute: one word of the command line becomes a torch device and the dtype that runs best there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """The torch device for "auto", "cpu" or "cuda". Raises MissingDependencyError when a GPU is asked for and none is
    there."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f'--device: found "{name}", expected auto, cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError(
            "--device cuda: this torch sees no CUDA device",
            hint="use --device cpu, or install a CUDA build of torch on a machine with an NVIDIA GPU",
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def compute_dtype(device: torch.device, source_dtype: torch.dtype) -> torch.dtype:
    """float32 on a CPU, where half precision is slower or unsupported; the checkpoint's own half precision on a GPU."""
    import torch

    if device.type == "cpu" or source_dtype not in (torch.float16, torch.bfloat16):
        return torch.float32
    return source_dtype
