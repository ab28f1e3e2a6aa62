"""GPTQ on ggml's grids: codes and numbers against slow float64 oracles, and bytes that decode to what was meant."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from oracles.ggml_descent import sweep
from oracles.gptq import gptq
from oracles.grams import damped_copy, factor_of
from quantkit.maths import ggml_compensate as module
from quantkit.maths import products
from quantkit.maths.ggml import block_layout, encode
from quantkit.maths.ggml_codes import LAYOUTS, CodedBlocks, put, take
from quantkit.maths.ggml_compensate import compensate_codes, refine_blocks, values_of


def _case(type_name: str, rows: int, blocks: int, seed: int = 0) -> tuple[Tensor, Tensor, CodedBlocks]:
    """A weight, the Gram matrix of correlated inputs and the encoder's blocks."""
    columns = max(block_layout(type_name)[0], 64) * blocks
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(3 * columns, columns, generator=generator) @ mix * torch.linspace(0.2, 4.0, columns)
    weight, gram = torch.randn(rows, columns, generator=generator), inputs.T @ inputs
    return weight, gram, take(encode(weight, type_name, gram.diagonal()), type_name)


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_codes_equal_the_oracle(type_name: str) -> None:
    weight, gram, coded = _case(type_name, 2, 1)
    layout = LAYOUTS[type_name]
    found = compensate_codes(weight, coded, type_name, factor_of(gram, 0.01, True))
    moved = weight.double() + coded.base.double().repeat_interleave(layout.group, dim=1)
    values = layout.table(torch.device("cpu")).numpy() if layout.values else None
    zero = np.full(coded.step.shape, -layout.low)
    levels, step = 2**layout.bits, coded.step.numpy()
    expected = gptq(moved.numpy(), step, zero, gram.numpy(), layout.group, levels, 0.01, True, values)
    # float32 against float64: a value on the edge between two of many codes may fall either way
    assert (found.codes.numpy() != expected).mean() < (0.01 if layout.bits == 8 else 0.005)
    assert torch.equal(found.step, coded.step) and torch.equal(found.base, coded.base)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "IQ4_NL", "IQ4_XS"])
def test_a_sweep_equals_the_oracle(type_name: str) -> None:
    weight, gram, coded = _case(type_name, 2, 1, seed=1)
    layout, loaded = LAYOUTS[type_name], damped_copy(gram, 0.01)
    found = refine_blocks(weight, coded, type_name, loaded, 1)
    changed = 0
    for row in range(len(weight)):
        codes, step, base = sweep(
            weight[row].double().numpy(),
            coded.codes[row].numpy(),
            coded.step[row].numpy(),
            coded.base[row].numpy(),
            torch.stack((coded.unit, coded.minimum_unit))[:, row].double().numpy(),
            layout.levels,
            layout.table(torch.device("cpu")).double().numpy(),
            layout.has_minimum,
            loaded.double().numpy(),
            layout.group,
        )
        assert (found.codes[row].numpy() != codes).mean() < 0.02
        close = np.isclose(found.step[row].numpy(), step, rtol=1e-3) & np.isclose(found.base[row].numpy(), base, 1e-3)
        assert close.mean() >= 0.9
        changed += int((step != coded.step[row].numpy()).sum())
    assert changed > 0, "the case must be one where a scale moves"


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_bytes_decode_to_what_was_meant_and_lose_less(type_name: str) -> None:
    weight, gram, coded = _case(type_name, 6, 2, seed=2)
    factor = factor_of(gram, 0.01, True)
    compensated = compensate_codes(weight, coded, type_name, factor)
    found = refine_blocks(weight, compensated, type_name, damped_copy(gram, factor.damp), 2)
    decoded = gguf.dequantize(put(found, type_name).numpy(), gguf.GGMLQuantizationType[type_name])
    assert np.array_equal(decoded, values_of(found, type_name).numpy())

    def loss(blocks: CodedBlocks) -> float:
        error = (values_of(blocks, type_name) - weight).double()
        return float(((error @ gram.double()) * error).sum())

    assert loss(found) < loss(compensated) < 0.8 * loss(coded)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K"])
def test_zero_rows_and_dead_columns(type_name: str) -> None:
    weight, gram, _ = _case(type_name, 3, 1)
    weight[1] = 0.0
    gram[5, :] = gram[:, 5] = 0.0
    coded = take(encode(weight, type_name, gram.diagonal()), type_name)
    factor = factor_of(gram, 0.01, True)
    compensated = compensate_codes(weight, coded, type_name, factor)
    found = refine_blocks(weight, compensated, type_name, damped_copy(gram, factor.damp), 2)
    values = values_of(found, type_name)
    assert torch.isfinite(values).all() and not values[1].any()
    assert (values[0, 5] - weight[0, 5]).abs() < 0.75 * found.step[0, 0].abs()
    assert torch.equal(take(put(found, type_name), type_name).codes, found.codes)


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K"])
def test_rows_come_in_bands_without_a_seam(type_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, coded = _case(type_name, 17, 2)
    factor, matrix = factor_of(gram, 0.01, True), damped_copy(gram, 0.01)

    def made() -> CodedBlocks:
        return refine_blocks(weight, compensate_codes(weight, coded, type_name, factor), type_name, matrix, 2)

    whole = made()
    refine, seen = module._refine_rows, []
    monkeypatch.setattr(module, "_refine_rows", lambda *given: seen.append(len(given[0])) or refine(*given))
    monkeypatch.setattr(products, "BAND_VALUES", 4 * weight.shape[1])
    bands = made()
    assert sum(seen) == 17 and set(seen) == {3, 4}
    assert (bands.codes != whole.codes).float().mean() < 0.01
    assert (bands.level != whole.level).float().mean() < 0.02
