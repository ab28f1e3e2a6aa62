"""Whether a checkpoint is of the shape that its config tells: one message before any weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fakes.families import SETTINGS, write_family
from fakes.runs import quietly
from quantkit.errors import ModelError
from quantkit.model.config_fit import check_config_fits, check_ids_fit
from quantkit.model.reader import open_source


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_fits_its_own(family: str, tiny_llama: Path, tmp_path: Path) -> None:
    check_config_fits(open_source(str(write_family(tmp_path / "model", family, tiny_llama))))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "intermediate_size",
            64,
            "intermediate_size: found 64, expected 128: the columns of model.layers.0.mlp.down_proj",
        ),
        (
            "num_attention_heads",
            2,
            "num_attention_heads x head_dim: found 32, expected 64: the columns of model.layers.0.",
        ),
        ("hidden_size", 32, "hidden_size: found 32, expected 64: the columns of the embedding"),
        ("num_hidden_layers", 1, "holds tensors of block 1, but config.json tells of 1 blocks"),
    ],
)
@pytest.mark.parametrize("recipe", ["nf4", "gptq-4bit-g64"])
def test_another_models_config_is_refused(
    recipe: str, key: str, value: int, said: str, tiny_llama: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({"head_dim": 16, **config, key: value}))
    with pytest.raises(ModelError) as caught:
        quietly(recipe, model, tmp_path / "out", [])
    assert said in caught.value.message and caught.value.message.count("\n") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_ids_beyond_the_embedding(tiny_llama: Path) -> None:
    source = open_source(str(tiny_llama))
    rows = source.shape("model.embed_tokens.weight")[0]
    check_ids_fit(source, torch.tensor([[0, rows - 1]]))
    with pytest.raises(ModelError, match=f"ids up to {rows}, but model.embed_tokens.weight has {rows} rows"):
        check_ids_fit(source, torch.tensor([[0, rows]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_config_that_ties_it(same: bool, dtype: torch.dtype, tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(model / "model.safetensors")
    if same:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["lm_head.weight"] = weights["lm_head.weight"].to(dtype)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    if same:
        quietly("nf4", model, tmp_path / "out", [])
    else:
        with pytest.raises(ModelError, match=r"a lm_head\.weight is stored that is not model\.embed_tokens\.weight"):
            quietly("nf4", model, tmp_path / "out", [])
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
