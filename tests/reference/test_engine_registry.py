"""The reference engines as data: what they are asked, what they refuse, what their environments hold."""

from __future__ import annotations

import re

import pytest

from quantkit.errors import UsageError
from quantkit.reference.engines import OWN, REFERENCE_ENGINES, Request, chosen_engines

GPTQ = Request("gptq", 4, True, 64)


def test_an_engine_says_what_it_does_not_do() -> None:
    engine = REFERENCE_ENGINES["autoawq"]
    assert engine.refuses(GPTQ, gpu=True) == "autoawq does not do gptq"
    assert engine.refuses(Request("awq", 4, True, 64), gpu=True) == "autoawq does not do awq 4-bit g64 sym"
    assert engine.refuses(Request("awq", 4, False, 64), gpu=False) is None


def test_an_engine_that_needs_a_gpu_says_so_only_without_one() -> None:
    engine = REFERENCE_ENGINES["auto-gptq"]
    assert engine.refuses(GPTQ, gpu=False) == "auto-gptq 0.7.1 refuses to quantize without CUDA"
    assert engine.refuses(GPTQ, gpu=True) is None


def test_block_sizes_count_where_an_engine_has_one() -> None:
    engine = REFERENCE_ENGINES["bitsandbytes"]
    assert engine.refuses(Request("nf4", None, None, 64), gpu=False) is None
    assert engine.refuses(Request("nf4", None, None, 32), gpu=False) == "bitsandbytes does not do nf4 g32"
    assert engine.refuses(Request("int8", None, None, None), gpu=False) is None


def test_unknown_engines_are_all_named() -> None:
    with pytest.raises(UsageError, match='"gptmodel": did you mean gptqmodel.*\n.*"x"'):
        chosen_engines(["quantkit", "gptmodel", "x"])
    with pytest.raises(UsageError, match="none given"):
        chosen_engines([])
    assert chosen_engines(["gptqmodel", OWN, "gptqmodel"]) == ["gptqmodel", OWN]


@pytest.mark.parametrize("name", [name for name, engine in REFERENCE_ENGINES.items() if engine.pins])
def test_every_package_of_an_environment_is_pinned(name: str) -> None:
    engine = REFERENCE_ENGINES[name]
    lines = engine.requirements.splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    pins = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}
    assert pins[name] == engine.version
    assert "torch" in pins
