"""What every verb of the command line has: quiet libraries, what it shows, and the options that several take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from quantkit.errors import UsageError
from quantkit.quiet import quiet_libraries, stdout_for_data


@dataclass(frozen=True)
class Shown:
    """What a verb has to say: `document` for --json, else `text`, a string or what prints itself."""

    document: Any
    text: str | Callable[[], None]
    as_json: bool = False
    failure: Exception | None = None  # said after the result, with its exit code
    code: int = 0


Verb = TypeVar("Verb", bound=Callable[..., Any])


def verb(function: Verb) -> Verb:
    """A verb whose body may call libraries: they are quieted, and what they print goes to stderr."""

    @functools.wraps(function)
    def quieted(*args: Any, **kwargs: Any) -> Any:
        quiet_libraries()
        with stdout_for_data():
            return function(*args, **kwargs)

    return quieted  # type: ignore[return-value]


def out_folder(text: str) -> Path:
    """The folder that --out names. Raises UsageError for an empty name, which a path would take for this folder."""
    if not text:
        raise UsageError("--out: is empty; expected the name of a folder", hint="--out . is the current folder")
    return Path(text)


Model = Annotated[str | None, typer.Option("--model", metavar="DIR|FILE.gguf|HUB_ID", help="Overrides the recipe's.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any dotted key, such as method.group_size=64.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to compute.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what quantkit made there before.")]
Restart = Annotated[bool, typer.Option("--restart", help="Drop what an unfinished run left, and begin again.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Such as 3GB: slower, on disk, but within it.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run a tokenizer's own code from the model's folder.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT", help="Folders that quantize wrote, or .gguf.")]
