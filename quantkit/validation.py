"""What is wrong with a file in the user's own words: dotted keys as written, what was found, what was expected."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

from pydantic import BaseModel, ValidationError

Path = tuple[str | int, ...]

NAMING_KEYS = ("name", "label", "recipe")
"""Keys by which an entry of a list may be addressed instead of by its position."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong at one place. path: keys from the top of the file; unknown: the key itself is the problem."""

    path: Path
    text: str
    unknown: bool = False


class Problems(ValueError):
    """Several problems found by one validator; paths are relative to the validated field."""

    def __init__(self, problems: Sequence[Problem]):
        super().__init__("; ".join(f"{dotted(problem.path)}: {problem.text}" for problem in problems))
        self.problems = tuple(problems)


def in_one_line(error: ValidationError, root: Any) -> str:
    """Every problem of a pydantic error, as the reason of a row. root: the type that was validated."""
    return "; ".join(": ".join(filter(None, (dotted(one.path), one.text))) for one in problems_of(error, root))


def problems_of(error: ValidationError, root: Any) -> list[Problem]:
    """Every problem of a pydantic error, with union tags taken out of the paths. root: the type that was validated."""
    found: list[Problem] = []
    for item in error.errors(include_url=False):
        path, at = _walk(root, item["loc"])
        nested = item.get("ctx", {}).get("error")
        if isinstance(nested, Problems):
            found += [Problem(path + inner.path, inner.text, inner.unknown) for inner in nested.problems]
        else:
            found.append(_problem(dict(item), path, at))
    return found


def dotted(path: Path, data: Any = None) -> str:
    """A path as the user addresses it: list entries by their name where `data` gives them a unique one."""
    words: list[str] = []
    for key in path:
        name = entry_name(data, key) if isinstance(data, list) and isinstance(key, int) else None
        word = str(key) if name is None else name
        words.append(word if re.fullmatch(r"[\w-]+", word) else found(word))
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            data = None
    return ".".join(words)


def entry_name(entries: Sequence[Any], index: int) -> str | None:
    """The name that only this entry of a list of mappings has, or None."""
    names = [_name(entry) for entry in entries]
    if index >= len(names) or names[index] is None or names.count(names[index]) > 1:
        return None
    return names[index]


def found(value: Any) -> str:
    """A value as it would stand in a file, shortened; what a terminal would not print is escaped."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text = text if text.isprintable() else json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "did you mean X?" for a near miss, else everything there is."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(names)}"


def _name(entry: Any) -> str | None:
    if not isinstance(entry, Mapping):
        return None
    return next((entry[key] for key in NAMING_KEYS if isinstance(entry.get(key), str)), None)


def _walk(root: Any, loc: tuple[int | str, ...]) -> tuple[Path, Any]:
    """The user's keys of a pydantic location, and the type that stands there (a model where a key is unknown)."""
    path: list[str | int] = []
    at = root
    for element in loc:
        options = _options(at)
        models = [option for option in options if _is_model(option)]
        containers = [option for option in options if typing.get_origin(option) in (tuple, list, dict)]
        if len(models) > 1:  # a union told apart by `name`: the element is its tag, not a key that the user wrote
            at = next((model for model in models if model.model_fields["name"].default == element), at)
            continue
        if element == "[key]":
            continue
        path.append(element)
        if models and element in models[0].model_fields:
            at = models[0].model_fields[str(element)].annotation
        elif containers:
            arguments = typing.get_args(containers[0])
            at = arguments[1] if typing.get_origin(containers[0]) is dict else arguments[0]
        elif not models:
            at = Any
    return tuple(path), at


def _options(annotation: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and None."""
    if typing.get_origin(annotation) is Annotated:
        return _options(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [option for part in typing.get_args(annotation) for option in _options(part)]
    return [] if annotation is type(None) else [annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


_EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}

_BOUNDS = {
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length} of them",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text of the form {pattern}",
}


def _problem(item: dict[str, Any], path: Path, at: Any) -> Problem:
    kind, context = item["type"], item.get("ctx", {})
    given = found(item["input"])
    if kind == "extra_forbidden":
        models = [option for option in _options(at) if _is_model(option)]
        known = models[0].model_fields if models else ()
        return Problem(path, f"unknown key; {suggestion(str(path[-1]), known)}", unknown=True)
    if kind == "missing":
        return Problem(path, "missing; it has no default")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        names = [model.model_fields["name"].default for model in _options(at) if _is_model(model)]
        if kind == "union_tag_not_found":
            return Problem((*path, "name"), f"missing; expected one of {', '.join(names)}")
        return Problem((*path, "name"), _wrong_name(context["tag"], names))
    if kind == "value_error":
        return Problem(path, str(context["error"]))
    if kind in _BOUNDS:
        return Problem(path, f"found {given}, expected {_BOUNDS[kind].format(**context).replace(chr(39), '')}")
    expected = _EXPECTED.get(kind.split("_")[0])
    if expected is None:
        return Problem(path, f"found {given}: {item['msg']}")
    if kind == "model_attributes_type" and isinstance(item["input"], str):  # a union: its name was written alone
        expected = f"a mapping, such as {path[-1]}: {{name: {item['input']}}}"
    return Problem(path, f"found {given}, expected {expected}")


def _wrong_name(tag: str, names: list[str]) -> str:
    close = difflib.get_close_matches(tag, names, n=1, cutoff=0.6)
    ending = f"; did you mean {close[0]}?" if close else ""
    return f"found {found(tag)}, expected one of {', '.join(names)}{ending}"
