"""Every recipe that ships loads, says what it is for, and makes what its name promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.recipe import Suite, list_recipes, load_any, load_recipe, load_suite, recipe_text, suite_recipes

FILES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
ASKED = {
    "int8", "nf4", "nf4-double", "awq-4bit-g128", "gptq-4bit-g128", "gptq-4bit-g64", "gptq-8bit", "gguf-q8_0",
    "gguf-q4_0", "demo", "table",
}  # fmt: skip


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_and_its_header_says_what_it_is_for(path: Path) -> None:
    loaded = load_any(path.stem)
    text = recipe_text(path.stem)
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert 2 <= len(header) <= 4
    assert text.startswith("#") and all(len(line) <= 120 for line in header)
    if isinstance(loaded, Suite):
        assert loaded.name == path.stem
        assert len(suite_recipes(loaded)) == len(loaded.recipes)


def test_the_list_has_every_file_and_everything_that_was_asked_for() -> None:
    listed = {recipe.name: recipe.kind for recipe in list_recipes()}
    assert set(listed) == {path.stem for path in FILES}
    assert set(listed) >= ASKED
    assert {name for name, kind in listed.items() if kind == "suite"} == {"demo", "table"}
    assert all(recipe.description for recipe in list_recipes())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8", {"name": "int8", "threshold": 6.0}),
        ("nf4", {"name": "nf4", "double_quant": False, "compute_dtype": "float16"}),
        ("nf4-double", {"name": "nf4", "double_quant": True, "compute_dtype": "float16"}),
        ("awq-4bit-g128", {"name": "awq", "bits": 4, "group_size": 128, "zero_point": True}),
        ("awq-4bit-g64", {"name": "awq", "bits": 4, "group_size": 64, "zero_point": True}),
        ("gptq-4bit-g128", {"name": "gptq", "bits": 4, "group_size": 128, "symmetric": True, "act_order": True}),
        ("gptq-4bit-g64", {"name": "gptq", "bits": 4, "group_size": 64, "symmetric": True, "act_order": True}),
        ("gptq-8bit", {"name": "gptq", "bits": 8, "group_size": 128, "symmetric": True, "act_order": True}),
        ("gptq-w4a16", {"name": "gptq", "bits": 4, "group_size": 128, "symmetric": True, "act_order": True}),
        ("awq-w4a16-asym", {"name": "awq", "bits": 4, "group_size": 128, "zero_point": True}),
        ("rtn-w8a16", {"name": "rtn", "bits": 8, "group_size": 128, "symmetric": True}),
        ("gguf-q8_0", {"name": "ggml", "type": "q8_0"}),
        ("gguf-q4_0", {"name": "ggml", "type": "q4_0"}),
    ],
)
def test_settings(name: str, expected: dict[str, object]) -> None:
    method = load_recipe(name).method.model_dump()
    assert {key: method[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "same"), [("gptq-w4a16", "gptq-4bit-g128"), ("awq-w4a16-asym", "awq-4bit-g128"), ("rtn-w8a16", None)]
)
def test_recipes_for_vllm_make_the_weights_of_the_others(name: str, same: str | None) -> None:
    recipe = load_recipe(name)
    assert recipe.resolved_format.name == "compressed-tensors"
    if same is not None:
        other = load_recipe(same)
        assert (recipe.method, recipe.calibration) == (other.method, other.calibration)


@pytest.mark.parametrize("name", ["demo", "table"])
def test_the_suites_cover_all_five_methods(name: str) -> None:
    suite = load_suite(name)
    methods = {recipe.method.name for _, recipe in suite_recipes(suite)}
    assert methods == {"int8", "nf4", "awq", "gptq", "ggml"}
    extra = ["speculative"] if name == "table" else []
    assert [bench.name for bench in suite.bench] == ["memory", "throughput", "divergence", "accuracy", *extra]


def test_the_demo_takes_group_size_64_and_no_network() -> None:
    suite = load_suite("demo")
    sizes = {getattr(recipe.method, "group_size", 64) for _, recipe in suite_recipes(suite)}
    assert sizes == {64}
    assert {recipe.calibration.set for _, recipe in suite_recipes(suite)} == {"pydoc"}
    assert [bench.tasks for bench in suite.bench if bench.name == "accuracy"] == [("basics",)]


def test_the_table_asks_stock_tasks() -> None:
    bench = next(bench for bench in load_suite("table").bench if bench.name == "accuracy")
    assert bench.tasks == ("arc_easy", "piqa", "lambada_openai") and bench.limit == 200
