"""Words as the readers' own packers write them, for bit-exact tests of ours. Run in an environment of the reader, not
the project's:

    python make_golden.py gptqmodel gptqmodel.safetensors          # gptqmodel 7.6.0
    python make_golden.py autoawq autoawq.safetensors AUTOAWQ_DIR  # the unpacked source of autoawq 0.2.9
    python make_golden.py compressed compressed_tensors.safetensors  # compressed-tensors 0.15.0.1

Each case holds codes [out, in], scale and zero [out, groups] and g_idx [in] as quantkit has them, and the words made
from the weight that they stand for.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file


def case(
    seed: int,
    bits: int,
    out_features: int,
    in_features: int,
    group_size: int,
    symmetric: bool,
    act_order: bool,
    lowest_zero: int = 1,
):
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    codes = torch.randint(0, 2**bits, (out_features, in_features), generator=generator)
    scale = (torch.rand(out_features, groups, generator=generator) * 0.05 + 0.01).half().float()
    zero = torch.randint(lowest_zero, 2**bits, (out_features, groups), generator=generator)
    if symmetric:
        zero.fill_(2 ** (bits - 1))
    g_idx = torch.arange(in_features) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    weight = (codes - zero[:, g_idx]) * scale[:, g_idx]
    linear = torch.nn.Linear(in_features, out_features, bias=False)
    linear.weight.data = weight
    kept = {
        "codes": codes.to(torch.uint8),
        "scale": scale,
        "zero": zero.to(torch.uint8),
        "g_idx": g_idx.to(torch.int32),
    }
    return linear, kept, scale, zero, g_idx


GPTQ_CASES = {
    "4-sym": (4, 64, 96, 32, True, False),
    "4-asym": (4, 32, 64, 16, False, False),
    "4-sym-actorder": (4, 32, 64, 32, True, True),
    "8-sym": (8, 32, 64, 32, True, False),
    "8-asym": (8, 32, 32, 16, False, False),
    "2-asym": (2, 32, 64, 32, False, False),
    "3-asym": (3, 64, 96, 32, False, False),
    "3-sym-actorder": (3, 32, 64, 32, True, True),
    # gptqmodel's v1 lets a zero of 0 borrow from the next field, and its reader gives it back
    "2-asym-zeros0": (2, 32, 64, 16, False, False, 0),
    "3-asym-zeros0": (3, 32, 64, 16, False, False, 0),
    "4-asym-zeros0": (4, 32, 64, 16, False, False, 0),
    "8-asym-zeros0": (8, 32, 64, 16, False, False, 0),
}


def gptqmodel() -> dict[str, torch.Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    made = {}
    for seed, (name, settings) in enumerate(GPTQ_CASES.items()):
        bits, out_features, in_features, group_size, symmetric, act_order = settings[:6]
        linear, kept, scale, zero, g_idx = case(seed, *settings)
        if name.endswith("zeros0"):
            zero[::3] = 0  # many of them, at 8 bits too
            kept["zero"] = zero.to(torch.uint8)
            linear.weight.data = (kept["codes"].long() - zero[:, g_idx]) * scale[:, g_idx]
        module = TorchLinear(
            bits=bits,
            group_size=group_size,
            sym=symmetric,
            desc_act=act_order,
            in_features=in_features,
            out_features=out_features,
            bias=False,
            format=FORMAT.GPTQ_V2,
        )
        module.pack_original(linear, scale, zero.float(), g_idx.to(torch.int32))
        words = {"qweight": module.qweight.clone(), "scales": module.scales.clone(), "qzeros_v2": module.qzeros.clone()}
        config = QuantizeConfig(bits=bits, group_size=group_size, sym=symmetric, desc_act=act_order)
        convert_gptq_v2_to_v1_format_module(module, config)
        words["qzeros_v1"] = module.qzeros.clone()
        made.update({f"{name}/{key}": tensor.contiguous() for key, tensor in {**kept, **words}.items()})
    return made


AWQ_CASES = {
    "asym": (4, 64, 96, 32, False, False),
    "wide": (4, 32, 128, 128, False, False),
    "sym": (4, 96, 64, 16, True, False),
}


def autoawq(source: str) -> dict[str, torch.Tensor]:
    # only the packing module is wanted, not the package's imports of kernels and of old transformers
    package = types.ModuleType("awq")
    package.__path__ = [str(Path(source) / "awq")]
    sys.modules["awq"] = package
    for name, content in {
        "awq.utils.module": {"try_import": lambda _: (None, "not installed")},
        "awq.utils.utils": {"get_best_device": lambda: "cpu"},
        "awq.utils.packing_utils": {"dequantize_gemm": None},
    }.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__dict__.update(content)
    sys.modules["awq.modules"] = types.ModuleType("awq.modules")
    sys.modules["awq.modules"].__path__ = []
    import importlib.util

    spec = importlib.util.spec_from_file_location("gemm", Path(source) / "awq" / "modules" / "linear" / "gemm.py")
    gemm = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gemm)
    made = {}
    for seed, (name, (bits, out_features, in_features, group_size, symmetric, _)) in enumerate(AWQ_CASES.items()):
        linear, kept, scale, zero, _ = case(100 + seed, bits, out_features, in_features, group_size, symmetric, False)
        # AutoAWQ takes scales and zeros as [groups, out]
        module = gemm.WQLinear_GEMM.from_linear(
            linear, bits, group_size, False, scale.T.contiguous(), zero.T.float().contiguous()
        )
        words = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": module.scales}
        made.update({f"{name}/{key}": tensor.contiguous() for key, tensor in {**kept, **words}.items()})
    return made


COMPRESSED_CASES = {
    "4-sym": (4, 40, 96, 32, True, False, 0),
    "4-asym": (4, 33, 96, 32, False, False, 0),
    "4-asym-channel": (4, 33, 44, 44, False, False, 0),
    "8-sym": (8, 33, 50, 10, True, False, 0),
    "8-asym": (8, 33, 50, 10, False, False, 0),
    "4-sym-actorder": (4, 40, 96, 32, True, True, 0),
    "4-asym-actorder": (4, 33, 96, 32, False, True, 0),
}


def compressed() -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    made = {}
    for seed, (name, settings) in enumerate(COMPRESSED_CASES.items()):
        bits, _, in_features, group_size, symmetric, act_order, _ = settings
        linear, kept, scale, zero, g_idx = case(200 + seed, *settings)
        channel = group_size == in_features
        weights = QuantizationArgs(
            num_bits=bits,
            symmetric=symmetric,
            strategy="channel" if channel else "group",
            group_size=None if channel else group_size,
            actorder="group" if act_order else None,
        )
        given = {
            "weight": linear.weight.data,
            "weight_scale": scale,
            "weight_zero_point": (zero - 2 ** (bits - 1)).to(torch.int8),
        }
        if act_order:
            given["weight_g_idx"] = g_idx.to(torch.int32)
        words = PackedQuantizationCompressor.compress(given, QuantizationScheme(targets=["Linear"], weights=weights))
        words["weight_scale"] = words["weight_scale"].half()
        made.update({f"{name}/{key}": tensor.contiguous() for key, tensor in {**kept, **words}.items()})
    return made


if __name__ == "__main__":
    makers = {"gptqmodel": gptqmodel, "autoawq": lambda: autoawq(sys.argv[3]), "compressed": compressed}
    tensors = makers[sys.argv[1]]()
    save_file(tensors, sys.argv[2])
    print(f"{len(tensors)} tensors, {Path(sys.argv[2]).stat().st_size} bytes")
