"""gptqmodel as an engine: what it asks for when absent; its logits are those of the decoded weights when present."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oracles.memory_source import MemorySource, store
from quantkit.engines import DECODED, gptqmodel
from quantkit.engines.gptqmodel import GPTQModel
from quantkit.formats.autoawq import AutoAWQ
from quantkit.formats.autogptq import AutoGPTQ
from quantkit.formats.base import Format
from quantkit.methods.rtn import RTN

CPU = torch.device("cpu")


def test_when_a_package_is_absent_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptqmodel, "find_spec", lambda name: None if name == "optimum" else object())
    assert GPTQModel().available() == 'pip install "gptqmodel==7.6.0" "optimum==2.3.0"'
    monkeypatch.setattr(gptqmodel, "find_spec", lambda name: object())
    assert GPTQModel().available() is None


@pytest.mark.engine
@pytest.mark.skipif(GPTQModel().available() is not None, reason="gptqmodel and optimum are not installed")
@pytest.mark.parametrize(("form", "symmetric"), [(AutoGPTQ(), True), (AutoAWQ(), False)])
def test_logits_are_those_of_the_decoded_weights(
    form: Format, symmetric: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    method = RTN(bits=4, group_size=32, symmetric=symmetric)
    store(MemorySource(tiny_llama), form, tmp_path / "q", method, torch.float16)
    for file in tiny_llama.iterdir():
        if file.name.startswith("tokenizer"):
            (tmp_path / "q" / file.name).write_bytes(file.read_bytes())
    session = GPTQModel().load(tmp_path / "q", CPU, torch.float32)
    assert session.details["kernels"], "at least one linear is quantized"
    ids = torch.randint(384, (24,), generator=torch.Generator().manual_seed(1))
    logits = session.logits(ids)
    expected = DECODED.load(tmp_path / "q", CPU, torch.float32).logits(ids)
    # its kernels for CPUs compute in bfloat16, which keeps 8 bits
    assert (logits - expected).norm() / expected.norm() < 0.03
    session.close()
