"""Which calibration sets there are, and what each is made of: definitions in calibration/*.yaml, or local files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from quantkit.errors import DataError, RecipeError
from quantkit.patterns import regex_problem
from quantkit.resources import resource_folder
from quantkit.schema import Frozen
from quantkit.strict_yaml import parse_yaml, read_text
from quantkit.validation import dotted, problems_of, suggestion

Part = Literal["calibration", "evaluation"]
PARTS: tuple[Part, ...] = get_args(Part)

FILE_KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".raw": "text"}
"""Suffix to the builder of `datasets` that reads it; WikiText comes as .raw."""

_YAML = (".yaml", ".yml")


class HubSet(Frozen):
    """Rows of a data set on a hub."""

    id: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
    revision: str = Field("main", description="a commit of 40 digits is fixed; a branch or tag may change")
    config: str | None = None
    split: str = "train"
    evaluation_split: str | None = Field(None, description="a tenth of the rows of split is held out when left out")
    rows: int | None = Field(None, ge=2, description="read only the first rows of a split, without fetching the rest")

    @property
    def pinned(self) -> bool:
        """Whether the same rows come back every time."""
        return re.fullmatch(r"[0-9a-f]{40}", self.revision) is not None


class Definition(Frozen):
    """What a calibration set is made of: exactly one of hub, files and embedded."""

    hub: HubSet | None = None
    files: tuple[str, ...] = Field((), description="json, jsonl, parquet or txt, relative to the definition")
    evaluation_files: tuple[str, ...] = Field((), description="a tenth of files is held out when left out")
    embedded: Literal["pydoc_data.topics"] | None = None
    text_field: str | None = Field(None, description="column of the text; found by its name when left out")
    messages_field: str | None = Field(None, description="column of chat messages, for the model's chat template")
    document_start: str | None = Field(None, description="regex: rows are lines, a document begins at one that matches")
    licence: str | None = None

    @field_validator("files", "evaluation_files")
    @classmethod
    def _known_suffixes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if Path(name).suffix not in FILE_KINDS:
                raise ValueError(f'found "{name}", expected a file of {", ".join(FILE_KINDS)}')
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f'found "{name}", expected a file in the folder of the definition')
        return value

    @field_validator("document_start")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        problem = regex_problem(value or "")
        if problem is not None:
            raise ValueError(problem)
        return value

    @model_validator(mode="after")
    def _one_source(self) -> Definition:
        given = [key for key in ("hub", "files", "embedded") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none'}, expected exactly one of hub, files and embedded")
        if self.text_field and self.messages_field:
            raise ValueError("found text_field and messages_field, expected one of them")
        if self.messages_field and self.document_start:
            raise ValueError("document_start joins rows of text, it does not go with messages_field")
        if self.evaluation_files and not self.files:
            raise ValueError("evaluation_files goes with files")
        return self


class CalibrationSource(Frozen):
    """A set that a recipe names. name: as it was named. folder: what its files are relative to."""

    name: str
    definition: Definition
    folder: Path

    def files(self, part: Part) -> list[Path]:
        """The files of a part; those of calibration when evaluation has none of its own."""
        names = self.definition.files
        if part == "evaluation" and self.definition.evaluation_files:
            names = self.definition.evaluation_files
        return [self.folder / name for name in names]


def list_definitions() -> dict[str, Path]:
    """The sets that ship with quantkit: name to file."""
    return {path.stem: path for path in sorted(resource_folder("calibration").glob("*.yaml"))}


def load_definition(name_or_path: str | Path) -> Definition:
    """A definition that ships, or one of the user's in a .yaml file. Raises DataError, RecipeError if invalid."""
    return _load(_definition_file(str(name_or_path)))


def find_set(name_or_file: str) -> CalibrationSource:
    """The set that `calibration.set` names: a definition or a local file. Raises DataError, RecipeError."""
    path = Path(name_or_file).expanduser()
    if path.suffix in FILE_KINDS:
        if not path.is_file():
            raise DataError(f"{path}: no such file", hint=f"or a set that ships: {', '.join(list_definitions())}")
        return CalibrationSource(name=path.name, definition=Definition(files=(path.name,)), folder=path.parent)
    if path.is_file() and path.suffix not in _YAML:
        raise DataError(
            f"{path}: a {path.suffix or 'file without suffix'}, expected one of {', '.join(FILE_KINDS)}",
            hint="the suffix says how the file is read: rename a copy of it",
        )
    file = _definition_file(name_or_file)
    return CalibrationSource(name=file.stem, definition=_load(file), folder=file.parent)


def _definition_file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.suffix in _YAML:
        if not path.is_file():
            raise DataError(f"{path}: no such file", hint=f"or a set that ships: {', '.join(list_definitions())}")
        return path
    known = list_definitions()
    if name not in known:
        raise DataError(
            f'"{name}": no calibration set of that name and no file; {suggestion(name, known)}',
            hint=f"there are {', '.join(known)}; a file of your own ends in {', '.join(FILE_KINDS)}",
        )
    return known[name]


def _load(path: Path) -> Definition:
    shown = f"calibration/{path.name}" if path.parent == resource_folder("calibration") else str(path)
    raw: Any = parse_yaml(read_text(path, shown), shown)
    if not isinstance(raw, dict):
        raise RecipeError(f"{shown}: expected a mapping with hub, files or embedded")
    try:
        return Definition.model_validate(raw)
    except ValidationError as error:
        lines = [": ".join(filter(None, (shown, dotted(one.path), one.text))) for one in problems_of(error, Definition)]
        raise RecipeError.from_problems(lines, hint="the files that ship under calibration/ are examples") from error
