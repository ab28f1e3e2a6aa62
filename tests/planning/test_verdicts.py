"""What engines take, by the rules file; every rule is asked for by a recipe that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from conftest import write_tiny_llama
from quantkit.errors import RecipeError
from quantkit.formats import FORMATS
from quantkit.jobs import quantize
from quantkit.model.reader import open_source
from quantkit.plan import plan_linears
from quantkit.planning.rules import FormatName, engines
from quantkit.planning.verdicts import EngineVerdict, check_target, facts_of, verdicts
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.sections import TargetSection

GPUS = "target.tensor_parallel"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", hidden_size=256, intermediate_size=384)


def ask(folder: Path, method: dict[str, object], gpus: int = 1, **sections: object) -> dict[str, EngineVerdict]:
    target = {"engine": "vllm", "tensor_parallel": gpus}
    recipe = Recipe.model_validate({"method": method, "target": target, **sections})
    source = open_source(str(folder))
    found = verdicts(facts_of(recipe, source, plan_linears(recipe, source)))
    return {verdict.engine: verdict for verdict in found}


GPTQ = {"name": "gptq", "group_size": 64}
AWQ = {"name": "awq", "group_size": 64}
PACKED = {"format": {"name": "compressed-tensors"}}
G16 = {"group_size": 16}
CASES = [
    (GPTQ, 1, {}, {"vllm": "takes", "transformers": "takes", "tgi": "takes", "llama.cpp": "refuses"}),
    (GPTQ, 1, {}, {"tensorrt-llm": "refuses", "deepspeed": "refuses"}),
    (GPTQ | {"symmetric": False}, 1, {}, {"vllm": "refuses", "sglang": "slowly", "tgi": "slowly"}),
    (GPTQ | {"bits": 3}, 1, {}, {"vllm": "refuses", "sglang": "slowly", "tgi": "slowly"}),
    (GPTQ | {"bits": 8}, 1, {}, {"vllm": "takes"}),
    (GPTQ | G16, 1, {}, {"vllm": "refuses", "sglang": "slowly"}),
    (GPTQ | {"group_size": None}, 2, {}, {"vllm": "takes"}),
    (GPTQ | {"group_size": 128}, 2, {}, {"vllm": "refuses", "tgi": "refuses", "sglang": "refuses"}),  # 192 columns each
    (GPTQ, 3, {}, {"vllm": "refuses", "sglang": "refuses", "tgi": "refuses"}),  # four heads
    (GPTQ, 1, {"model": {"dtype": "float32"}}, {"vllm": "slowly", "tgi": "slowly"}),
    (AWQ, 2, {}, {"vllm": "takes"}),
    (AWQ | G16, 1, {}, {"vllm": "slowly"}),
    (AWQ | {"zero_point": False}, 1, {}, {"vllm": "slowly"}),
    (AWQ | {"group_size": None}, 2, {}, {"vllm": "refuses"}),
    (GPTQ, 1, PACKED, {"vllm": "takes", "transformers": "slowly", "tgi": "takes"}),
    (GPTQ | {"bits": 3}, 1, PACKED, {"vllm": "refuses", "sglang": "refuses", "tgi": "refuses"}),
    (AWQ, 1, PACKED | {"overrides": {"v_proj$": {"group_size": 32}}}, {"transformers": "refuses"}),
    ({"name": "nf4"}, 1, {}, {"vllm": "slowly", "transformers": "takes", "tgi": "refuses"}),
    ({"name": "nf4"}, 2, {}, {"vllm": "refuses", "sglang": "refuses", "transformers": "slowly"}),
    ({"name": "int8"}, 1, {}, {"transformers": "slowly"}),
    ({"name": "ggml", "type": "q4_k_m"}, 1, {}, {"llama.cpp": "takes", "vllm": "slowly", "transformers": "slowly"}),
    ({"name": "ggml", "type": "bf16"}, 1, {}, {"llama.cpp": "slowly"}),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_verdicts(case: int, model: Path) -> None:
    method, gpus, sections, expected = CASES[case]
    found = ask(model, method, gpus, **sections)
    assert {engine: found[engine].verdict for engine in expected} == expected
    for verdict in found.values():
        assert verdict.reasons or verdict.verdict == "takes"
        assert all(reason.source for reason in verdict.reasons)


def narrow(tiny_llama: Path) -> list[dict[str, EngineVerdict]]:
    """Shapes that 64 and 128 do not divide, in every grouped format."""
    small = {"group_size": 32}
    return [ask(tiny_llama, GPTQ | small), ask(tiny_llama, AWQ | small), ask(tiny_llama, GPTQ | small, **PACKED)]


def test_every_rule_is_reached_by_a_case(model: Path, tiny_llama: Path) -> None:
    asked = [ask(model, method, gpus, **sections) for method, gpus, sections, _ in CASES]
    reached = {
        (verdict.engine, reason.why)
        for found in [*asked, *narrow(tiny_llama)]
        for verdict in found.values()
        for reason in verdict.reasons
    }
    rules = {(engine.name, rule.why) for engine in engines() for rule in engine.rules}
    assert rules - reached == set()


def test_narrow_shapes_are_named(tiny_llama: Path) -> None:
    found = narrow(tiny_llama)
    assert [verdicts["tgi"].verdict for verdicts in found] == ["refuses"] * 3
    reason = found[0]["sglang"].reasons[0]
    assert found[0]["sglang"].verdict == "slowly"
    assert "model.layers.0.self_attn.q_proj" in reason.layers  # 64 columns
    assert "model.layers.0.mlp.down_proj" not in reason.layers  # 64 rows, 128 columns
    assert reason.text().endswith(f"and {len(reason.layers) - 3} more")


def test_names_are_those_of_the_recipe_and_of_the_formats() -> None:
    assert [engine.name for engine in engines()] == list(get_args(TargetSection.model_fields["engine"].annotation))
    assert set(get_args(FormatName)) == set(FORMATS)


def test_a_target_that_takes_it_is_silent_and_none_is_asked_for_nothing(model: Path) -> None:
    source = open_source(str(model))
    for target in (None, {"engine": "vllm"}):
        recipe = Recipe.model_validate({"method": {"name": "gptq"}, "target": target})
        check_target("mine", recipe, source, plan_linears(recipe, source))


def test_quantize_refuses_at_once_what_the_target_would(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        quantize(
            "nf4",
            model=str(model),
            out=tmp_path / "out",
            settings=["target.engine=vllm", f"{GPUS}=2"],
            device="cpu",
            force=False,
            progress=Progress(quiet=True),
        )
    assert "nf4: target: vLLM on 2 GPUs refuses this: prequantized bitsandbytes weights" in raised.value.message
    assert "bitsandbytes_loader.py" in raised.value.message
    assert raised.value.hint == "tensor_parallel 1, pipeline parallelism, or another format"
    assert not (tmp_path / "out").exists()
