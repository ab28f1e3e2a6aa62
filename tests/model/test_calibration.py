"""Calibration sets as token ids: packing against a plain reference, the cache, and files of ready ids."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from fakes.rows import sentences, write_rows
from quantkit.errors import DataError
from quantkit.model import calibration_rows
from quantkit.model.calibration import build, fingerprint_of, load_calibration
from quantkit.model.calibration_rows import documents
from quantkit.model.calibration_sets import find_set
from quantkit.recipe import CalibrationSection


def section(set_: str | Path, sequences: int = 4, length: int = 32, seed: int = 0) -> CalibrationSection:
    return CalibrationSection(set=str(set_), sequences=sequences, length=length, seed=seed)


def no_render(messages: list[dict[str, Any]]) -> str:
    raise AssertionError("these rows hold no messages")


def texts_of(path: Path, part: Any) -> list[str]:
    return documents(find_set(str(path)), part, no_render)


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in sentences(40)])


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def with_begin_token(folder: Path, target: Path) -> Path:
    """The tiny tokenizer, made to put its begin token before every text as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(folder, target)
    tokenizer = tokenizer_of(target)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.save_pretrained(target)
    return target


# packing


def test_rows_are_the_shuffled_documents_joined_by_the_end_token(jsonl: Path, tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    kept = texts_of(jsonl, "calibration")
    random.Random(3).shuffle(kept)
    stream: list[int] = []
    for text in kept:
        stream += tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    expected = torch.tensor(stream[: 5 * 32]).reshape(5, 32)

    made = load_calibration(section(jsonl, 5, 32, seed=3), tiny_llama)
    assert made.ids.dtype == torch.int64
    assert torch.equal(made.ids, expected)
    flat = made.ids.flatten().tolist()
    assert made.fingerprint == hashlib.sha256(struct.pack(f"<{len(flat)}q", *flat)).hexdigest()
    assert (made.name, made.part) == ("rows.jsonl", "calibration")


def test_the_begin_token_heads_every_row_when_the_tokenizer_adds_one(
    jsonl: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = with_begin_token(tiny_llama, tmp_path / "tokenizer")
    tokenizer = tokenizer_of(folder)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id == 1
    plain = load_calibration(section(jsonl, 4, 31), tiny_llama).ids
    headed = load_calibration(section(jsonl, 4, 32), folder).ids
    assert headed[:, 0].tolist() == [1] * 4
    assert torch.equal(headed[:, 1:], plain), "nothing of the text is lost to the begin tokens"


def test_a_begin_token_that_the_text_brings_is_not_doubled(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_begin_token(tiny_llama, tmp_path / "tokenizer")
    path = write_rows(tmp_path / "x.jsonl", [{"text": f"<|im_start|>{text}"} for text in sentences(20)])
    assert load_calibration(section(path, 1, 32), folder).ids[0, :2].tolist().count(1) == 1


def test_seed_changes_the_order_and_nothing_else_does(jsonl: Path, tiny_llama: Path) -> None:
    first = load_calibration(section(jsonl, seed=0), tiny_llama)
    assert load_calibration(section(jsonl, seed=0), tiny_llama).fingerprint == first.fingerprint
    assert load_calibration(section(jsonl, seed=1), tiny_llama).fingerprint != first.fingerprint


def test_too_little_text_says_how_much_there_was(jsonl: Path, tiny_llama: Path) -> None:
    tokenizer = tokenizer_of(tiny_llama)
    total = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts_of(jsonl, "calibration"))
    with pytest.raises(DataError) as caught:
        load_calibration(section(jsonl, 1000, 32), tiny_llama)
    assert f"too little text: {total} tokens, needed 32000 for 1000 sequences of 32" in caught.value.message
    assert f"enough for {total // 32} sequences" in str(caught.value.hint)
    assert caught.value.exit_code == 3
    assert load_calibration(section(jsonl, total // 32, 32), tiny_llama).ids.shape[0] == total // 32


# the cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "own-cache"))
    return tmp_path / "own-cache" / "calibration"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sets whose documents were read while the test ran."""
    seen: list[str] = []
    real = calibration_rows.documents

    def counted(source: Any, part: Any, render: Any) -> list[str]:
        seen.append(source.name)
        return real(source, part, render)

    monkeypatch.setattr(calibration_rows, "documents", counted)
    return seen


def test_ids_come_from_the_cache_until_something_changes(
    jsonl: Path, tiny_llama: Path, tmp_path: Path, cache: Path, reads: list[str]
) -> None:
    first = load_calibration(section(jsonl), tiny_llama)
    assert torch.equal(load_calibration(section(jsonl), tiny_llama).ids, first.ids)
    assert len(reads) == 1
    load_calibration(section(jsonl, seed=1), tiny_llama)
    load_calibration(section(jsonl, length=16), tiny_llama)
    load_calibration(section(jsonl, sequences=2), tiny_llama)
    load_calibration(section(jsonl), tiny_llama, "evaluation")
    load_calibration(section(jsonl), with_begin_token(tiny_llama, tmp_path / "tokenizer"))
    jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
    load_calibration(section(jsonl), tiny_llama)
    assert len(reads) == 7
    assert len(list(cache.iterdir())) == 7, "nothing partial is left behind"


def test_a_damaged_cache_file_is_made_again(jsonl: Path, tiny_llama: Path, cache: Path, reads: list[str]) -> None:
    first = load_calibration(section(jsonl), tiny_llama)
    (path,) = cache.iterdir()
    good = path.read_text()
    document = json.loads(good)
    flipped = json.loads(good)
    flipped["ids"][0][0] += 1
    short = {"ids": document["ids"][:2], "fingerprint": fingerprint_of(torch.tensor(document["ids"][:2]))}
    damaged = ["", "{", "[]", good[: len(good) // 2], json.dumps(flipped), json.dumps(short), '{"ids": [[1], [1, 2]]}']
    for text in damaged:
        path.write_text(text)
        assert torch.equal(load_calibration(section(jsonl), tiny_llama).ids, first.ids)
        assert path.read_text() == good
    assert len(reads) == 1 + len(damaged)


def test_a_cache_that_cannot_be_written_costs_only_time(jsonl: Path, tiny_llama: Path, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    assert load_calibration(section(jsonl), tiny_llama).ids.shape == (4, 32)


# files of ids


def test_a_built_file_is_a_set_again(jsonl: Path, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "ids.json"
    made = build(str(jsonl), tiny_llama, out, sequences=6, length=24, seed=5)
    document = json.loads(out.read_text())
    assert document["fingerprint"] == made.fingerprint and document["ids"] == made.ids.tolist()
    assert [path.name for path in out.parent.iterdir()] == ["ids.json"]
    again = load_calibration(section(out, 6, 24), tiny_llama)
    assert torch.equal(again.ids, made.ids) and again.fingerprint == made.fingerprint
    fewer = load_calibration(section(out, 2, 24), tiny_llama)
    assert torch.equal(fewer.ids, made.ids[:2]) and fewer.fingerprint != made.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "expected a list of rows"),
        ({"ids": [[1, 2], [1]]}, "rows of one length"),
        ({"ids": [[1, True]]}, "rows of one length that hold integers"),
        ({"ids": [[1] * 8] * 2}, "holds 2 sequences of 8 tokens, the recipe asks for 4 of 32"),
        ({"ids": [[384] * 32] * 4}, "another tokenizer \\(ids 384 to 384; the model's tokenizer has 384"),
        ({"ids": [[-1] * 32] * 4}, "another tokenizer"),
        ({"tokenizer_sha256": "0" * 64}, "another tokenizer"),
        ({"fingerprint": "0" * 64}, "do not have the fingerprint"),
        ({"part": "evaluation"}, "holds the evaluation part, the calibration part is needed"),
    ],
)
def test_files_of_ids_that_do_not_fit(tiny_llama: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"ids": [[5] * 32] * 4, **change}))
    with pytest.raises(DataError, match=message):
        load_calibration(section(path), tiny_llama)


def test_bare_ids_are_enough_and_a_cut_off_file_is_damaged(tiny_llama: Path, tmp_path: Path, jsonl: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"ids": [[5] * 32] * 4}))
    assert load_calibration(section(path), tiny_llama).ids.tolist() == [[5] * 32] * 4
    build(str(jsonl), tiny_llama, path, sequences=4, length=32, seed=0)
    path.write_text(path.read_text()[:-100])
    with pytest.raises(DataError, match="not JSON"):
        load_calibration(section(path), tiny_llama)
