"""Regular expressions from files: what people write is taken, what could take for ever is not."""

from __future__ import annotations

import pytest

from quantkit.patterns import regex_problem


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.0\.",
        r"layers\.(0|1|2)\.",
        r"layers\.(?:1[0-9]|2[0-3])\.(?:self_attn\.(?:q|k|v)_proj)",
        "(down|up)_proj$",
        r".*\.mlp\..*_proj",
        r"(?:model\.)?layers\.\d+\.",
        "^= [^=]* =$",
        "",
    ],
)
def test_usual_patterns(pattern: str) -> None:
    assert regex_problem(pattern) is None


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", r"(\w+\.?)*!", "(a|a)*b", "(?:a?){50}", "a?" * 30, ".*" * 8 + "x", "(x{1,9}){1,9}"]
)
def test_patterns_that_could_take_for_ever(pattern: str) -> None:
    assert "take for ever" in str(regex_problem(pattern))


@pytest.mark.parametrize("pattern", ["[", "(?P<a>x)(?P<a>y)", "a{99999999999999999999}", "x" * 100_000])
def test_patterns_that_are_none(pattern: str) -> None:
    assert regex_problem(pattern) is not None
