"""Recipes: every problem of a file at once, in the keys that the user wrote, and what overrides and settings do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import RecipeError
from quantkit.methods.gptq import GPTQ
from quantkit.recipe import (
    Recipe,
    Suite,
    json_schema,
    load_any,
    load_recipe,
    load_suite,
    recipe_sha256,
    suite_recipes,
    validate_file,
)

BAD = """\
schema_version: 2
method: {name: gptq, bits: 5, group_size: abc, group_sise: 3, act_order: maybe, damp: 1e-3}
calibratoin: {}
calibration: 3
format: gguf
skip: ["(", lm_head]
overrides: {"mlp.(down": skip}
bench:
  - {name: accuracy, limit: 0, data: {piqa: 2}, tasks: piqa}
  - {name: acuracy}
  - {limit: 3}
  - 3
"""


def problems(text: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return [line.removeprefix(f"{path}: ") for line in validate_file(path)]


def test_every_problem_of_a_file_in_the_users_own_keys(tmp_path: Path) -> None:
    assert sorted(problems(BAD, tmp_path)) == sorted(
        [
            "schema_version: found 2, expected 1",
            "method.bits: found 5, expected 2, 3, 4 or 8",
            'method.group_size: found "abc", expected an integer',
            "method.group_sise: unknown key; did you mean group_size?",
            'method.act_order: found "maybe", expected true or false',
            "calibratoin: unknown key; did you mean calibration?",
            "calibration: found 3, expected a mapping",
            'format: found "gguf", expected a mapping, such as format: {name: gguf}',
            'skip.0: found "(", expected a regular expression: missing ), unterminated subpattern at position 0',
            'overrides."mlp.(down": found "mlp.(down", expected a regular expression: '
            "missing ), unterminated subpattern at position 4",
            "bench.accuracy.limit: found 0, expected 1 or more",
            "bench.accuracy.data.piqa: found 2, expected text",
            'bench.accuracy.tasks: found "piqa", expected a list',
            'bench.acuracy.name: found "acuracy", expected one of memory, throughput, divergence, accuracy, '
            "speculative; did you mean accuracy?",
            "bench.2.name: missing; expected one of memory, throughput, divergence, accuracy, speculative",
            "bench.3: found 3, expected a mapping",
        ]
    )


def test_an_unknown_method_lists_all(tmp_path: Path) -> None:
    assert problems("method: {name: gptk}", tmp_path) == [
        'method.name: found "gptk", expected one of int8, nf4, awq, gptq, ggml, rtn; did you mean gptq?'
    ]
    assert problems("method: {bits: 4}", tmp_path) == [
        "method.name: missing; expected one of int8, nf4, awq, gptq, ggml, rtn"
    ]
    assert problems("seed: 1", tmp_path) == ["method: missing; it has no default"]


def test_a_key_that_is_called_like_the_method_is_told_apart(tmp_path: Path) -> None:
    (line,) = problems("method: {name: gptq, gptq: 3}", tmp_path)
    assert line.startswith("method.gptq: unknown key; expected one of")


@pytest.mark.parametrize(("text", "found"), [("", "nothing"), ("- a", "a list"), ("gptq", "text"), ("3", "a int")])
def test_a_file_that_holds_no_mapping(text: str, found: str, tmp_path: Path) -> None:
    assert problems(text, tmp_path) == [f"found {found}, expected a mapping with keys such as method"]


def test_unknown_names_answer_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="did you mean gptq-4bit-g128"):
        load_recipe("gptq-4bit-g129")
    with pytest.raises(RecipeError, match=r"nowhere/x\.yaml: no such file"):
        load_recipe("nowhere/x.yaml")


def test_a_suite_is_no_recipe_and_the_hint_says_which_verb() -> None:
    with pytest.raises(RecipeError, match="is a suite") as caught:
        load_recipe("demo")
    assert caught.value.hint == "`quantkit run demo` runs all of it"
    with pytest.raises(RecipeError, match="is a recipe") as caught:
        load_suite("nf4")
    assert caught.value.hint == "`quantkit quantize nf4` makes its artifact"
    assert isinstance(load_any("demo"), Suite) and isinstance(load_any("nf4"), Recipe)


# settings


def test_settings_are_parsed_as_yaml_and_validated() -> None:
    changed = load_recipe(
        "gptq-4bit-g128",
        [
            "method.group_size=null",
            "method.act_order=false",
            "calibration.set=texts/own.txt",
            "calibration.sequences=32",
            'overrides."mlp\\.down_proj"={bits: 8}',
            "skip=[lm_head, q_proj]",
            "model.id=a=b",
        ],
    )
    assert changed.method.group_size is None and changed.method.act_order is False  # type: ignore[union-attr]
    assert (changed.calibration.set, changed.calibration.sequences) == ("texts/own.txt", 32)
    assert changed.overrides == {"mlp\\.down_proj": {"bits": 8}}
    assert changed.skip == ("lm_head", "q_proj") and changed.model.id == "a=b"


def test_bad_settings_are_reported_together_and_as_settings() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(
            "gptq-4bit-g128",
            ["method.group=64", "method.bits=x", "foo.bar=1", "method.damp.x=1", "calibration.length=1"],
        )
    assert sorted(caught.value.message.splitlines()) == [
        "--set calibration.length: found 1, expected 8 or more",
        "--set foo: unknown key; expected one of bench, calibration, format, method, model, overrides, "
        "schema_version, seed, skip, target",
        '--set method.bits: found "x", expected 2, 3, 4 or 8',
        "--set method.damp.x: method.damp is a single value without keys of its own",
        "--set method.group: unknown key; did you mean group_size?",
    ]


@pytest.mark.parametrize("setting", ["method.bits", "=3", "method..bits=3", ".bits=3", "method.=3", ""])
def test_a_setting_needs_a_key_and_a_value(setting: str) -> None:
    with pytest.raises(RecipeError, match="found no KEY=VALUE"):
        load_recipe("gptq-4bit-g128", [setting])


def test_entries_of_a_list_are_addressed_by_name_or_position() -> None:
    suite = load_suite("demo", ["bench.accuracy.limit=100", "bench.0.name=memory"])
    assert [bench.limit for bench in suite.bench if bench.name == "accuracy"] == [100]
    with pytest.raises(RecipeError, match=r'--set bench\.acuracy\.limit: no entry "acuracy"; did you mean accuracy\?'):
        load_suite("demo", ["bench.acuracy.limit=1"])


# cross-checks


@pytest.mark.parametrize(
    ("method", "default"),
    [("int8", "bitsandbytes"), ("nf4", "bitsandbytes"), ("awq", "autoawq"), ("gptq", "autogptq"), ("ggml", "gguf")],
)
def test_the_format_follows_from_the_method(method: str, default: str) -> None:
    assert Recipe.model_validate({"method": {"name": method}}).resolved_format.name == default  # type: ignore[attr-defined]


def test_a_format_that_cannot_hold_the_method_is_refused(tmp_path: Path) -> None:
    assert problems("{method: {name: nf4}, format: {name: gguf}}", tmp_path) == [
        "format: gguf cannot hold what nf4 makes, expected bitsandbytes: leave format out"
    ]
    text = "{method: {name: gptq}, overrides: {q_proj: {name: ggml}}}"
    assert problems(text, tmp_path) == [
        "overrides.q_proj: autogptq cannot hold what ggml makes, expected gguf: one artifact has one format"
    ]


def test_overrides_are_validated_as_the_method_they_make(tmp_path: Path) -> None:
    text = "{method: {name: gptq}, overrides: {up_proj: {bits: 9, foo: 1}, gate: 5, down: {name: x}}}"
    assert sorted(problems(text, tmp_path)) == [
        'overrides.down.name: found "x", expected one of int8, nf4, awq, gptq, ggml, rtn',
        'overrides.gate: found 5, expected "skip" or settings of the method, such as {bits: 8}',
        "overrides.up_proj.bits: found 9, expected 2, 3, 4 or 8",
        f"overrides.up_proj.foo: unknown key; expected one of {', '.join(sorted(GPTQ.model_fields))}",
    ]


def test_linears_see_the_inputs_of_one_model(tmp_path: Path) -> None:
    one = "as for other linears: one model runs"
    text = "{method: {name: gptq}, overrides: {down: {propagate: unquantized}, up: {bits: 8, propagate: quantized}}}"
    assert problems(text, tmp_path) == [
        f"overrides.down.propagate: found unquantized, expected quantized {one}",
    ]
    text = "{method: {name: rtn}, overrides: {q: {name: gptq}, k: {name: awq, propagate: unquantized}, v: {bits: 8}}}"
    assert problems(text, tmp_path) == [f"overrides.k.propagate: found unquantized, expected quantized {one}"]
    Recipe.model_validate({"method": {"name": "ggml"}, "overrides": {"down": {"rounding": "gptq"}}})


def test_which_method_a_linear_gets() -> None:
    recipe = Recipe.model_validate(
        {
            "method": {"name": "gptq", "bits": 4, "group_size": 64},
            "overrides": {
                r"layers\.0\.mlp": "skip",
                r"mlp\.down_proj": {"bits": 8},
                r"layers\.1\.": {"name": "rtn", "group_size": 32},
                "down_proj": {"bits": 2},
            },
            "skip": ["lm_head", r"layers\.7\."],
        }
    )

    def label(name: str) -> str | None:
        method = recipe.method_for(name)
        return None if method is None else method.label()

    assert label("lm_head") is None
    assert label("model.layers.7.mlp.down_proj") is None, "skip goes before overrides"
    assert label("model.layers.0.mlp.down_proj") is None, "the first override that matches counts"
    assert label("model.layers.1.mlp.down_proj") == "gptq+scales 8-bit g64 sym act-order"
    assert label("model.layers.1.self_attn.q_proj") == "rtn 4-bit g32 asym", "another method stands alone"
    assert label("model.layers.2.self_attn.q_proj") == "gptq+scales 4-bit g64 sym act-order"


def test_the_hash_sees_values_and_not_their_order() -> None:
    def make(text: str) -> str:
        return recipe_sha256(Recipe.model_validate(json.loads(text)))

    plain = make('{"method": {"name": "gptq", "bits": 4}, "seed": 0}')
    assert plain == make('{"seed": 0, "method": {"bits": 4, "name": "gptq", "group_size": 128}}')
    assert plain != make('{"method": {"name": "gptq", "bits": 8}}')
    assert plain != make('{"method": {"name": "gptq"}, "model": {"id": "a/b"}}')
    assert len(plain) == 64


# suites


def write_suite(folder: Path, **changes: Any) -> Path:
    (folder / "own.yaml").write_text("{method: {name: rtn, bits: 8}, calibration: {sequences: 3, seed: 7}}")
    suite: dict[str, Any] = {
        "name": "trial",
        "model": {"dtype": "float32"},
        "calibration": {"sequences": 5},
        "recipes": [{"recipe": "own.yaml"}, {"recipe": "gptq-4bit-g64", "label": "G", "set": {"method.bits": 8}}],
        "bench": [{"name": "memory"}],
    }
    path = folder / "suite.yaml"
    path.write_text(json.dumps(suite | changes))
    return path


def test_a_suite_puts_its_keys_and_no_defaults_onto_its_recipes(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    pairs = dict(suite_recipes(load_suite(path)))
    assert list(pairs) == ["own", "G"]
    assert pairs["own"].calibration.sequences == 5 and pairs["own"].calibration.seed == 7
    assert pairs["own"].model.dtype == "float32"
    assert pairs["G"].method.bits == 8 and pairs["G"].method.group_size == 64  # type: ignore[union-attr]


def test_settings_of_a_suite_reach_the_recipes_they_concern(tmp_path: Path) -> None:
    suite = load_suite(write_suite(tmp_path), ["method.act_order=false", "method.bits=2", "calibration.sequences=9"])
    pairs = dict(suite_recipes(suite))
    assert pairs["G"].method.act_order is False  # type: ignore[union-attr]
    assert [recipe.method.bits for recipe in pairs.values()] == [2, 2], "a setting goes before an entry's set"  # type: ignore[union-attr]
    assert {recipe.calibration.sequences for recipe in pairs.values()} == {9}
    with pytest.raises(RecipeError, match=r"--set method\.nope: no recipe of the suite has a method with this key"):
        load_suite(write_suite(tmp_path), ["method.nope=1"])


def test_the_problems_of_all_entries_come_together(tmp_path: Path) -> None:
    entries = [
        {"recipe": "gptq-4bit-g64", "set": {"method.bits": 5, "method.grou_size": 1}},
        {"recipe": "nowhere.yaml"},
        {"recipe": "demo"},
        {"recipe": "nf4", "set": {"a..b": 1}},
    ]
    path = write_suite(tmp_path, recipes=entries)
    with pytest.raises(RecipeError) as caught:
        load_suite(path)
    assert [line.removeprefix(f"{path}: ") for line in caught.value.message.splitlines()] == [
        "recipes.gptq-4bit-g64.set: method.bits: found 5, expected 2, 3, 4 or 8",
        "recipes.gptq-4bit-g64.set: method.grou_size: unknown key; did you mean group_size?",
        f"recipes.nowhere.recipe: {tmp_path / 'nowhere.yaml'}: no such file",
        "recipes.demo.recipe: recipes/demo.yaml is a suite, expected a recipe",
        'recipes.nf4.set: found "a..b", expected a dotted key, such as method.group_size',
    ]


def test_a_suite_needs_different_labels_and_something_to_do(tmp_path: Path) -> None:
    twice = [{"recipe": "nf4"}, {"recipe": "int8", "label": "nf4"}]
    path = write_suite(tmp_path, recipes=twice, name="a/b", bench=[])
    assert sorted(line.removeprefix(f"{path}: ") for line in validate_file(path)) == [
        "bench: found [], expected at least 1 of them",
        'name: found "a/b", expected text of the form ^[A-Za-z0-9][A-Za-z0-9._-]*$',
        'recipes.1.label: "nf4" is taken: give it another',
    ]


# schema


def test_the_schema_names_every_method_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    text = json.dumps(schema)
    assert schema["$defs"]["GPTQ"]["additionalProperties"] is False
    assert all(f'"const": "{name}"' in text for name in ("int8", "nf4", "awq", "gptq", "ggml", "rtn"))
    assert {option["$ref"].rsplit("/", 1)[1] for option in schema["anyOf"]} == {"Recipe", "Suite"}
