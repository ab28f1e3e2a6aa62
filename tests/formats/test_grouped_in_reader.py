"""AutoAWQ and GPTQ folders in their official reader, gptqmodel: logits against those of the weights that were stored.

The reference never passes through a file: an error that packing and unpacking share would cancel out.

Runs where the `gptq` extra is installed, as in docs/engines.md, and is skipped elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("gptqmodel", reason="the extra `gptq` is not installed")
pytest.importorskip("optimum", reason="the extra `gptq` is not installed")

from quantkit.formats import open_artifact  # noqa: E402
from quantkit.maths.affine import quantize_nearest  # noqa: E402
from quantkit.model.reader import open_source  # noqa: E402
from quantkit.plan import plan_linears  # noqa: E402
from quantkit.recipe import Recipe  # noqa: E402

IDS = torch.randint(0, 384, (1, 32), generator=torch.Generator().manual_seed(1))

ROUNDING = 0.02
"""The reader holds decoded weights in float16, which moved logits of about 3 by 0.004 at most, and by 0.011 where zeros
are 0; zeros that are off by one moved them by 3.5 at 4 bits and by 0.37 at 8."""


def _write(model: Path, out: Path, settings: dict[str, Any], one_signed: bool = False) -> Any:
    """An artifact of weights rounded to nearest; the model of the weights that went in.

    one_signed: every third row is made positive, so that its zeros are 0.
    """
    from transformers import AutoModelForCausalLM

    recipe = Recipe.model_validate(settings)
    source = open_source(str(model))
    plans = plan_linears(recipe, source)
    assert recipe.resolved_format.misfits(plans, source) == []
    out.mkdir()
    writer = recipe.resolved_format.writer(out, source, plans, torch.float16)
    methods = {f"{plan.name}.weight": plan.method for plan in plans if plan.method is not None}
    stored = {}
    for name in source.names():
        tensor = source.read(name)
        if name not in methods:
            writer.add(name, tensor)
            stored[name] = tensor.half().float()
            continue
        if one_signed:
            tensor = tensor.clone()
            tensor[::3] = tensor[::3].abs()
        quantized = quantize_nearest(tensor, methods[name].grid)
        writer.add(name, quantized)
        stored[name] = quantized.dequantize()
    writer.finish()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    unfilled = reference.load_state_dict(stored, strict=False)
    assert not unfilled.unexpected_keys and set(unfilled.missing_keys) <= {"lm_head.weight"}  # tied
    artifact = open_artifact(out)
    assert all(torch.equal(artifact.read(name).float(), weight) for name, weight in stored.items())
    return reference.eval()


def _difference(reference: Any, model: Any) -> float:
    with torch.inference_mode():
        wanted: Tensor = reference(IDS, use_cache=False).logits.float()
        found: Tensor = model(IDS, use_cache=False).logits.float()
    assert wanted.abs().max() > 1  # else the bound says nothing
    return float((found - wanted).abs().max())


def _in_transformers(folder: Path, quantization: Any) -> Any:
    """Through transformers, with the plain kernels: the others compute in bfloat16, ten times further off."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        device_map={"": "cpu"},
        local_files_only=True,
        quantization_config=quantization,
        output_loading_info=True,
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    return model


def _gptq(folder: Path) -> Any:
    from transformers import GPTQConfig

    return _in_transformers(folder, GPTQConfig(bits=4, backend="torch"))  # bits are the file's, only backend counts


def _awq(folder: Path) -> Any:
    from transformers import AwqConfig
    from transformers.utils.quantization_config import AwqBackend

    return _in_transformers(folder, AwqConfig(backend=AwqBackend.TORCH_AWQ))


def _rtn(bits: int, symmetric: bool, group_size: int | None = 32) -> dict[str, Any]:
    return {"name": "rtn", "bits": bits, "group_size": group_size, "symmetric": symmetric}


def _gptq_recipe(version: str, bits: int, symmetric: bool, **more: Any) -> dict[str, Any]:
    return {"method": _rtn(bits, symmetric), "format": {"name": "autogptq", "checkpoint_format": version}, **more}


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tiny_llama: Path, tmp_path: Path, bits: int, symmetric: bool, version: str) -> None:
    folder = tmp_path / "out"
    reference = _write(tiny_llama, folder, _gptq_recipe(version, bits, symmetric))
    assert _difference(reference, _gptq(folder)) < ROUNDING


@pytest.mark.parametrize(
    ("bits", "version"),
    [
        (3, "gptq"),
        (4, "gptq_v2"),
        (8, "gptq_v2"),
        pytest.param(4, "gptq", marks=pytest.mark.xfail(strict=True, reason="the reader adds one to whole words")),
        pytest.param(8, "gptq", marks=pytest.mark.xfail(strict=True, reason="the reader adds one to whole words")),
    ],
)
def test_gptq_with_zeros_of_zero(tiny_llama: Path, tmp_path: Path, bits: int, version: str) -> None:
    folder = tmp_path / "out"
    reference = _write(tiny_llama, folder, _gptq_recipe(version, bits, False), one_signed=True)
    assert _difference(reference, _gptq(folder)) < ROUNDING


@pytest.mark.parametrize("skipped", [r"layers\.1.*v_proj", r"layers\.0\.", "down_proj"])
def test_gptq_with_skipped_linears(tiny_llama: Path, tmp_path: Path, skipped: str) -> None:
    folder = tmp_path / "out"
    reference = _write(tiny_llama, folder, _gptq_recipe("gptq", 4, True, overrides={skipped: "skip"}))
    assert _difference(reference, _gptq(folder)) < ROUNDING


@pytest.mark.parametrize("override", [{"bits": 8}, {"group_size": 64}, "skip"])
def test_gptq_with_overrides_in_the_readers_own_loader(tiny_llama: Path, tmp_path: Path, override: Any) -> None:
    """transformers refuses mixed shapes; gptqmodel's own loader reads `dynamic`."""
    from gptqmodel import BACKEND
    from gptqmodel import GPTQModel as Reader

    folder = tmp_path / "out"
    reference = _write(tiny_llama, folder, _gptq_recipe("gptq", 4, True, overrides={"down_proj": override}))
    model = Reader.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    assert _difference(reference, model) < ROUNDING


@pytest.mark.parametrize("group_size", [16, 32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(tiny_llama: Path, tmp_path: Path, symmetric: bool, group_size: int | None) -> None:
    folder = tmp_path / "out"
    reference = _write(tiny_llama, folder, {"method": _rtn(4, symmetric, group_size), "format": {"name": "autoawq"}})
    assert _difference(reference, _awq(folder)) < ROUNDING


def test_awq_with_a_tied_head_and_a_skipped_linear(tiny_llama_tied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    recipe = {"method": _rtn(4, False), "format": {"name": "autoawq"}, "overrides": {r"layers\.1.*v_proj": "skip"}}
    reference = _write(tiny_llama_tied, folder, recipe)
    assert _difference(reference, _awq(folder)) < ROUNDING
