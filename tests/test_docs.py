"""The documents say what the program does: generated parts are fresh, examples are valid, links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import types
from pathlib import Path

import pytest
import torch
import yaml

from quantkit.bench.measurement import Layer, Measurement, Results, Row
from quantkit.gates.outcome import GateOutcome
from quantkit.manifest import FileRecord, Manifest, TensorRecord
from quantkit.methods.base import BlockWeights, Method
from quantkit.model.blocks import Block
from quantkit.schema import Frozen

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def load_script() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("fill_readme", ROOT / "docs" / "fill_readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_fresh() -> None:
    for path, content in load_script().wanted(demo=False).items():
        assert path.read_text(encoding="utf-8") == content, f"{path.name} is out of date: make readme"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if target == "reports/demo/report.md":  # stands in the table that is taken from it
            continue
        assert (page.parent / target).exists(), target


def commands() -> list[str]:
    lines = [line for page in PAGES for block in fenced(page, "sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("quantkit ")]


@pytest.mark.parametrize("line", commands())
def test_every_example_command_parses(line: str) -> None:
    """Parsed by the real command line and not run."""
    import typer

    from quantkit.cli import app

    command = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    name = "quantkit"
    while True:
        context = command.make_context(name, list(words), ignore_unknown_options=False)
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not hasattr(command, "resolve_command") or not rest:
            break
        found, command, words = command.resolve_command(context, rest)
        assert command is not None and found is not None
        name = found
    assert not hasattr(command, "resolve_command"), "the example stops at a group"


def test_every_page_is_in_the_sites_navigation() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_names_what_it_cannot_link_to() -> None:
    spec = importlib.util.spec_from_file_location("site_links", ROOT / "docs" / "site_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "see [the report](../reports/demo/report.md#x) and [files](files.md)"
    assert module.on_page_markdown(text) == "see the report (`reports/demo/report.md`) and [files](files.md)"


def test_every_verb_has_an_example() -> None:
    verbs = [command for command in load_script().COMMANDS if command not in ("", "recipes", "calibration")]
    readme = "\n".join(fenced(ROOT / "README.md", "sh"))
    assert [verb for verb in verbs if not re.search(rf"^quantkit {verb}\b", readme, flags=re.MULTILINE)] == []


def test_exit_codes_are_the_ones_in_the_code() -> None:
    from quantkit import errors
    from quantkit.outcome import BUG, INTERRUPTED

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", readme, flags=re.MULTILINE)}
    assert table == {0, BUG, INTERRUPTED} | {kind.exit_code for kind in kinds}


def test_the_example_recipe_is_valid(tmp_path: Path) -> None:
    from quantkit.recipe import validate_file

    examples = fenced(ROOT / "README.md", "yaml")
    assert examples
    for example in examples:
        path = tmp_path / "example.yaml"
        path.write_text(example)
        assert validate_file(path) == []


@pytest.mark.parametrize("record", [Manifest, TensorRecord, FileRecord, Results, Row, Layer, Measurement, GateOutcome])
def test_every_key_of_a_file_is_explained(record: type[Frozen]) -> None:
    page = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert [key for key in record.model_fields if f"`{key}`" not in page] == []


def test_the_method_in_the_guide_works() -> None:
    """Its file is executed as it stands in the page, and its codes are held against the paper's formula in float64."""
    source = fenced(ROOT / "docs" / "adding-a-method.md", "python")[0]
    module = types.ModuleType("ternary")
    exec(compile(source, "ternary.py", "exec", dont_inherit=True), module.__dict__)
    module.Ternary.model_rebuild(_types_namespace=module.__dict__)
    method: Method = module.Ternary(group_size=16)
    weight = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    weight[0, 0], weight[1] = 40.0, 0.0
    name = "model.layers.0.self_attn.q_proj"
    block = Block(0, "model.layers.0", (name,), (), ())
    result = method.quantize_block(BlockWeights(block, {name: weight}), {})
    groups = weight.double().reshape(7, 3, 16)
    scale = groups.abs().mean(dim=2, keepdim=True)
    expected = (groups / scale.clamp(min=2**-24)).round().clamp(-1, 1) * scale
    torch.testing.assert_close(
        result.quantized[name].dequantize().double(), expected.reshape(7, 48), rtol=1e-3, atol=2**-24
    )
    assert method.predicted_bits(7, 48) == pytest.approx(2 + 18 / 16)
    assert method.misfit(7, 50) == "group_size 16 does not divide in_features 50"


def test_the_registries_follow_from_their_unions() -> None:
    """The one word: a class in the union is in the registry, has a format, and can be named in a recipe."""
    from quantkit.formats import DEFAULT_FORMAT, FORMATS, SUITABLE_FORMATS
    from quantkit.methods import METHODS

    assert list(METHODS) == ["int8", "nf4", "awq", "gptq", "ggml", "rtn"]
    assert DEFAULT_FORMAT.keys() == METHODS.keys()
    assert {name for names in SUITABLE_FORMATS.values() for name in names} <= FORMATS.keys()
    assert (DEFAULT_FORMAT["rtn"], DEFAULT_FORMAT["nf4"]) == ("autogptq", "bitsandbytes")
