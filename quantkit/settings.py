"""`--set KEY=VALUE`: dotted keys, and putting values onto the mapping that a file holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.errors import RecipeError
from quantkit.strict_yaml import parse_yaml
from quantkit.validation import dotted, entry_name, suggestion

_WORD = re.compile(r'"([^"]*)"|([^."=]+)')


@dataclass(frozen=True)
class Change:
    """One value put onto a recipe from outside its file. origin: how messages begin that concern it."""

    origin: str
    path: tuple[str, ...]
    value: Any


def parse_setting(text: str) -> Change:
    """A `KEY=VALUE` of the command line; the value is YAML. Raises RecipeError for anything else."""
    key, after = _split_key(text)
    if not key or not after.startswith("="):
        raise RecipeError(
            f"--set {text}: found no KEY=VALUE, expected a dotted key, such as method.group_size=64",
            hint='a part of a key that holds dots goes into double quotes: overrides."mlp\\.down"=skip',
        )
    return Change("--set ", key, parse_yaml(after[1:], f"--set {text}"))


def parse_key(text: str, where: str) -> tuple[str, ...]:
    """The parts of a dotted key. Raises RecipeError when it is malformed."""
    key, after = _split_key(text)
    if after or not key:
        raise RecipeError(f'{where}: found "{text}", expected a dotted key, such as method.group_size')
    return key


def apply_changes(raw: dict[str, Any], changes: Sequence[Change]) -> tuple[dict[str, Any], list[Change], list[str]]:
    """The mapping with changes put onto it, the changes with the paths they took, a line for each without a place."""
    data = copy.deepcopy(raw)
    placed: list[Change] = []
    problems: list[str] = []
    for change in changes:
        try:
            placed.append(Change(change.origin, _assign(data, change), change.value))
        except _NoPlaceError as error:
            problems.append(f"{change.origin}{dotted(change.path)}: {error}")
    return data, placed, problems


class _NoPlaceError(Exception):
    """A change whose key leads nowhere."""


def _split_key(text: str) -> tuple[tuple[str, ...], str]:
    """The parts of the dotted key that a text begins with, and what follows it."""
    words: list[str] = []
    at = 0
    while match := _WORD.match(text, at):
        words.append(match.group(2) if match.group(1) is None else match.group(1))
        at = match.end()
        if not text.startswith(".", at):
            return tuple(words), text[at:]
        at += 1
    return (), text


def _assign(data: dict[str, Any], change: Change) -> tuple[Any, ...]:
    """Put the value of a change into `data`. Returns the path it took, list entries by position."""
    here: Any = data
    path: list[Any] = []
    for depth, word in enumerate(change.path):
        last = depth == len(change.path) - 1
        key: Any = _position(here, word) if isinstance(here, list) else word
        path.append(key)
        if last:
            here[key] = copy.deepcopy(change.value)
            break
        inside = here[key] if isinstance(here, list) else here.get(key)
        if inside is None:
            inside = here[key] = {}
        elif not isinstance(inside, dict | list):
            raise _NoPlaceError(f"{dotted(change.path[: depth + 1])} is a single value without keys of its own")
        here = inside
    return tuple(path)


def _position(entries: list[Any], word: str) -> int:
    """The entry of a list that a word means: its name, or its position from 0."""
    names = {name: index for index in range(len(entries)) if (name := entry_name(entries, index)) is not None}
    if word in names:
        return names[word]
    if word.isdecimal() and int(word) < len(entries):
        return int(word)
    known = [*names] or [str(index) for index in range(len(entries))]
    if not known:
        raise _NoPlaceError(f'no entry "{word}": the list is empty')
    raise _NoPlaceError(f'no entry "{word}"; {suggestion(word, known)}')
