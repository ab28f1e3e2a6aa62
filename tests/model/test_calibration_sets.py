"""The texts of calibration sets: what each kind of set gives, disjoint parts, and what wrong input is told."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fakes.rows import WORDS, sentences, write_rows
from quantkit.errors import DataError, ModelError, RecipeError
from quantkit.model.calibration import list_definitions, load_calibration, load_definition
from quantkit.model.calibration_rows import cut_text, documents
from quantkit.model.calibration_sets import PARTS, find_set
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


def test_every_shipped_set_is_valid_and_pinned() -> None:
    known = list_definitions()
    assert {"pydoc", "wikitext2", "c4", "ultrachat"} <= set(known)
    for name in known:
        definition = load_definition(name)
        assert definition.licence
        assert definition.hub is None or definition.hub.pinned
        assert known[name].read_text().startswith("# "), "the head of the file says what it is"


def test_the_embedded_parts_share_no_paragraph_and_are_large_enough() -> None:
    parts = {part: documents(find_set("pydoc"), part, no_render) for part in PARTS}
    paragraphs = {
        part: [" ".join(p.split()) for text in texts for p in text.split("\n\n")] for part, texts in parts.items()
    }
    assert not set(paragraphs["calibration"]) & set(paragraphs["evaluation"])
    words = {part: " ".join(texts).split() for part, texts in parts.items()}
    seen = {tuple(words["calibration"][i : i + 13]) for i in range(len(words["calibration"]) - 12)}
    held_out = [tuple(words["evaluation"][i : i + 13]) for i in range(len(words["evaluation"]) - 12)]
    assert sum(run in seen for run in held_out) / len(held_out) < 0.02, "nor long runs of words beyond stock phrases"
    # 32 x 512 and 16 x 256 tokens with a tokenizer that needs four characters a token or fewer
    assert sum(map(len, parts["calibration"])) > 32 * 512 * 4.5
    assert sum(map(len, parts["evaluation"])) > 16 * 256 * 4.5
    assert not re.search(r"^[*=-]+$", "\n".join(parts["calibration"]), re.MULTILINE), "underlines of headings are gone"


def test_the_embedded_set_packs_without_network(tiny_llama: Path) -> None:
    calibration = load_calibration(section("pydoc", 32, 512), tiny_llama)
    evaluation = load_calibration(section("pydoc", 16, 256), tiny_llama, "evaluation")
    assert calibration.ids.shape == (32, 512) and evaluation.ids.shape == (16, 256)
    assert calibration.definition["embedded"] == "pydoc_data.topics"


def test_embedded_topics_that_quote_each_other_are_kept_once() -> None:
    from quantkit.model.embedded_text import split_topics

    own = {f"t{number}": f"Topic {number}\n*******\n\n   {text}" for number, text in enumerate(sentences(30))}
    own = {name: text * 1 + "\n\n" + " ".join(sentences(6, seed=int(name[1:]) + 1)) for name, text in own.items()}
    everything = "\n\n".join(own.values())
    calibration, evaluation = split_topics({**own, "all": everything})
    assert len(calibration) + len(evaluation) == 30, "the topic that only quotes has nothing of its own"
    assert evaluation and not {p for t in evaluation for p in t.split("\n\n")} & {
        p for t in calibration for p in t.split("\n\n")
    }


def test_parts_of_a_file_are_disjoint_and_whole(jsonl: Path) -> None:
    calibration, evaluation = texts_of(jsonl, "calibration"), texts_of(jsonl, "evaluation")
    assert len(evaluation) == 4 and sorted(calibration + evaluation) == sorted(sentences(40))
    assert set(evaluation) != set(sorted(sentences(40))[:4]), "drawn, not the first of the alphabet"


def test_duplicates_and_order_do_not_move_a_text_to_the_other_part(jsonl: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in sentences(40)]
    shuffled = write_rows(tmp_path / "other.jsonl", rows[::-1] + rows[:13])
    assert set(texts_of(shuffled, "evaluation")) == set(texts_of(jsonl, "evaluation"))
    assert not set(texts_of(shuffled, "evaluation")) & set(texts_of(shuffled, "calibration"))


def test_json_jsonl_parquet_and_txt_hold_the_same(jsonl: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"text": text} for text in sentences(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "strings.json").write_text(json.dumps(sentences(40)))
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("\n<|endoftext|>\n".join(sentences(40)))
    for name in ("rows.json", "strings.json", "rows.parquet", "rows.txt"):
        assert texts_of(tmp_path / name, "calibration") == texts_of(jsonl, "calibration"), name


def test_a_long_text_is_cut_at_blank_lines_into_sections() -> None:
    paragraphs = sentences(200)
    cut = cut_text("\n\n".join(paragraphs))
    assert "\n\n".join(cut).split("\n\n") == paragraphs
    assert 10 < len(cut) < 30
    lines = cut_text("\n".join(paragraphs))
    assert "\n".join(lines).split("\n") == paragraphs and 10 < len(lines) < 30
    assert cut_text("one") == ["one"]
    assert cut_text(" \n\n ") == []


def test_lines_are_gathered_into_articles(tmp_path: Path) -> None:
    lines = ["", " = First = \n", "", " text one \n", " = = Part = = \n", " more \n", "", " = Second = \n", " two \n"]
    write_rows(tmp_path / "wiki.jsonl", [{"text": line} for line in lines])
    (tmp_path / "wiki.yaml").write_text(
        "files: [wiki.jsonl]\nevaluation_files: [wiki.jsonl]\ntext_field: text\n"
        "document_start: '^ = [^=].*[^=] = \\s*$'\n"
    )
    made = documents(find_set(str(tmp_path / "wiki.yaml")), "calibration", no_render)
    assert made == ["= First =\n\ntext one\n\n= = Part = =\n\nmore", "= Second =\n\ntwo"]
    assert load_definition("wikitext2").document_start == "^ = [^=].*[^=] = \\s*$"


def test_messages_go_through_the_models_chat_template(tiny_llama: Path, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"Q{n}?"}, {"role": "assistant", "content": " ".join(WORDS)}] for n in range(20)
    ]
    shares = [[{"from": "human", "value": f"Q{n}?"}, {"from": "gpt", "value": " ".join(WORDS)}] for n in range(20)]
    messages = write_rows(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    conversations = write_rows(tmp_path / "shares.jsonl", [{"id": 1, "conversations": chat} for chat in shares])
    made = load_calibration(section(messages), tiny_llama)
    assert made.fingerprint == load_calibration(section(conversations), tiny_llama).fingerprint
    decoded = tokenizer_of(tiny_llama).decode(made.ids[0])
    assert decoded.startswith("<|im_start|>user\nQ")
    assert f"<|im_end|>\n<|im_start|>assistant\n{WORDS[0]}" in decoded


def test_messages_without_a_template_are_an_error(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "tokenizer"))
    (folder / "chat_template.jinja").unlink()
    chats = write_rows(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}] * 3)
    with pytest.raises(DataError, match="no chat template"):
        load_calibration(section(chats), folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses messages of user: roles must alternate"):
        load_calibration(section(chats), folder)


def test_a_definition_of_ones_own_names_columns_and_files(tmp_path: Path, tiny_llama: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"body": text, "text": None} for text in sentences(30)])
    write_rows(tmp_path / "test.jsonl", [{"body": text, "text": None} for text in sentences(30, seed=1)])
    (tmp_path / "mine.yaml").write_text("files: [train.jsonl]\nevaluation_files: [test.jsonl]\ntext_field: body\n")
    source = find_set(str(tmp_path / "mine.yaml"))
    assert documents(source, "calibration", no_render) == sentences(30)
    assert documents(source, "evaluation", no_render) == sentences(30, seed=1)
    assert load_calibration(section(tmp_path / "mine.yaml"), tiny_llama).name == "mine"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", "", "x.jsonl: the file is empty"),
        ("x.jsonl", '{"text": "a"}\n{"text": \n', "x.jsonl: cannot be read: .*JSON parse error"),
        ("x.jsonl", '{"body": "a"}\n', "expected a column text, messages or conversations; found body"),
        ("x.jsonl", '{"text": 3}\n', "row 0: text: found a int, expected text"),
        ("x.jsonl", '{"text": null}\n{"text": " "}\n', "holds no text"),
        ("x.jsonl", '{"messages": "hi"}\n', "expected a list of messages"),
        ("x.jsonl", '{"messages": [{"role": "user"}]}\n', "expected role and content"),
        ("x.jsonl", '{"messages": []}\n', "no messages"),
        ("x.parquet", "PAR1", "x.parquet: cannot be read"),
        ("x.txt", "\n\n \n", "holds no text"),
        ("x.csv", "a,b", "a .csv, expected one of .json"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, tiny_llama: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_calibration(section(tmp_path / name), tiny_llama)
    assert caught.value.exit_code == 3 and len(caught.value.message.splitlines()) == 1


def test_text_that_is_not_utf8_and_a_single_document(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") * 100)
    with pytest.raises(DataError, match="latin.txt: cannot be read: UnicodeDecodeError"):
        load_calibration(section(tmp_path / "latin.txt"), tiny_llama)
    (tmp_path / "one.txt").write_text(" ".join(sentences(20)))
    assert load_calibration(section(tmp_path / "one.txt"), tiny_llama).ids.shape == (4, 32)
    with pytest.raises(DataError, match="a single document"):
        load_calibration(section(tmp_path / "one.txt"), tiny_llama, "evaluation")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitxt2", "did you mean wikitext2"),
        ("zzz", "expected one of c4, pydoc, ultrachat, wikitext2"),
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("missing.yaml", "missing.yaml: no such file"),
    ],
)
def test_unknown_sets(tiny_llama: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_calibration(section(name), tiny_llama)
    assert "wikitext2" in caught.value.render()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("licence: MIT", "found none, expected exactly one of hub, files and embedded"),
        ("embedded: pydoc_data.topics\nfiles: [a.txt]", "found files and embedded"),
        ("files: [a.csv]", 'files: found "a.csv", expected a file of .json'),
        ("files: [a.txt]\ntext_feild: x", "text_feild: unknown key; did you mean text_field"),
        ("files: [a.txt]\ntext_field: x\nmessages_field: y", "expected one of them"),
        ("hub: {id: a/b, split: train, rows: 0}", "hub.rows: found 0, expected 2 or more"),
        ("hub: {id: ../b}", "hub.id: found"),
        ("embedded: other", "embedded: found"),
        ("files: [a.txt]\ndocument_start: '('", "document_start: expected a regular expression"),
        ("- a", "expected a mapping"),
    ],
)
def test_wrong_definitions(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_definition(path)
    assert message in caught.value.message and str(path) in caught.value.message


def test_a_tokenizer_that_cannot_be_loaded(jsonl: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
        load_calibration(section(jsonl), tmp_path)
