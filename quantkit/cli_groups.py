"""The verbs of `quantkit recipes` and `quantkit calibration`: what ships, and the check and building of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from quantkit.cli_verb import Force, Shown, verb

_GROUP: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}

recipes = typer.Typer(help="The recipes that ship, and the check of your own.", **_GROUP)
calibration = typer.Typer(help="The texts that statistics are taken from.", **_GROUP)


@recipes.command("list")
@verb
def recipes_list() -> Shown:
    """Name, kind and purpose of everything that ships."""
    from quantkit import words
    from quantkit.shipped import list_recipes

    return Shown(None, words.recipes(list_recipes()))


@recipes.command("show")
@verb
def recipes_show(name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped name or a file.")]) -> Shown:
    """The file itself, to copy and change."""
    from quantkit.shipped import recipe_text

    return Shown(None, recipe_text(name).rstrip("\n"))


@recipes.command("validate")
@verb
def recipes_validate(files: Annotated[list[str], typer.Argument(metavar="FILE", help="Recipes or suites.")]) -> Shown:
    """Every problem of every file at once."""
    from quantkit import verbs

    return Shown(None, "\n".join(f"{file}: valid" for file in verbs.validate(files)))


@recipes.command("schema")
@verb
def recipes_schema() -> Shown:
    """The JSON schema of recipes and suites, for editors."""
    from quantkit.recipe import json_schema

    return Shown(json_schema(), "", as_json=True)


@calibration.command("list")
@verb
def calibration_list() -> Shown:
    """The sets that ship."""
    from quantkit import verbs, words

    return Shown(None, words.calibration_sets(verbs.calibration_sets()))


@calibration.command("show")
@verb
def calibration_show(name: Annotated[str, typer.Argument(metavar="NAME", help="A set that ships.")]) -> Shown:
    """The definition of a set."""
    from quantkit import verbs

    return Shown(None, verbs.calibration_text(name).rstrip("\n"))


@calibration.command("build")
@verb
def calibration_build(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A set that ships, or a local file.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="JSON: ids, fingerprint, definition.")],
    model: Annotated[str, typer.Option("--model", metavar="DIR|FILE.gguf|HUB_ID", help="Whose tokenizer.")],
    sequences: Annotated[int, typer.Option(min=1)] = 128,
    length: Annotated[int, typer.Option(min=8, help="Tokens a sequence.")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
    part: Annotated[Literal["calibration", "evaluation"], typer.Option()] = "calibration",
    force: Force = False,
) -> Shown:
    """Write the token ids of a set and print their fingerprint."""
    from quantkit import verbs

    fingerprint = verbs.build_calibration(name, model, sequences, length, seed, part, out, force=force)
    return Shown(None, fingerprint)
