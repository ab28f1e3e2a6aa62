"""The tokenizer of every family in GGUF: named by what it does, and with the ids of its own in llama.cpp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models

from fakes.vocabularies import (
    BYTE_LEVEL,
    ROWS,
    SENTENCEPIECE,
    general_of,
    write_style,
)
from oracles import llama_cpp
from quantkit.engines import llama_api
from quantkit.errors import ModelError
from quantkit.formats import gguf_parity
from quantkit.formats.gguf_parity import CHECK_TEXTS
from quantkit.formats.gguf_vocabulary import tokenizer_metadata
from quantkit.model.gguf_tokenizer import build_tokenizer, write_tokenizer_files

needs_llama = pytest.mark.skipif(
    llama_api.installed() != llama_api.VERSION, reason=f"xllamacpp {llama_api.VERSION} is not installed"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {style: write_style(root / style, style) for style in (*BYTE_LEVEL, "tekken", *SENTENCEPIECE)}


@pytest.mark.engine
@needs_llama
@pytest.mark.parametrize("style", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_llama_cpp_gives_the_ids_of_the_source(
    folders: dict[str, Path], shared_data: Path, tmp_path: Path, style: str
) -> None:
    """Beyond the texts of the check itself: every line of real text that follows."""
    folder = folders[style]
    values = tokenizer_metadata(folder, {}, ROWS, general_of(style))
    gguf_parity.write_keys(tmp_path / "v.gguf", values, general_of(style))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    raw = (shared_data / "text" / "wikitext2" / "wiki.test.raw").read_text() + (
        shared_data / "text" / "c4.txt"
    ).read_text()
    lines = [line.strip() for line in raw.splitlines()[:3000] if line.strip()]
    assert len(lines) > 1000
    with llama_cpp.Model(tmp_path / "v.gguf", vocab_only=True) as model:
        wrong = [line for line in lines if model.tokenize(line) != tokenizer.encode(line).ids]
    print(f"{style} {len(lines)} lines, {len(wrong)} differ")
    assert wrong == []


@pytest.mark.parametrize(("style", "name"), BYTE_LEVEL.items())
def test_the_pre_tokenizer_is_found_by_what_it_does(folders: dict[str, Path], style: str, name: str) -> None:
    assert tokenizer_metadata(folders[style], {}, ROWS)["tokenizer.ggml.pre"] == name


def test_a_way_to_cut_that_llama_cpp_only_comes_near_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"cuts text as tekken does; llama\.cpp cuts words with combining marks"):
        tokenizer_metadata(folders["tekken"], {}, ROWS)


@pytest.mark.parametrize("style", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_tokenizer_files_made_from_the_keys_give_the_same_keys(
    folders: dict[str, Path], tmp_path: Path, style: str
) -> None:
    rows = Tokenizer.from_file(str(folders[style] / "tokenizer.json")).get_vocab_size()
    values = tokenizer_metadata(folders[style], {}, rows, general_of(style))
    write_tokenizer_files(values, tmp_path, "v.gguf", 256)
    again = tokenizer_metadata(tmp_path, {}, rows, {"general.name": "other"})  # white space around tokens is not kept
    assert again == values
    assert values["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("style", ["llama", "phi3", "gemma"])
def test_scores_come_from_the_merges_where_tokenizer_model_is_missing(
    folders: dict[str, Path], tmp_path: Path, style: str
) -> None:
    shutil.copytree(folders[style], tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.model").unlink()
    values = tokenizer_metadata(tmp_path / "bare", {}, ROWS, general_of(style))
    assert values["tokenizer.ggml.model"] == "llama"
    whole = tokenizer_metadata(folders[style], {}, ROWS, general_of(style))
    for key in ("tokens", "token_type", "add_space_prefix", "bos_token_id"):
        assert values[f"tokenizer.ggml.{key}"] == whole[f"tokenizer.ggml.{key}"], key


def test_spaces_are_spelled_out_in_tokens_that_llama_cpp_looks_for_in_text(folders: dict[str, Path]) -> None:
    values = tokenizer_metadata(folders["gemma"], {}, ROWS)
    tokens = values["tokenizer.ggml.tokens"]
    assert values["tokenizer.ggml.token_type"][tokens.index("    ")] == 4
    assert not any(
        "▁▁" in token for token, kind in zip(tokens, values["tokenizer.ggml.token_type"], strict=True) if kind == 4
    )
    assert values["tokenizer.ggml.add_space_prefix"] is False
    assert build_tokenizer(values, "v").encode("a    b").ids.count(tokens.index("    ")) == 1


@pytest.mark.engine
@needs_llama
def test_a_difference_in_llama_cpp_is_one_message_with_text_and_both_lists(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gguf_parity.write_keys

    def wrong(file: Path, values: dict[str, Any], general: dict[str, Any]) -> None:
        real(file, {**values, "tokenizer.ggml.pre": "gpt-2"}, general)

    monkeypatch.setattr(gguf_parity, "write_keys", wrong)
    with pytest.raises(ModelError) as caught:
        tokenizer_metadata(folders["qwen2"], {}, ROWS)
    message = caught.value.message
    assert "\n" not in message and "tokenizer.json: in llama.cpp, " in message
    assert repr(CHECK_TEXTS[0]) in message and " on expected [" in message and ", got [" in message
    assert caught.value.hint is not None


@pytest.mark.engine
@needs_llama
def test_white_space_that_tokens_take_with_them_depends_on_the_models_name(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"'a <\|user\|> \\nb' would have other token ids") as caught:
        tokenizer_metadata(folders["phi3"], {}, ROWS, {"general.name": "my-model"})
    assert "rename the model's folder" in str(caught.value.hint)


@pytest.mark.engine
@needs_llama
def test_a_name_that_makes_llama_cpp_expect_tokens_is_told(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: llama\.cpp refuses the tokenizer: ") as caught:
        tokenizer_metadata(folders["qwen2"], {}, ROWS, {"general.name": "not-phi3"})
    assert "must hold </s>" in str(caught.value.hint)


def test_without_the_binding_the_keys_are_still_read_back(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_api, "installed", lambda: None)
    shutil.copytree(folders["llama"], tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer_metadata(tmp_path / "other", {}, ROWS)
    spec = json.loads(path.read_text())
    spec["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, spec["normalizer"]]}
    path.write_text(json.dumps(spec))
    (tmp_path / "other" / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json: read back from GGUF, 'The capital of France"):
        tokenizer_metadata(tmp_path / "other", {}, ROWS)


def test_a_user_defined_token_is_found_in_text(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folders["gpt2"] / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    values = tokenizer_metadata(tmp_path, {}, ROWS)
    assert values["tokenizer.ggml.token_type"][1200] == 4
    assert build_tokenizer(values, "v").encode("x<tool>y").ids == tokenizer.encode("x<tool>y").ids


def test_unigram_is_refused(tmp_path: Path) -> None:
    Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="model type Unigram has no GGUF converter here; expected BPE") as caught:
        tokenizer_metadata(tmp_path, {}, ROWS)
    assert "without its fallback to bytes" in str(caught.value.hint)
