"""YAML from users: bounded, without aliases or duplicate keys, and with no surprising scalars."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.errors import RecipeError
from quantkit.strict_yaml import MAX_BYTES, parse_yaml, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("010", 10),
        ("-3", -3),
        ("1e-3", 0.001),
        ("0.5", 0.5),
        (".5", 0.5),
        ("6.", 6.0),
        ("1.2.3", "1.2.3"),
        ("1_000", "1_000"),
        ("<<", "<<"),
        ('"12"', "12"),
        ("[1, a]", [1, "a"]),
        ("{a: {b: }}", {"a": {"b": None}}),
    ],
)
def test_scalars(text: str, value: object) -> None:
    parsed = parse_yaml(text, "x.yaml")
    assert parsed == value and type(parsed) is type(value)


def test_every_duplicate_key_is_named_with_both_lines() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", "x.yaml")
    assert caught.value.message.splitlines() == [
        "x.yaml: line 5: a: given twice, first on line 1",
        "x.yaml: line 4: c: given twice, first on line 3",
    ]


def test_a_syntax_error_has_its_place() -> None:
    with pytest.raises(RecipeError, match=r"x\.yaml: line 3, column 2: "):
        parse_yaml("a: 1\nb: [1, 2\nc: 3\n", "x.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("[" * 60 + "]" * 60, "levels"),
        ("[" + "1," * 30_000 + "]", "values"),
        ("a: !!python/object/apply:os.system [ls]", "constructor"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1: found another document"),
        ("? [a]\n: 1\n", "plain text"),
        ("a: \x00", "not YAML"),
        ("\tb: 1", "line 1"),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        parse_yaml(text, "x.yaml")


def test_a_regex_in_double_quotes_is_told_where_backslashes_stand() -> None:
    with pytest.raises(RecipeError, match="unknown escape character") as caught:
        parse_yaml('skip: ["layers\\.0"]', "x.yaml")
    assert caught.value.hint == "backslashes stand in single quotes or in none"
    assert parse_yaml("skip: ['layers\\.0', layers\\.1]", "x.yaml") == {"skip": ["layers\\.0", "layers\\.1"]}


def test_an_alias_bomb_is_refused_at_its_first_alias() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    with pytest.raises(RecipeError, match="line 2.*aliases"):
        parse_yaml(bomb, "x.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"a" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="larger than 1 MB"):
        read_text(large, "large.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="byte 3 is not UTF-8"):
        read_text(binary, "binary.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_text(tmp_path, "folder.yaml")
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_text(marked, "marked.yaml") == "a: 1"
