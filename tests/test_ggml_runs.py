"""Mixes, fallbacks and importance through a whole run: what the file, the manifest and the imatrix say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import gguf
import pytest
import torch

from conftest import write_tiny_llama
from fakes.families import write_family
from fakes.runs import quietly
from oracles import llama_cpp
from quantkit.errors import ModelError, RecipeError
from quantkit.formats.imatrix import read_imatrix, write_imatrix
from quantkit.manifest import Manifest
from quantkit.maths.ggml import encode
from quantkit.maths.gram import GramAccumulator
from quantkit.methods.ggml_mixes import MIXES
from quantkit.model import forward
from quantkit.model.blocks import blocks_of
from quantkit.model.calibration import load_calibration
from quantkit.model.gguf_config import family_of_config
from quantkit.model.gguf_names import interleave, rotary_heads, to_gguf
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.load import load_transformers
from quantkit.model.reader import open_source
from quantkit.recipe import load_recipe

SMALL = ["calibration.sequences=6", "calibration.length=64"]


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and 512, eight blocks: every type fits, every rule has a layer."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return write_tiny_llama(folder, hidden_size=256, intermediate_size=512, num_hidden_layers=8)


def make(recipe: str, model: Path, out: Path, *settings: str) -> tuple[Manifest, gguf.GGUFReader]:
    made = quietly(recipe, model, out, [*SMALL, *settings])
    return made, gguf.GGUFReader(next(out.glob("*.gguf")))


def types_of(reader: gguf.GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def test_a_mix_from_recipe_to_file(wide_llama: Path, tmp_path: Path) -> None:
    made, reader = make("gguf-q4_k_m", wide_llama, tmp_path / "out")
    assert (tmp_path / "out" / "wide-Q4_K_M.gguf").is_file()
    types = types_of(reader)
    assert types["token_embd.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"
    downs = [types[f"blk.{layer}.ffn_down.weight"] for layer in range(8)]
    assert downs == ["Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert [types[f"blk.{layer}.attn_v.weight"] for layer in range(8)] == downs
    assert {types[f"blk.{layer}.ffn_up.weight"] for layer in range(8)} == {"Q4_K"}
    assert reader.fields["general.file_type"].contents() == 15
    assert not [key for key in reader.fields if key.startswith("quantize.imatrix")]
    records = {record.name: record for record in made.tensors}
    assert made.method == "gguf Q4_K_M" and made.fallbacks() == [] and made.calibration is None
    down = records["model.layers.0.mlp.down_proj"]
    assert (down.requested, down.applied, down.bits_per_weight) == ("gguf Q4_K_M", "gguf Q6_K", 6.5625)
    assert records["lm_head"].applied == "gguf Q6_K"
    weight = open_source(str(wide_llama)).read("model.layers.1.mlp.up_proj.weight")
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_up.weight")
    assert torch.equal(torch.from_numpy(stored.data.copy()), encode(weight, "Q4_K"))


@pytest.mark.parametrize("mix", MIXES)
def test_file_types_have_llama_cpps_numbers(mix: str, wide_llama: Path, tmp_path: Path) -> None:
    _, reader = make(f"gguf-{mix}", wide_llama, tmp_path / "out")
    number = gguf.LlamaFileType[f"MOSTLY_{mix.upper()}"]
    assert reader.fields["general.file_type"].contents() == number
    assert MIXES[mix] in types_of(reader).values()


@pytest.mark.engine
@pytest.mark.parametrize("mix", [*MIXES, "q4_0-gptq", "q4_k_m-gptq"])
def test_llama_cpp_computes_what_the_weights_say(mix: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model_folder = write_tiny_llama(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    make(f"gguf-{mix}", model_folder, tmp_path / "out")
    path = next((tmp_path / "out").glob("*.gguf"))
    ids = list(range(5, 45))
    with llama_cpp.Model(path) as model:
        found = torch.from_numpy(model.last_logits(ids))
    source = GGUFSource(path)
    whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder), dtype=torch.float32).eval()
    whole.load_state_dict({name: source.decoded(name) for name in source.names()})
    with torch.no_grad():
        expected = whole(torch.tensor([ids])).logits[0, -1]
    noise = float((found - expected).norm() / expected.norm())
    assert noise < 0.05, noise  # llama.cpp rounds activations to eight bits


def test_fallbacks_are_in_the_manifest(tiny_llama: Path, tmp_path: Path) -> None:
    made, reader = make("gguf-q4_k_m", tiny_llama, tmp_path / "out")
    types = types_of(reader)
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["blk.1.ffn_down.weight"] == "Q8_0"  # Q6_K was wanted
    assert types["token_embd.weight"] == "Q5_0"
    assert types["output.weight"] == "Q8_0"
    records = {record.name: record for record in made.tensors}
    q = records["model.layers.0.self_attn.q_proj"]
    assert (q.requested, q.applied, q.bits_per_weight) == ("gguf Q4_K_M", "gguf Q5_0", 5.5)
    assert q.reason == "Q4_K has blocks of 256, which do not divide its 64 columns"
    embedding = records["model.embed_tokens"]
    assert (embedding.applied, embedding.bits_per_weight) == ("gguf Q5_0", 5.5)
    assert len(made.fallbacks()) == 2 * 7 + 1  # the head asks for Q8_0 where 256 does not divide
    linears = [record for record in made.tensors if record.name != "model.embed_tokens"]
    assert len(linears) == 2 * 7 + 1
    counts = {name: torch.Size(open_source(str(tiny_llama)).shape(f"{name}.weight")).numel() for name in records}
    bits = sum(record.bits_per_weight * counts[record.name] for record in linears)
    assert made.bits_per_weight == pytest.approx(bits / sum(counts[record.name] for record in linears))


def test_rows_that_32_does_not_divide_stay_float(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "odd", hidden_size=80, intermediate_size=144)
    made, reader = make("gguf-iq4_xs", model, tmp_path / "out")
    types = types_of(reader)
    assert types["blk.0.attn_q.weight"] == types["blk.0.ffn_down.weight"] == "F16"
    assert types["token_embd.weight"] == "F16"
    assert all(record.reason for record in made.tensors if record.name != "lm_head")


def test_an_override_may_take_another_type(wide_llama: Path, tmp_path: Path) -> None:
    _, reader = make("gguf-q4_k_m", wide_llama, tmp_path / "out", "overrides={'up_proj': {type: q8_0}}")
    types = types_of(reader)
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["blk.0.ffn_gate.weight"] == types["token_embd.weight"] == "Q4_K"
    assert reader.fields["general.file_type"].contents() == 15


def test_importance_is_the_mean_square_of_the_inputs(wide_llama: Path, tmp_path: Path) -> None:
    made, reader = make("gguf-q4_k_m", wide_llama, tmp_path / "out", "method.importance=true")
    matrix = read_imatrix(tmp_path / "out" / "wide.imatrix")
    assert (matrix.datasets, matrix.chunks, matrix.chunk_size, len(matrix.entries)) == (("pydoc",), 6, 64, 56)
    source = open_source(str(wide_llama))
    family = family_of_config(source.config)
    recipe = load_recipe("gguf-q4_k_m", SMALL)
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(wide_llama, dtype=torch.float32).eval()
    seen: dict[str, GramAccumulator] = {}
    for block in blocks_of(source):
        for linear in block.linears:
            module = whole.get_submodule(linear)
            seen[linear] = GramAccumulator(module.weight.shape[1], torch.device("cpu"))
            module.register_forward_pre_hook(lambda _, inputs, a=seen[linear]: a.add(inputs[0]))
    with torch.no_grad():
        whole(load_calibration(recipe.calibration, wide_llama).ids)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for linear, accumulator in seen.items():
        name = to_gguf(f"{linear}.weight", family)
        assert name is not None
        entry = matrix.entries[name]
        assert entry.count == 6 * 64
        assert torch.allclose(entry.squares, accumulator.result().importance.squares, rtol=1e-3, atol=1e-6)
        rows = encode(source.read(f"{linear}.weight"), stored[name].tensor_type.name, entry.mean)
        heads = rotary_heads(f"{linear}.weight", source.config)
        rows = rows if heads is None else rows[interleave(heads, len(rows))]
        assert torch.equal(torch.from_numpy(stored[name].data.copy()), rows)
    records = {record.name: record for record in made.tensors}
    assert records["model.layers.1.mlp.up_proj"].applied == "gguf Q4_K imatrix"
    assert records["lm_head"].applied == "gguf Q6_K"  # nobody looks at the inputs of the head
    assert made.method == "gguf Q4_K_M imatrix" and made.calibration is not None
    values = {key: field.contents() for key, field in reader.fields.items() if key.startswith("quantize")}
    assert values == {
        "quantize.imatrix.file": "wide.imatrix",
        "quantize.imatrix.dataset": "pydoc",
        "quantize.imatrix.entries_count": 56,
        "quantize.imatrix.chunks_count": 6,
    }


def test_an_importance_needs_no_gram_matrix(wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise AssertionError("a Gram matrix is summed")

    monkeypatch.setattr(forward, "GramAccumulator", none)
    make("gguf-q4_k_m", wide_llama, tmp_path / "out", "method.importance=true")
    with pytest.raises(AssertionError, match="a Gram matrix is summed"):
        make("gptq-4bit-g64", wide_llama, tmp_path / "gptq", "method.propagate=unquantized")


def test_a_given_imatrix_makes_the_same_weights(wide_llama: Path, tmp_path: Path) -> None:
    _, calibrated = make("gguf-iq4_xs", wide_llama, tmp_path / "one", "method.importance=true")
    path = tmp_path / "one" / "wide.imatrix"
    made, given = make("gguf-iq4_xs", wide_llama, tmp_path / "two", f"method.importance={path}")
    for one, two in zip(calibrated.tensors, given.tensors, strict=True):
        assert (one.name, one.tensor_type) == (two.name, two.tensor_type)
        assert (one.data == two.data).all()
    assert made.calibration is None and made.fallbacks() == []
    assert [file.name for file in made.files] == ["README.md", "wide-IQ4_XS.gguf"]
    assert given.fields["quantize.imatrix.file"].contents() == str(path)
    assert given.fields["quantize.imatrix.chunks_count"].contents() == 6
    (record,) = made.inputs
    assert (record.name, record.bytes) == (path.name, path.stat().st_size)
    assert record.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_an_imatrix_does_not_know_is_noted(wide_llama: Path, tmp_path: Path) -> None:
    make("gguf-q5_k_s", wide_llama, tmp_path / "one", "method.importance=true")
    matrix = read_imatrix(tmp_path / "one" / "wide.imatrix")
    entries = {name: entry for name, entry in matrix.entries.items() if "ffn_down" not in name}
    path = tmp_path / "part.imatrix"
    write_imatrix(path, type(matrix)(entries, matrix.datasets, matrix.chunks, matrix.chunk_size))
    made, _ = make("gguf-q5_k_s", wide_llama, tmp_path / "two", f"method.importance={path}")
    noted = [record for record in made.tensors if record.reason]
    assert {record.name.rpartition(".")[2] for record in noted} == {"down_proj"}
    assert noted[0].reason == f"{path} does not say how important its columns are"
    assert noted[0].applied == "gguf Q5_K"


def test_rounding_gptq_keeps_the_types_and_the_bytes(wide_llama: Path, tmp_path: Path) -> None:
    _, weighed = make("gguf-q4_k_m", wide_llama, tmp_path / "one", "method.importance=true")
    made, found = make("gguf-q4_k_m-gptq", wide_llama, tmp_path / "two")
    assert types_of(found) == types_of(weighed)
    assert [tensor.n_bytes for tensor in found.tensors] == [tensor.n_bytes for tensor in weighed.tensors]
    assert not (tmp_path / "two" / "wide.imatrix").exists()
    assert not [key for key in found.fields if key.startswith("quantize.imatrix")]
    records = {record.name: record for record in made.tensors}
    assert records["model.layers.0.self_attn.q_proj"].applied == "gguf Q4_K gptq"
    assert records["model.layers.0.self_attn.v_proj"].applied == "gguf Q6_K gptq"
    assert records["lm_head"].applied == "gguf Q6_K"  # nobody looks at the inputs of the head
    assert made.method == "gguf Q4_K_M gptq" and made.calibration is not None and made.fallbacks() == []


def test_linears_of_one_input_are_scaled_together_whatever_their_types(wide_llama: Path, tmp_path: Path) -> None:
    made, _ = make("gguf-q4_k_m-gptq", wide_llama, tmp_path / "out", "method.exponents=4")
    records = {record.name.removeprefix("model.layers.0."): record for record in made.tensors}
    q, v = records["self_attn.q_proj"], records["self_attn.v_proj"]
    assert q.applied.startswith("gguf Q4_K gptq scale^")
    assert v.applied == q.applied.replace("Q4_K", "Q6_K")


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gemma3_text", "gpt2"])
def test_folded_and_compensated_families_compute_the_same(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    model = write_family(tmp_path / kind, kind, tiny_llama)
    settings = ["method.type=q8_0", "method.exponents=4", "model.dtype=float32"]
    made, _ = make("gguf-q4_0-gptq", model, tmp_path / "out", *settings)
    assert any("gptq scale^0." in record.applied for record in made.tensors)
    ids = torch.tensor([list(range(5, 45))])
    with torch.no_grad():
        expected, found = (
            load_transformers(source, torch.float32)(ids).logits[0]
            for source in (open_source(str(model)), GGUFSource(next((tmp_path / "out").glob("*.gguf"))))
        )
    error = float((found - expected).norm() / (expected - expected.mean()).norm())
    assert error < 0.05, error  # of Q8_0 rounded to nearest: 0.02 to 0.03


def test_calibration_helps_linears_that_are_stored_turned(tiny_llama: Path, tmp_path: Path) -> None:
    model = write_family(tmp_path / "gpt2", "gpt2", tiny_llama)
    ids = load_calibration(load_recipe("gguf-q4_0", SMALL).calibration, model).ids

    def error(folder: str, *settings: str) -> float:
        make("gguf-q4_0", model, tmp_path / folder, *settings, "model.dtype=float32")
        with torch.no_grad():
            expected, found = (
                load_transformers(source, torch.float32)(ids).logits
                for source in (open_source(str(model)), GGUFSource(next((tmp_path / folder).glob("*.gguf"))))
            )
        return float((found - expected).norm())

    plain, weighed = error("plain"), error("weighed", "method.importance=true")
    assert error("gptq", "method.rounding=gptq") < 0.8 * weighed < 0.8 * 1.02 * plain


def test_importance_of_the_unquantized_model_does_not_go_with_rounding_gptq(wide_llama: Path, tmp_path: Path) -> None:
    setting = "overrides={'up_proj': {rounding: nearest, importance: true}}"
    with pytest.raises(RecipeError, match="overrides ask for true beside rounding gptq"):
        make("gguf-q4_k_m-gptq", wide_llama, tmp_path / "out", setting)


def test_mistakes_are_named(wide_llama: Path, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="method.importance: found false, expected true or a file: q2_k_s"):
        make("gguf-q2_k_s", wide_llama, tmp_path / "out", "method.importance=false")
    with pytest.raises(ModelError, match="nothing.imatrix: cannot be read"):
        make("gguf-q4_k_m", wide_llama, tmp_path / "out", "method.importance=nothing.imatrix")
    make("gguf-q4_0", tiny_llama, tmp_path / "tiny", "method.importance=true")
    path = tmp_path / "tiny" / "tiny-llama.imatrix"
    with pytest.raises(RecipeError, match=r"tiny-llama.imatrix has 64 columns for model.layers.0.self_attn.q_proj, "):
        make("gguf-q4_k_m", wide_llama, tmp_path / "out", f"method.importance={path}")
    assert not (tmp_path / "out").exists()
