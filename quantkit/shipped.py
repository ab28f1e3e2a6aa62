"""The files that come with quantkit, in the repository or inside the installed package. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from quantkit.errors import RecipeError
from quantkit.strict_yaml import read_text
from quantkit.validation import suggestion

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder of the "recipes" or "calibration" definitions that ship with quantkit."""
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name


def header_comment(text: str) -> str:
    """The comment at the head of a YAML file, its lines joined: what the file is for."""
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ").rstrip() for line in head)


@dataclass(frozen=True)
class Shipped:
    """A recipe or suite that comes with quantkit. description: the comment at the head of its file."""

    name: str
    kind: str
    description: str


def list_recipes() -> list[Shipped]:
    """The recipes and suites that come with quantkit: recipes first, by name."""
    found = []
    for path in sorted(shipped_folder("recipes").glob("*.yaml")):
        text = read_text(path, f"recipes/{path.name}")
        kind = "suite" if "\nrecipes:" in text else "recipe"
        found.append(Shipped(path.stem, kind, header_comment(text)))
    return sorted(found, key=lambda shipped: (shipped.kind, shipped.name))


def recipe_text(name_or_path: str | Path) -> str:
    """A recipe's or suite's file as it was written. Raises RecipeError."""
    path, shown = find_recipe(name_or_path)
    return read_text(path, shown)


def find_recipe(name_or_path: str | Path, folder: Path | None = None, where: str = "") -> tuple[Path, str]:
    """The file a user means, and what messages call it: a file (from `folder` on), or a shipped name.

    where: how messages begin. Raises RecipeError with what there is.
    """
    text = str(name_or_path)
    path = Path(text) if folder is None else folder / text
    if folder is not None and (Path(text).is_absolute() or ".." in Path(text).parts):
        raise RecipeError(
            f'{where}"{text}": leads out of the folder of the suite; expected a file in it, or a shipped name',
            hint="copy the recipe beside the suite",
        )
    names_a_file = path.suffix in (".yaml", ".yml") or "/" in text or "\\" in text
    if names_a_file:
        if path.is_file():
            return path, str(path)
        raise RecipeError(f"{where}{path}: no such file", hint="`quantkit recipes list` has the names that ship")
    shipped = shipped_folder("recipes") / f"{text}.yaml"
    if shipped.is_file():
        return shipped, f"recipes/{shipped.name}"
    known = [file.stem for file in shipped_folder("recipes").glob("*.yaml")]
    raise RecipeError(
        f'{where}"{text}": no shipped recipe of that name; {suggestion(text, known)}',
        hint="`quantkit recipes list` has them all; a file of your own ends in .yaml",
    )
