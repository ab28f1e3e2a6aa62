"""The command line: parse, call one function, print. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from quantkit import __version__
from quantkit.progress import Progress
from quantkit.quiet import quiet_libraries, stdout_for_data

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or recipe, 3 model or data, 4 a missing engine or dependency, 5 a gate failed, "
    "6 verification failed, 130 interrupted; 1 is a bug in quantkit."
)

_GROUP: dict[str, Any] = {"no_args_is_help": True, "rich_markup_mode": None}

app = typer.Typer(
    name="quantkit",
    help="Quantize causal language models with INT8, NF4, AWQ, GPTQ and GGUF, and measure what each one costs.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help pages: they come in half the time and go into the docs as they are
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="The recipes that ship, and the check of your own.", **_GROUP)
calibration = typer.Typer(help="The texts that statistics are taken from.", **_GROUP)
app.add_typer(recipes, name="recipes")
app.add_typer(calibration, name="calibration")


@dataclass(frozen=True)
class Shown:
    """What a verb has to say: `document` for --json, else `text`, a string or what prints itself."""

    document: Any
    text: str | Callable[[], None]
    as_json: bool = False
    exit_code: int = 0


Verb = TypeVar("Verb", bound=Callable[..., Any])


def verb(function: Verb) -> Verb:
    """A verb whose body may call libraries: they are quieted, and what they print goes to stderr."""

    @functools.wraps(function)
    def quieted(*args: Any, **kwargs: Any) -> Any:
        quiet_libraries()
        with stdout_for_data():
            return function(*args, **kwargs)

    return quieted  # type: ignore[return-value]


Model = Annotated[str | None, typer.Option("--model", metavar="DIR|FILE.gguf|HUB_ID", help="Overrides the recipe's.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any dotted key, such as method.group_size=64.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to compute.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what quantkit made there before.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Such as 3GB: slower, on disk, but within it.")
]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run a tokenizer's own code from the model's folder.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else.")]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT", help="Folders that quantize wrote, or .gguf.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False) -> None:
    if version:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.command()
@verb
def quantize(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a file.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: artifacts/MODEL-RECIPE.")] = None,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    trust_remote_code: TrustCode = False,
    force: Force = False,
    as_json: Json = False,
) -> Shown:
    """Make one artifact as a recipe says."""
    from quantkit import jobs, words

    manifest = jobs.quantize(
        recipe,
        model=model,
        out=out,
        settings=settings or [],
        device=device,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        force=force,
        progress=Progress(),
    )
    return Shown(manifest.model_dump(mode="json"), words.manifest(manifest), as_json)


@app.command()
@verb
def bench(
    artifacts: Artifacts,
    baseline: Annotated[str, typer.Option("--baseline", metavar="MODEL", help="What they were made from.")],
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="R", help="Recipe or suite with `bench:`.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="RESULTS.json", help="For `quantkit report`.")] = None,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> Shown:
    """Measure artifacts beside their baseline.

    Each runs in a fresh process, by the engine it is for. Without --recipe: everything that needs no network.
    """
    from quantkit import report, verbs

    results = verbs.bench(
        artifacts, baseline=baseline, recipe=recipe, out=out, device=device, force=force, progress=Progress()
    )
    return Shown(results.model_dump(mode="json"), functools.partial(report.show, results), as_json)


@app.command()
@verb
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A shipped name or a file.")],
    model: Model = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: reports/NAME.")] = None,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> Shown:
    """Quantize, bench and report a whole suite."""
    from quantkit import jobs, report

    results = jobs.run(
        suite,
        model=model,
        out=out,
        settings=settings or [],
        device=device,
        max_memory=max_memory,
        force=force,
        progress=Progress(),
    )
    return Shown(results.model_dump(mode="json"), functools.partial(report.show, results), as_json)


@app.command()
@verb
def compare(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help="Its job is every engine's; more: ours.")],
    engines: Annotated[str | None, typer.Option("--engines", metavar="A,B,...", help="Default: all for it.")] = None,
    model: Model = None,
    settings: Settings = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Of each, for medians.")] = 1,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Where the figures go.")] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=1, metavar="S", help="Of one run.")] = 3600,
    device: Device = "auto",
    force: Force = False,
    as_json: Json = False,
) -> Shown:
    """Give one quantization job to quantkit and to other engines.

    Engines: quantkit, gptqmodel, llmcompressor, auto-round, autoawq, auto-gptq, bitsandbytes; each in an environment of
    its own, made when first needed. An engine that cannot do the job is a row with the reason.
    """
    from quantkit import verbs
    from quantkit.reference import table

    results = verbs.compare(
        recipes,
        engines=engines,
        model=model,
        settings=settings or [],
        runs=runs,
        out=out,
        timeout_s=timeout,
        device=device,
        force=force,
        progress=Progress(),
    )
    return Shown(results.model_dump(mode="json"), functools.partial(table.show, results), as_json)


@app.command("report")
@verb
def report_(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.json", help="What bench and run wrote.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the report goes.")],
) -> Shown:
    """Rebuild the table without running anything."""
    from quantkit import report

    paths = [str(path) for path in report.rebuild(results, out)]
    return Shown(paths, "\n".join(paths))


@app.command()
@verb
def inspect(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder or a .gguf, by quantkit or others.")],
    as_json: Json = False,
) -> Shown:
    """Format, bits per weight, tensors, lineage."""
    from quantkit import inspection, words

    facts = inspection.inspect(artifact)
    return Shown(facts, words.inspection(facts), as_json)


@app.command()
@verb
def verify(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder or a .gguf, by quantkit or others.")],
    source: Annotated[str | None, typer.Option("--source", metavar="MODEL", help="What it was made from.")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Make sampled blocks again from --source.")] = False,
    as_json: Json = False,
) -> Shown:
    """Check every byte, tensor and side file, and what it was made from.

    Exit code 6 when something is wrong; what could not be checked is said.
    """
    from quantkit.verification import verify as check

    report = check(artifact, source=source, deep=deep)
    return Shown(report.document(), report.text(), as_json, report.exit_code)


@app.command()
@verb
def doctor(as_json: Json = False) -> Shown:
    """Versions, devices, engines, what is missing."""
    from quantkit import words
    from quantkit.doctor import examine

    facts = examine()
    return Shown(facts, words.doctor(facts), as_json)


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


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: the only place where errors become messages."""
    from quantkit.outcome import INTERRUPTED, report_failure, show

    try:
        result = app(args=list(arguments), prog_name="quantkit", standalone_mode=False)
        if isinstance(result, Shown):
            show(result.document, result.text, as_json=result.as_json)
            return result.exit_code
        code = result if isinstance(result, int) else 0
        return report_failure(KeyboardInterrupt(), as_json="--json" in arguments) if code == INTERRUPTED else code
    except BaseException as error:
        return report_failure(error, as_json="--json" in arguments)


def main() -> None:
    """The entry point of the `quantkit` command."""
    sys.exit(execute(sys.argv[1:]))
