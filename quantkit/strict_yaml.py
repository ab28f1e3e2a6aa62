"""YAML as users' files need it: safe, bounded, duplicate keys refused, and without the surprises of YAML 1.1.

Plain `no`, `1:30` and `2026-01-01` stay text; only true, false, null and decimal numbers (1e-3 included) are converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from quantkit.errors import QuantkitError, RecipeError
from quantkit.validation import dotted

MAX_BYTES = 1_000_000
MAX_NODES = 20_000  # the largest recipe that ships has about 100; reading this many takes a second
MAX_DEPTH = 40
HINT = "expected plain YAML: key: value lines, indented with spaces"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML's JSON schema, which also collects duplicate keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, stream: str):
        super().__init__(stream)
        self.problems: list[str] = []
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are refused: write the value out", problem_mark=mark)
        self._nodes += 1
        self._depth += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            limit = f"{MAX_NODES} values" if self._nodes > MAX_NODES else f"{MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=f"more than {limit}", problem_mark=mark)
        node: yaml.Node | None = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key has to be plain text", problem_mark=key.start_mark)
            if key.value in seen:
                first = seen[key.value]
                self.problems.append(f"line {line}: {dotted((key.value,))}: given twice, first on line {first}")
            seen.setdefault(key.value, line)
        return super().construct_mapping(node, deep=deep)  # type: ignore[no-any-return]


def _scalar(tag: str, pattern: str, first: str, convert: Callable[[str], Any]) -> None:
    _Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), list(first))  # type: ignore[no-untyped-call]

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        return convert(loader.construct_scalar(node))  # type: ignore[no-untyped-call]

    _Loader.add_constructor(tag, construct)


_scalar("tag:yaml.org,2002:null", "~|null|Null|NULL|", "~nN\0", lambda text: None)
_scalar("tag:yaml.org,2002:bool", "true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true")
_scalar("tag:yaml.org,2002:int", r"[-+]?[0-9]{1,18}", "-+0123456789", int)
_scalar(
    "tag:yaml.org,2002:float",
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
    "-+.0123456789",
    float,
)
_Loader.yaml_implicit_resolvers[""] = _Loader.yaml_implicit_resolvers.pop("\0")  # an empty scalar is null


def parse_yaml(text: str, where: str) -> Any:
    """The value a YAML text stands for. Raises RecipeError with every duplicate key, or the place of a syntax error."""
    try:
        loader = _Loader(text)
        try:
            value = loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = (error.problem or error.context or "not YAML").removeprefix("but ")
        hint = "backslashes stand in single quotes or in none" if "escape character" in said else HINT
        raise RecipeError(f"{where}: {place}{said}", hint=hint) from error
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{where}: not YAML: {str(error).splitlines()[0]}", hint=HINT) from error
    if loader.problems:
        raise RecipeError.from_problems([f"{where}: {line}" for line in loader.problems], hint="keep one of them")
    return value


def read_text(path: Path, where: str, *, error: type[QuantkitError] = RecipeError) -> str:
    """A text file of at most 1 MB. Raises `error` when it cannot be read, is larger, or is not UTF-8."""
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(f"{where}: cannot be read: {problem.strerror}") from problem
    if len(content) > MAX_BYTES:
        raise error(f"{where}: larger than {MAX_BYTES // 1_000_000} MB; expected a few lines of YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not text: byte {problem.start} is not UTF-8") from problem
