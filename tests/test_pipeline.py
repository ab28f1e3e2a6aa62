"""The loop over blocks, end to end on tiny models: what is written equals what a plain run over the whole model
gives."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import write_tiny_llama
from fakes.runs import quietly, same_but_for_the_manifest
from quantkit import one_block, pipeline
from quantkit.errors import ModelError, RecipeError, UsageError
from quantkit.formats import open_artifact
from quantkit.jobs import quantize
from quantkit.manifest import Manifest, read_manifest
from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.maths.pairs import move_pairs
from quantkit.methods.base import BlockWeights
from quantkit.methods.calibrated import CalibratedBlock
from quantkit.model import forward
from quantkit.model.blocks import LinearGroup, blocks_of, head_dim
from quantkit.model.calibration import load_calibration
from quantkit.model.forward import BlockRunner
from quantkit.model.hidden import HiddenStates
from quantkit.model.reader import open_source
from quantkit.model.waiting import InFile, InMemory, Rows
from quantkit.progress import Progress
from quantkit.recipe import Recipe, load_recipe

SMALL = ["calibration.sequences=6", "calibration.length=64"]


def make(recipe: str, model: Path, out: Path, *settings: str, force: bool = False, **how: Any) -> Manifest:
    return quietly(recipe, model, out, [*SMALL, *settings], force=force, **how)


def plain_run(recipe: Recipe, model: Path) -> dict[str, torch.Tensor]:
    """The same recipe without streaming: the whole transformers model, hooks, one block after the other."""
    from transformers import AutoModelForCausalLM

    source = open_source(str(model))
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = load_calibration(recipe.calibration, model).ids
    made: dict[str, torch.Tensor] = {}
    quantized = recipe.method.propagate == "quantized"
    for block in blocks_of(source):
        weights = {linear: source.read(f"{linear}.weight") for linear in block.linears}
        others = {name: source.read(name) for name in block.tensors if name.removesuffix(".weight") not in weights}
        work = recipe.method.begin(BlockWeights(block, weights, others, head_dim=head_dim(source.config)))
        # scales look at one sequence in so many; linears at all of them, behind everything that was rounded
        work.fold(inputs_of(whole, block.groups, ids[:: one_block.looked_at(ids)] if quantized else ids))
        if not quantized:
            seen = inputs_of(whole, block.groups, ids)
            for group in block.groups:
                work.round(group, work.behind_scale(group.linears[0], seen[group.linears[0]].gram))
        else:
            whole.load_state_dict({f"{name}.weight": weight for name, weight in work.weights.items()}, strict=False)
            whole.load_state_dict(work.replaced, strict=False)
            for group in block.groups:
                seen = inputs_of(whole, [group], ids)
                rounded = work.round(group, seen[group.linears[0]].gram)
                whole.load_state_dict({f"{name}.weight": weight for name, weight in rounded.items()}, strict=False)
        result = work.result()
        made.update({f"{name}.weight": tensor.dequantize() for name, tensor in result.quantized.items()})
        made.update(result.replaced)
    return made


def inputs_of(whole: Any, groups: Sequence[LinearGroup], ids: torch.Tensor) -> dict[str, InputStatistics]:
    seen: dict[str, GramAccumulator] = {}
    handles = []
    for group in groups:
        module = whole.get_submodule(group.linears[0])
        accumulator = GramAccumulator(module.weight.shape[1], torch.device("cpu"))
        handles.append(module.register_forward_pre_hook(lambda _, inputs, a=accumulator: a.add(inputs[0])))
        seen.update(dict.fromkeys(group.linears, accumulator))
    with torch.no_grad():
        whole(ids)
    for handle in handles:
        handle.remove()
    return {name: accumulator.result() for name, accumulator in seen.items()}


@pytest.mark.parametrize("propagate", ["quantized", "unquantized"])
@pytest.mark.parametrize("name", ["gptq-4bit-g64", "awq-4bit-g64"])
def test_streaming_equals_a_plain_run_over_the_whole_model(
    name: str, propagate: str, tiny_llama: Path, tmp_path: Path
) -> None:
    settings = [f"method.propagate={propagate}", "method.group_size=32"]
    make(name, tiny_llama, tmp_path / "out", *settings)
    expected = plain_run(load_recipe(name, [*SMALL, *settings]), tiny_llama)
    artifact = open_artifact(tmp_path / "out")
    for tensor_name, tensor in expected.items():
        found = artifact.read(tensor_name).float()
        if artifact.quantized(tensor_name) is None:
            assert torch.allclose(found, tensor, rtol=2e-3), tensor_name
            continue
        # batches sum in another order, so that a few codes on an edge may differ
        noise = float((found - tensor).norm() / tensor.norm())
        assert noise < 0.02, (tensor_name, noise)


def test_one_pass_holds_no_module_and_decodes_nothing_while_it_rounds(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runners: list[BlockRunner] = []
    begin, rounds = BlockRunner.__init__, CalibratedBlock._round
    held: list[bool] = []

    def started(runner: BlockRunner, *given: Any) -> None:
        runners.append(runner)
        begin(runner, *given)

    def seen(work: CalibratedBlock, ours: list[str], gram: Tensor) -> Any:
        held.append(any(not one.is_meta for one in runners[0].layers.parameters()))
        return rounds(work, ours, gram)

    monkeypatch.setattr(BlockRunner, "__init__", started)
    monkeypatch.setattr(CalibratedBlock, "_round", seen)
    monkeypatch.setattr(CalibratedBlock, "_to_run", lambda *_, **__: pytest.fail("nothing runs behind this"))
    manifest = make("gptq-4bit-g64", tiny_llama, tmp_path / "out", "method.propagate=unquantized")
    assert len(held) == 2 * 4 and not any(held)
    assert all(one.sqnr_db for one in manifest.tensors if one.requested != "skip")


def test_a_config_of_another_model_is_told_by_its_shapes(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    config["num_key_value_heads"] = 1
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.k_proj\.weight: shape \[32, 64\], expected \[16, 64\]"
    ):
        make("gptq-4bit-g64", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def mean_error(artifact: Path, model: Path) -> float:
    """Mean square of what an artifact's logits are off by on the text that it was calibrated on."""
    from transformers import AutoModelForCausalLM

    ids = load_calibration(load_recipe("gptq-4bit-g64", SMALL).calibration, model).ids
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = whole(ids).logits
        made = open_artifact(artifact)
        whole.load_state_dict({name: made.read(name).float() for name in made.names()}, strict=False)
        return float((whole(ids).logits - wanted).square().mean())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gptq-4bit-g64", ["method.group_size=32"]),
        ("awq-4bit-g64-nearest", ["method.group_size=32", "method.propagate=quantized"]),
        ("gguf-q4_0-gptq", []),
    ],
)
def test_the_correction_brings_outputs_nearer(name: str, settings: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    make(name, tiny_llama, tmp_path / "without", *settings)
    make(name, tiny_llama, tmp_path / "with", *settings, "method.correction=1.0")
    assert mean_error(tmp_path / "with", tiny_llama) < 0.95 * mean_error(tmp_path / "without", tiny_llama)


def test_a_correction_needs_inputs_in_which_something_went_wrong(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs propagate: quantized"):
        make("gptq-4bit-g64", tiny_llama, tmp_path / "a", "method.propagate=unquantized", "method.correction=0.5")
    with pytest.raises(RecipeError, match="expected 0: only rounding gptq"):
        make("gguf-q4_0", tiny_llama, tmp_path / "b", "method.correction=0.5")


@pytest.mark.parametrize("name", ["gptq-4bit-g64", "awq-4bit-g64"])
def test_codes_of_every_linear_are_moved_in_pairs(
    name: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = []

    def note(codes: Tensor, scale: Tensor, error: Tensor, gram: Tensor, levels: int) -> None:
        before = codes.clone()
        move_pairs(codes, scale, error, gram, levels)
        moved.append(bool((codes != before).any()))

    monkeypatch.setattr("quantkit.maths.refine.move_pairs", note)
    make(name, tiny_llama, tmp_path / "out", "method.group_size=32", "method.pairs=2")
    groups = 4 * json.loads((tiny_llama / "config.json").read_text())["num_hidden_layers"]
    assert len(moved) == 2 * groups and sum(moved) > groups


def test_codes_rounded_to_nearest_are_not_moved_in_pairs(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs rounding: gptq"):
        make("awq-4bit-g64-nearest", tiny_llama, tmp_path / "a", "method.pairs=2")


@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize("name", ["gptq-4bit-g64", "awq-4bit-g64-nearest"])
def test_a_memory_limit_changes_no_byte(
    name: str, correction: float, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [f"method.correction={correction}", *(["method.propagate=quantized"] if correction else [])]
    make(name, tiny_llama, tmp_path / "free", *own)
    spilled, placed = [], []
    states, staged = HiddenStates.__init__, one_block.run_staged

    def note_spill(self: Any, shape: Any, dtype: Any, spill: Path | None = None, together: int | None = None) -> None:
        spilled.append(spill is not None)
        states(self, shape, dtype, spill, together)

    def note_batches(rows: Rows, batches: Sequence[InMemory], *args: Any, **settings: Any) -> None:
        placed.extend(map(type, batches))
        staged(rows, batches, *args, **settings)

    monkeypatch.setattr(HiddenStates, "__init__", note_spill)
    monkeypatch.setattr(one_block, "run_staged", note_batches)
    settings = [*SMALL, *own]
    quantize(
        name,
        model=str(tiny_llama),
        out=tmp_path / "tight",
        settings=settings,
        device="cpu",
        force=False,
        progress=Progress(stream=(told := io.StringIO())),
        max_memory="1MB",
    )
    assert "at its peak, more than the limit of 1 MB; `quantkit plan`" in told.getvalue()
    assert spilled and all(spilled) and set(placed) == ({InFile} if correction or name == "gptq-4bit-g64" else set())
    same_but_for_the_manifest(tmp_path / "free", tmp_path / "tight")


@pytest.mark.parametrize(
    ("recipe", "limit", "parts", "wanted"),
    [
        ("gptq-4bit-g64", None, False, ["map"]),  # what is large lies in the arena
        ("gguf-q4_0", None, False, ["keep"]),
        ("gguf-q4_0", None, True, []),
        ("gguf-q4_0", "1TB", True, ["map"]),
    ],
)
def test_the_c_library_is_told_what_becomes_of_large_pieces(
    recipe: str,
    limit: str | None,
    parts: bool,
    wanted: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(pipeline, "_in_parts", lambda *_: parts)
    monkeypatch.setattr(pipeline, "keep_freed_memory", lambda: told.append("keep"))
    monkeypatch.setattr(pipeline, "map_large_memory", lambda: told.append("map"))
    allowed: list[int | None] = []
    monkeypatch.setattr(pipeline.arena, "allow", allowed.append)
    make(recipe, tiny_llama, tmp_path / "out", max_memory=limit)
    assert told == wanted and allowed[0] == (None if limit is None else 0)
    assert allowed[-1] is None, "it is the run's limit, not the process's"


UNQUANTIZED = "method.propagate=unquantized"


@pytest.mark.parametrize(
    "wanted",
    [
        {"gptq-4bit-g64": [], "awq-4bit-g64": [], "rtn-4bit-g128": ["method.group_size=64"], "gguf-q8_0": []},
        # these look at the same inputs, each in its own way: all of a Gram matrix, a part of it, squares
        {
            "gptq-4bit-g64": [UNQUANTIZED],
            "awq-4bit-g64": [UNQUANTIZED, "method.rounding=nearest"],
            "gguf-q4_0": ["method.importance=true"],
        },
    ],
    ids=["their own inputs", "shared inputs"],
)
def test_several_recipes_in_one_pass_equal_each_alone(
    wanted: dict[str, list[str]], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.jobs import run_passes

    monkeypatch.setattr(forward, "PART_TOKENS", 100)
    recipes = {label: load_recipe(label, [*SMALL, *settings]) for label, settings in wanted.items()}
    source = open_source(str(tiny_llama))
    pairs = [(label, recipe, tmp_path / "together" / label) for label, recipe in recipes.items()]
    run_passes(pairs, source, torch.device("cpu"), False, Progress(quiet=True))
    for label, recipe in recipes.items():
        alone = tmp_path / "alone" / label
        run_passes([(label, recipe, alone)], source, torch.device("cpu"), False, Progress(quiet=True))
        for path in sorted(alone.iterdir()):
            if path.name != "quantkit.json":
                assert path.read_bytes() == (tmp_path / "together" / label / path.name).read_bytes(), (label, path.name)


def test_the_manifest_tells_what_was_done(tiny_llama: Path, tmp_path: Path) -> None:
    made = make("gptq-4bit-g64", tiny_llama, tmp_path / "out", "overrides={'down_proj': {bits: 8}, 'k_proj': skip}")
    manifest = read_manifest(tmp_path / "out")
    assert manifest == made
    assert manifest is not None and manifest.calibration is not None
    ids = load_calibration(load_recipe("gptq-4bit-g64", SMALL).calibration, tiny_llama)
    assert manifest.calibration["fingerprint"] == ids.fingerprint
    records = {record.name: record for record in manifest.tensors}
    assert records["model.layers.0.self_attn.k_proj"].applied == "unquantized"
    assert records["model.layers.0.self_attn.k_proj"].bits_per_weight == 16
    assert records["model.layers.1.mlp.down_proj"].applied.startswith("gptq 8-bit")
    q_proj = records["model.layers.0.self_attn.q_proj"]
    # 64 x 64 codes, a scale, a zero and the column's group: 4 + 16/64 + 4/64 + 32/64 bits
    assert q_proj.bits_per_weight == pytest.approx(4 + 16 / 64 + 4 / 64 + 32 / 64)
    assert q_proj.sqnr_db is not None and 10 < q_proj.sqnr_db < 30
    down, gate = records["model.layers.1.mlp.down_proj"], records["model.layers.1.mlp.gate_proj"]
    assert down.sqnr_db is not None and gate.sqnr_db is not None and down.sqnr_db > gate.sqnr_db + 15
    for record in manifest.files:
        assert (tmp_path / "out" / record.name).stat().st_size == record.bytes
    assert records["lm_head"].requested == "skip"


def test_a_tied_head_stays_tied_and_side_files_arrive_unaltered(tiny_llama_tied: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama_tied, model)
    (model / "LICENSE").write_text("a licence\n")
    make("awq-4bit-g64", model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored and "model.embed_tokens.weight" in stored
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True
    for name in ("LICENSE", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()


def test_every_misfit_is_named_before_a_weight_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][:] = float("nan")  # reading it would be another error
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(RecipeError) as caught:
        make("gptq-4bit-g128", model, tmp_path / "out", "method.group_size=96")
    assert caught.value.message.count("group_size 96 does not divide") == 12
    assert "and 2 more" in caught.value.message and caught.value.hint is not None
    assert "method.group_size=64" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight: 1 of 8192"):
        make("rtn-4bit-g128", model, tmp_path / "out", "method.group_size=64")
    assert list(tmp_path.iterdir()) == [model]


def test_values_too_large_for_the_stored_dtype_are_refused(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][7, 7] = 1e6
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(ModelError, match="do not fit float16") as caught:
        make("rtn-4bit-g128", model, tmp_path / "out", "method.group_size=64")
    assert caught.value.hint is not None and "bfloat16" in caught.value.hint


def test_output_rules(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    rtn = ("rtn-4bit-g128", tiny_llama, out, "method.group_size=64")
    make(*rtn)
    (out / "my-notes.txt").write_text("mine")
    first = (out / "model.safetensors").read_bytes()
    with pytest.raises(UsageError, match="exists and is not empty"):
        make(*rtn)
    made = make(*rtn, "method.bits=8", force=True)
    assert (out / "my-notes.txt").read_text() == "mine"
    assert (out / "model.safetensors").read_bytes() != first
    assert read_manifest(out) == made
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="is not part of an artifact"):
        for early in ("quantkit.place.refuse_conflicts", "quantkit.job_checks.refuse_conflicts"):
            patch.setattr(early, lambda out, names: None)  # as if the file came later
        make("rtn-4bit-g128", tiny_llama, foreign, "method.group_size=64", force=True)
    assert (foreign / "config.json").read_text() == "{}"
    (foreign / "config.json").unlink()
    monkeypatch.setattr(pipeline, "quantize", None)  # nothing is computed anew
    make("rtn-4bit-g128", tiny_llama, foreign, "method.group_size=64", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "out"]


def test_a_pattern_that_no_linear_has_in_its_name_is_told(tiny_llama: Path, tmp_path: Path) -> None:
    told = io.StringIO()
    settings = ["overrides={dwon_proj: skip, up_proj: skip}", "skip=[lm_head, layers\\.7]"]
    quietly("nf4", tiny_llama, tmp_path / "out", settings, progress=Progress(stream=told))
    found = [line for line in told.getvalue().splitlines() if line.startswith("note: ")]
    assert found == [
        "note: nf4: overrides: dwon_proj: no linear of the model has such a name",
        "note: nf4: skip: layers\\.7: no linear of the model has such a name",
    ]
