"""Recipes of one comparison: what they may differ in, and how it is said when they differ in more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import RecipeError, UsageError
from quantkit.recipe import Recipe, load_recipe
from quantkit.reference.together import calibrates, check_engines, shared_sections

ROOT = Path(__file__).resolve().parents[2]
GPTQ = {"name": "gptq", "bits": 4, "group_size": 32}
FILES = ["p1.yaml", "p2.yaml", "p3.yaml"]


def _recipe(method: object = GPTQ, model: dict[str, Any] | None = None, **calibration: Any) -> Recipe:
    given = {"set": "pydoc", "sequences": 96, "length": 512} | calibration
    return Recipe.model_validate({"method": method, "model": model or {}, "calibration": given})


def _refused(*recipes: Recipe, model: str | None = None) -> tuple[list[str], str]:
    with pytest.raises(RecipeError) as caught:
        shared_sections(FILES[: len(recipes)], recipes, model)
    assert caught.value.hint is not None
    return caught.value.message.split("\n"), caught.value.hint


def _shared(*recipes: Recipe, model: str | None = None) -> Any:
    return shared_sections(FILES[: len(recipes)], recipes, model)[0]


def test_recipes_may_differ_in_all_but_the_token_ids() -> None:
    first = _recipe(GPTQ | {"propagate": "unquantized"}, {"dtype": "float32"})
    assert _shared(first, _recipe(precision="float32"), _recipe({"name": "awq"})) == first.calibration
    assert _shared(_recipe(set="texts/a.txt"), _recipe(set="./texts//a.txt")).set == "texts/a.txt"


def test_the_committed_comparisons_can_be_run() -> None:
    files = sorted(str(path) for path in (ROOT / "benchmarks").glob("compare_*.yaml"))
    assert len(files) > 5 and all(shared_sections(files, [load_recipe(file) for file in files], None))


def test_every_key_of_every_recipe_that_asks_for_other_ids_is_named() -> None:
    problems, hint = _refused(_recipe(), _recipe(sequences=16, seed=1), _recipe(set="my text.txt", length=64))
    assert problems == [
        "p2.yaml: calibration.sequences: found 16, expected 96 as in p1.yaml: a comparison has one calibration",
        "p2.yaml: calibration.seed: found 1, expected 0 as in p1.yaml: a comparison has one calibration",
        "p3.yaml: calibration.set: found my text.txt, expected pydoc as in p1.yaml: a comparison has one calibration",
        "p3.yaml: calibration.length: found 64, expected 512 as in p1.yaml: a comparison has one calibration",
    ]
    for setting in ("sequences=96", "seed=0", "set=pydoc", "length=512"):
        assert f"--set calibration.{setting}" in hint
    assert "--set calibration.set='my text.txt'" in _refused(_recipe(set="my text.txt"), _recipe(), _recipe())[1]


def test_a_recipe_without_use_for_a_calibration_has_no_say_in_it() -> None:
    plain = _recipe({"name": "nf4"}, sequences=3)
    assert _shared(_recipe(), plain) == _recipe().calibration
    assert _shared(plain, _recipe()) == _recipe().calibration
    assert _shared(plain, plain) is None
    problems, _ = _refused(plain, _recipe(), _recipe(length=64))
    assert problems == [
        "p3.yaml: calibration.length: found 64, expected 512 as in p2.yaml: a comparison has one calibration"
    ]


def test_a_calibrated_method_of_some_linears_counts() -> None:
    ggml = Recipe.model_validate({"method": {"name": "ggml", "type": "q4_0"}})
    partly = ggml.model_copy(update={"overrides": {"down_proj": {"importance": True}, "q_proj": "skip"}})
    assert not calibrates(ggml) and calibrates(partly)


def test_another_model_is_refused_unless_the_command_line_names_one() -> None:
    one, other = _recipe(model={"id": "me/one"}), _recipe(model={"id": "me/other"})
    problems, hint = _refused(one, other, _recipe())
    assert problems == ["p2.yaml: model.id: found me/other, expected me/one as in p1.yaml: a comparison has one model"]
    assert "--model me/one" in hint
    assert _shared(one, other, model="somewhere") == one.calibration
    assert _shared(one, _recipe(), _recipe(model={"id": "me/one/"})), "who names none or the same asks for no other"
    problems, hint = _refused(one, _recipe(model={"id": "me/one", "revision": "v2"}), one)
    assert problems == ["p2.yaml: model.revision: found v2, expected main as in p1.yaml: a comparison has one model"]
    assert "--set model.revision=main" in hint


def _judged(recipe: Recipe, *sections: dict[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe.model_dump(exclude={"format"}) | {"bench": sections})


def test_a_comparison_has_one_text_to_judge_by() -> None:
    text = {"name": "divergence", "set": "texts/a.txt", "sequences": 4, "length": 64}
    plain, first = _recipe(), _judged(_recipe(), text)
    same = _judged(_recipe({"name": "nf4"}), {"name": "memory"}, text | {"set": "./texts//a.txt"})
    found = shared_sections(FILES, [plain, first, same], None)[1]
    assert found is not None and found.model_dump() == text, "that of the first recipe that has one"
    assert shared_sections(FILES, [plain, plain, _judged(plain, {"name": "memory"})], None)[1] is None
    other = _judged(_recipe(sequences=16), text | {"sequences": 8, "set": "my b.txt"})
    problems, hint = _refused(plain, first, other)
    assert problems == [
        "p3.yaml: calibration.sequences: found 16, expected 96 as in p1.yaml: a comparison has one calibration",
        "p3.yaml: bench.divergence.set: found my b.txt, expected texts/a.txt as in p2.yaml: a comparison has one text "
        "to judge by",
        "p3.yaml: bench.divergence.sequences: found 8, expected 4 as in p2.yaml: a comparison has one text to judge by",
    ]
    assert f"--set 'bench=[{json.dumps(text)}]'" in hint


def test_further_recipes_need_quantkit_among_the_engines() -> None:
    check_engines(["p1.yaml"], ["auto-gptq"], None)
    check_engines(FILES, ["auto-gptq", "quantkit"], None)
    with pytest.raises(UsageError, match=r"^--engines auto-gptq: nothing would run p2\.yaml, p3\.yaml: ") as caught:
        check_engines(FILES, ["auto-gptq"], None)
    assert caught.value.hint and caught.value.hint.startswith("--engines quantkit,auto-gptq, or")


def test_a_limit_of_memory_needs_quantkit_among_the_engines() -> None:
    check_engines(["p1.yaml"], ["auto-gptq", "quantkit"], 10**9)
    with pytest.raises(
        UsageError, match="^--max-memory with --engines auto-gptq: nothing would run under it"
    ) as caught:
        check_engines(["p1.yaml"], ["auto-gptq"], 10**9)
    assert caught.value.hint == "--engines quantkit,auto-gptq, or leave --max-memory out"
