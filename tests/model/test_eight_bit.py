"""Linears that multiply in 8-bit integers: coded once behind each assignment, by the first inputs."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from quantkit import device as devices
from quantkit.maths import four_bit
from quantkit.maths.affine import quantize_nearest
from quantkit.maths.eight_bit import TRIED, EightBitWeight
from quantkit.maths.four_bit import FourBitWeight
from quantkit.maths.int_products import way
from quantkit.model import eight_bit
from quantkit.model.eight_bit import EightBitLinear, use_eight_bits
from quantkit.tensors import Grid, GroupTensor


def linear() -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(256, 64)
    use_eight_bits([made])
    return made


INPUTS = torch.randn(TRIED, 256, generator=torch.Generator().manual_seed(1))


def test_only_plain_linears_are_taken() -> None:
    class Odd(nn.Linear):
        pass

    odd, norm, plain = Odd(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    use_eight_bits([odd, norm, plain])
    assert (type(odd), type(norm), type(plain)) == (Odd, nn.LayerNorm, EightBitLinear)


def test_outputs_are_near_and_in_the_dtype_that_is_multiplied_in() -> None:
    module = linear()
    with torch.inference_mode():
        exact = INPUTS @ module.weight.T + module.bias
        found = module(INPUTS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = module(INPUTS)
    assert found.dtype == torch.float32 and mixed.dtype == torch.bfloat16
    for values in (found, mixed):
        assert 0 < float((values - exact).norm() / exact.norm()) < 0.02


@torch.inference_mode()
def test_outputs_that_are_added_to_hidden_states_keep_float32() -> None:
    module, wide = linear(), nn.Linear(256, 64)
    wide.load_state_dict(module.state_dict())
    use_eight_bits([wide], wide=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed, found = module(INPUTS), wide(INPUTS)
    assert found.dtype == torch.float32 and torch.equal(found.bfloat16(), mixed) and not torch.equal(found, mixed)


@torch.inference_mode()
@pytest.mark.parametrize("left", [True, False])
def test_hidden_states_are_added_in_the_place_of_the_outputs(left: bool) -> None:
    wide = linear()
    wide.wide = True
    states = torch.randn(INPUTS.shape[0], 64)
    outputs = wide(INPUTS)
    place, wanted = outputs.data_ptr(), torch.add(outputs, states)
    assert type(wanted) is Tensor and wanted.data_ptr() != place, "whoever does not add leaves it as it is"
    found = states + outputs if left else outputs + states
    assert type(found) is Tensor and found.data_ptr() == place and torch.equal(found, wanted)
    again = found + wide(INPUTS)
    assert again.data_ptr() != found.data_ptr() and torch.equal(found, wanted), "a sum is nobody's to write over"
    for other in (2.0, states[:1], states.double()):
        outputs = wide(INPUTS)
        kept = outputs.clone()
        found = other + outputs if left else outputs + other
        assert torch.equal(found, torch.add(kept, other)) and torch.equal(outputs, kept)


@torch.inference_mode()
def test_coded_once_and_again_for_another_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    code = eight_bit.eight_bit_weight
    monkeypatch.setattr(eight_bit, "eight_bit_weight", lambda *given: seen.append(1) or code(*given))
    module = linear()
    weight = module.weight.detach()
    first = module(INPUTS)
    assert torch.equal(module(INPUTS), first) and len(seen) == 1
    assert module.weight.is_meta and module.weight.shape == weight.shape, "not held beside its codes"
    module.load_state_dict({"weight": weight * 2, "bias": module.bias * 2}, assign=True)
    assert torch.allclose(module(INPUTS), first * 2, rtol=1e-5, atol=1e-5) and len(seen) == 2
    twin = copy.deepcopy(module).to_empty(device="meta")
    twin.load_state_dict({"weight": weight, "bias": module.bias / 2}, assign=True)
    assert torch.allclose(twin(INPUTS), first, rtol=1e-5, atol=1e-5) and len(seen) == 3
    module.to_empty(device="meta")
    assert module._coded is None, "the memory of a block is given back with it"


def readers(*rows: int) -> list[EightBitLinear]:
    """Linears of one input."""
    torch.manual_seed(0)
    made = [nn.Linear(256, count) for count in rows]
    use_eight_bits(made)
    return made  # type: ignore[return-value]


@torch.inference_mode()
def test_linears_of_one_input_share_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, code = [], EightBitWeight.coded
    monkeypatch.setattr(EightBitWeight, "coded", lambda *given: rounded.append(1) or code(*given))
    linears = readers(64, 32, 48)
    exact = [nn.functional.linear(INPUTS, one.weight, one.bias) for one in linears]
    rounded.clear()
    for _ in range(2):
        for one, wanted in zip(linears, exact, strict=True):
            assert float((one(INPUTS) - wanted).norm() / wanted.norm()) < 0.02
    assert len(rounded) == 3 + 2, "for each linear as it was tried, then once for all of them"
    assert linears[0].readers._read is None, "nothing is held once the last one has come"
    linears[0](INPUTS)
    other = linears[1](2 * INPUTS)
    torch.testing.assert_close(other, 2 * exact[1] - linears[1].bias, rtol=0.1, atol=0.05)


@torch.inference_mode()
def test_copies_share_among_themselves_and_go_when_nobody_has_them() -> None:
    linears = nn.ModuleList(readers(64, 32))
    first = [one(INPUTS) for one in linears]
    weights = [torch.randn(count, 256) for count in (64, 32)]
    twin = copy.deepcopy(linears)
    for one, weight in zip(twin, weights, strict=True):
        one.load_state_dict({"weight": weight, "bias": one.bias}, assign=True)
    assert twin[0].readers is twin[1].readers is not linears[0].readers
    found = [one(INPUTS) for one in twin]
    for one, weight, bias in zip(found, weights, (one.bias for one in twin), strict=True):
        exact = nn.functional.linear(INPUTS, weight, bias)
        assert float((one - exact).norm() / exact.norm()) < 0.02
    assert all(torch.equal(one(INPUTS), before) for one, before in zip(linears, first, strict=True))
    watched = weakref.ref(twin[0])
    gc.disable()
    try:
        del twin, one
        assert watched() is None, "a block's weights are not to wait for the garbage collector"
    finally:
        gc.enable()


@torch.inference_mode()
def test_inputs_are_not_held_for_linears_that_go_without_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    code, linears = eight_bit.eight_bit_weight, readers(64, 32)
    monkeypatch.setattr(
        eight_bit, "eight_bit_weight", lambda weight, *rest: code(weight, *rest) if len(weight) == 64 else None
    )
    for one in linears:
        one(INPUTS)
    assert linears[1]._coded is not None and linears[1]._coded[1] is None and linears[0].readers._read is None


@torch.inference_mode()
def test_a_weight_that_came_later_has_a_balance_of_its_own() -> None:
    linears = readers(64, 32)
    scale = torch.logspace(-2, 2, 256)
    linears[1].load_state_dict({"weight": linears[1].weight * scale, "bias": linears[1].bias}, assign=True)
    inputs = INPUTS / scale  # balanced by these weights alone
    weight, bias = linears[1].weight.detach(), linears[1].bias
    for one in linears:
        one(INPUTS)
    linears[1].load_state_dict({"weight": weight, "bias": bias}, assign=True)
    exact = nn.functional.linear(inputs, weight, bias)
    assert float((linears[1](inputs) - exact).norm() / exact.norm()) < 0.02
    alone = readers(32)[0]
    alone.load_state_dict({"weight": weight, "bias": bias}, assign=True)
    assert torch.equal(alone(inputs), linears[1](inputs))


@torch.inference_mode()
def test_a_gated_activation_is_that_of_two_linears_and_a_product() -> None:
    gate, up = readers(64, 64)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            gates = gate(INPUTS)
            wanted = nn.functional.silu(gates.double()) * up(INPUTS).double()
            found = up.gate(INPUTS, gates)
        if not way().gates:
            assert found is None
            continue
        assert found is gates and found.dtype == dtype
        assert float((found.double() - wanted).abs().max()) <= float(wanted.abs().max()) * 2.0**-8
    few = INPUTS[:2]
    up._coded = None
    assert readers(64)[0].gate(few, few[:, :64].clone()) is None, "too few to code by"


@torch.inference_mode()
def test_where_eight_bits_do_not_do_the_linear_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    module = linear()
    monkeypatch.setattr(eight_bit, "eight_bit_weight", lambda *_: None)
    assert torch.equal(module(INPUTS), nn.functional.linear(INPUTS, module.weight, module.bias))


@torch.inference_mode()
def test_a_handful_of_tokens_neither_codes_the_weight_nor_is_multiplied_in_eight_bits() -> None:
    module = linear()
    few = INPUTS[:-1]
    exact = nn.functional.linear(few, module.weight, module.bias)
    assert torch.equal(module(few), exact) and module._coded is None
    module(INPUTS)
    assert not torch.equal(module(few), exact), "behind enough of them it is"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_half_precision_is_the_same_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = linear(), linear()
    stored = wide.weight.detach().to(dtype)
    narrow.load_state_dict({"weight": stored, "bias": narrow.bias}, assign=True)
    wide.load_state_dict({"weight": stored.float(), "bias": wide.bias}, assign=True)
    assert torch.equal(narrow(INPUTS), wide(INPUTS)) and narrow(INPUTS).dtype == torch.float32
    few = INPUTS[:2]
    narrow.load_state_dict({"weight": stored, "bias": narrow.bias}, assign=True)
    wide.load_state_dict({"weight": stored.float(), "bias": wide.bias}, assign=True)
    assert torch.equal(narrow(few), wide(few)), "too few to code by"
    assert torch.equal(narrow(INPUTS), wide(INPUTS)) and narrow.weight.is_meta, "what was coded before is no refusal"
    for module in (narrow, wide):
        module.load_state_dict({"weight": stored.to(module.bias.dtype), "bias": module.bias}, assign=True)
    narrow.load_state_dict({"weight": stored, "bias": narrow.bias}, assign=True)
    monkeypatch.setattr(eight_bit, "eight_bit_weight", lambda *_: None)
    assert torch.equal(narrow(INPUTS), wide(INPUTS))
    assert narrow._coded is not None and narrow._coded[0] is narrow.weight, "not tried again"


@torch.inference_mode()
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_a_weight_in_float16_is_the_same_in_what_the_run_multiplies_in(
    few: bool, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if refused:
        monkeypatch.setattr(eight_bit, "eight_bit_weight", lambda *_: None)
    stored, rounded = linear(), linear()
    weight = stored.weight.detach().half()
    stored.load_state_dict({"weight": weight, "bias": stored.bias}, assign=True)
    rounded.load_state_dict({"weight": weight.bfloat16(), "bias": rounded.bias}, assign=True)
    for inputs in ([INPUTS[:2]] if few else []) + [INPUTS, INPUTS]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(stored(inputs), rounded(inputs))
    assert stored.weight.is_meta != refused
    assert stored.weight.dtype == (torch.bfloat16 if few or refused else torch.float16)


def rounded(symmetric: bool = True) -> GroupTensor:
    return quantize_nearest(torch.randn(64, 256, generator=torch.Generator().manual_seed(2)), Grid(4, 64, symmetric))


has_avx2 = pytest.mark.skipif(not devices.has_avx2(), reason="the loops are AVX2's")


@has_avx2
@torch.inference_mode()
def test_a_rounded_weight_is_multiplied_by_its_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "eight_bit_weight", lambda *_: pytest.fail("codes are there"))
    module, weight = linear(), rounded()
    module.take(weight)
    assert module.weight.is_meta and module.weight.shape == (64, 256)
    exact = INPUTS @ weight.dequantize().T + module.bias
    found = module(INPUTS)
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.01
    assert isinstance(module._coded[1], FourBitWeight) and module._rounded is None and module.weight.is_meta
    assert torch.equal(module(INPUTS), found)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(INPUTS), found.bfloat16())
    again = rounded(symmetric=False)
    module.take(again)
    assert torch.equal(module(INPUTS), four_bit.four_bit_weight(again, module.bias, INPUTS)(INPUTS))
    module.to_empty(device="meta")
    assert module._coded is None


@has_avx2
@torch.inference_mode()
def test_where_codes_do_not_do_the_weight_is_multiplied_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "four_bit_weight", lambda *_: None)
    module, other, weight = linear(), linear(), rounded()
    module.take(weight)
    other.load_state_dict({"weight": weight.dequantize(), "bias": module.bias}, assign=True)
    assert torch.equal(module(INPUTS), other(INPUTS))
    assert isinstance(module._coded[1], EightBitWeight) and module._rounded is None
    module.take(weight)
    few = INPUTS[:-1]
    assert torch.equal(module(few), nn.functional.linear(few, weight.dequantize(), module.bias)), "too few to try"
    monkeypatch.undo()
    module(INPUTS)
    assert isinstance(module._coded[1], FourBitWeight), "the codes stay until there are enough"


@has_avx2
@torch.inference_mode()
def test_what_is_assigned_behind_codes_counts() -> None:
    module, other = linear(), linear()
    module.take(rounded())
    module.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(module(INPUTS), other(INPUTS))
    module.take(rounded())
    module.to_empty(device="meta")
    assert module._rounded is None
