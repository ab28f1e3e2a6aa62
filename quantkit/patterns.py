"""Regular expressions from files: valid, and of a kind that cannot take for ever on a module's name.

Python's engine tries every way to match: `(a+)+b` on 30 letters takes hours. What a pattern may cost is bounded before
it is used, by the ways that its parts can be matched in.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from re import _constants as kinds  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

LENGTH = 64
"""Of a name that is matched, about."""

MAX_WAYS = LENGTH**4
"""Four stretches of any length; patterns that ship and those of other tools have two."""

MAX_CHARACTERS = 20_000  # a list of whole names of a model's linears


def regex_problem(pattern: str) -> str | None:
    """Why a pattern cannot be used, None when it can."""
    if len(pattern) > MAX_CHARACTERS:
        return f"a pattern of {len(pattern)} characters, expected {MAX_CHARACTERS} or fewer"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            ways = _ways(_parser.parse(pattern))
    except (re.error, RecursionError, OverflowError) as error:
        return f"expected a regular expression: {error}"
    if ways > MAX_WAYS:
        return "repetitions inside repetitions, or too many of them: it could take for ever to match"
    return None


def _ways(parts: Iterable[tuple[Any, Any]]) -> float:
    """In how many ways a sequence of parsed parts can match a name, at most."""
    total = 1.0
    for kind, value in parts:
        if kind in (kinds.MAX_REPEAT, kinds.MIN_REPEAT, kinds.POSSESSIVE_REPEAT):
            least, most, inner = value
            once = _ways(inner)
            times = min(int(most), LENGTH) - min(int(least), LENGTH) + 1
            if once > 1 and int(most) > 1:
                return float("inf")
            total *= times * once
        elif kind is kinds.BRANCH:
            total *= sum(_ways(branch) for branch in value[1])
        elif kind is kinds.SUBPATTERN:
            total *= _ways(value[-1])
        elif kind in (kinds.ASSERT, kinds.ASSERT_NOT):
            total *= _ways(value[1])
        elif kind is kinds.ATOMIC_GROUP:
            total *= _ways(value)
        elif kind is kinds.GROUPREF_EXISTS:
            total *= _ways(value[1]) + (_ways(value[2]) if value[2] else 0.0)
    return total
