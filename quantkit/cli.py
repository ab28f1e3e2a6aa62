"""The command line: parse, call one function, print. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from quantkit import __version__
from quantkit.cli_groups import calibration, recipes
from quantkit.cli_verb import (
    Artifacts,
    Device,
    Force,
    Json,
    MaxMemory,
    Model,
    Restart,
    Settings,
    Shown,
    TrustCode,
    out_folder,
    verb,
)
from quantkit.progress import Progress
from quantkit.quiet import collecting_later

EXIT_CODES = (
    "Exit codes: 0 done, 2 usage or recipe, 3 model or data, 4 a missing engine or dependency, 5 a gate failed, "
    "6 verification failed, 130 interrupted; 1 is a bug in quantkit."
)

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
app.add_typer(recipes, name="recipes")
app.add_typer(calibration, name="calibration")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False) -> None:
    if version:
        print(f"quantkit {__version__}")
        raise typer.Exit


@app.command()
@verb
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a file.")],
    model: Model = None,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    probe_again: Annotated[bool, typer.Option("--probe-again", help="Measure this machine's speed anew.")] = False,
    as_json: Json = False,
) -> Shown:
    """What a run will cost, and which engines will take the result.

    Reads the config and the headers of the shards only, of a hub id by ranged requests. Exit code 2 when quantize would
    refuse. An engine to hold it against: --set target.engine=vllm --set target.tensor_parallel=2.
    """
    with collecting_later():
        from quantkit.planning.run import plan as make_plan
        from quantkit.planning.text import text

    document = make_plan(
        recipe,
        model=model,
        settings=settings or [],
        device=device,
        max_memory=max_memory,
        probe_again=probe_again,
    )
    return Shown(document.model_dump(mode="json"), text(document), as_json, code=0 if document.fits else 2)


@app.command()
@verb
def quantize(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped name or a file.")],
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", parser=out_folder, help="Default: artifacts/MODEL-RECIPE."),
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    trust_remote_code: TrustCode = False,
    force: Force = False,
    restart: Restart = False,
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
        restart=restart,
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
    return Shown(results.model_dump(mode="json"), partial(report.show, results), as_json)


@app.command()
@verb
def run(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A shipped name or a file.")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", parser=out_folder, help="Default: reports/NAME.")
    ] = None,
    settings: Settings = None,
    device: Device = "auto",
    max_memory: MaxMemory = None,
    force: Force = False,
    restart: Restart = False,
    as_json: Json = False,
) -> Shown:
    """Quantize, bench and report a whole suite."""
    from quantkit import jobs, report
    from quantkit.gates.judge import failure

    results = jobs.run(
        suite,
        model=model,
        out=out,
        settings=settings or [],
        device=device,
        max_memory=max_memory,
        force=force,
        restart=restart,
        progress=Progress(),
    )
    shown = partial(report.show, results)
    return Shown(results.model_dump(mode="json"), shown, as_json, failure(results.gates))


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
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="SIZE", help="Ours once more, under it, such as 3GB.")
    ] = None,
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
        max_memory=max_memory,
        device=device,
        force=force,
        progress=Progress(),
    )
    return Shown(results.model_dump(mode="json"), partial(table.show, results), as_json)


@app.command("report")
@verb
def report_(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RESULTS.json...", help="What bench and run wrote.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Markdown, HTML, JSON, plots; default: this terminal.")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", min=0, metavar="N", help="Of the machine: tokens get a cost.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema of the report, and nothing else.")] = False,
    as_json: Json = False,
) -> Shown:
    """Rebuild the table without running anything."""
    from quantkit.report import verb as reporting

    if schema:
        return Shown(reporting.schema(), "", as_json=True)
    document, text = reporting.report(results or [], out=out, price_per_hour=price)
    return Shown(document, text, as_json)


@app.command()
@verb
def advise(
    memory: Annotated[str, typer.Option("--memory", metavar="SIZE", help="What there is, such as 6GB.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="DIR|FILE.gguf|HUB_ID", help="To count bytes.")
    ] = None,
    engine: Annotated[str | None, typer.Option("--engine", metavar="NAME", help="Such as llama.cpp or vllm.")] = None,
    problem: Annotated[
        Literal["first-token", "per-token", "memory", "throughput"] | None,
        typer.Option("--problem", help="What is wrong today; default: an answer to each."),
    ] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens of the KV cache; 4096.")] = None,
    results: Annotated[Path | None, typer.Option("--results", metavar="DIR", help="With results.json files.")] = None,
    as_json: Json = False,
) -> Shown:
    """Which recipe for a machine and a complaint, with reasons."""
    from quantkit.advise import answers, text

    advice = answers.advise(memory, model=model, engine=engine, problem=problem, context=context, results=results)
    return Shown(advice.model_dump(mode="json"), text.text(advice), as_json)


@app.command()
@verb
def gate(
    results: Annotated[Path, typer.Argument(metavar="RESULTS.json", help="What bench or run wrote.")],
    min_recovery: Annotated[float | None, typer.Option(metavar="SHARE", help="Of the baseline's accuracy.")] = None,
    max_kl: Annotated[float | None, typer.Option(metavar="NATS", help="To the baseline, a token.")] = None,
    max_bytes: Annotated[str | None, typer.Option(metavar="SIZE", help="Of the weights, such as 90MB.")] = None,
    min_speedup: Annotated[float | None, typer.Option(metavar="RATIO", help="Decode, to the baseline's.")] = None,
    row: Annotated[str | None, typer.Option(metavar="NAME", help="Of one row; default: every row.")] = None,
    junit: Annotated[Path | None, typer.Option(metavar="FILE.xml", help="JUnit XML, for a CI system.")] = None,
    github_summary: Annotated[bool, typer.Option("--github-summary", help="Into the summary of the step.")] = False,
    as_json: Json = False,
) -> Shown:
    """Hold results against bars: exit 5 when one is missed for certain.

    A bar fails when the whole interval of the measurement is beyond it, or when nothing was measured; it warns when the
    interval holds the bar. Without a bar: what the gates of the suite said when it ran.
    """
    from quantkit.gates import judge, outputs, run

    bars = {"min_recovery": min_recovery, "max_kl": max_kl, "max_bytes": max_bytes, "min_speedup": min_speedup}
    outcomes = run.gate(results, {"row": row, **bars}, junit=junit, github_summary=github_summary)
    for line in judge.warnings(outcomes):
        Progress().say(line)
    shown = partial(outputs.show, results.name, outcomes)
    document = [outcome.model_dump(mode="json") for outcome in outcomes]
    return Shown(document, shown, as_json, judge.failure(outcomes))


@app.command()
@verb
def diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE.json", help="Results of the last release.")],
    after: Annotated[Path, typer.Argument(metavar="AFTER.json", help="Results of this one.")],
    fail_on_worse: Annotated[bool, typer.Option("--fail-on-worse", help="Exit 5 when a figure is worse.")] = False,
    as_json: Json = False,
) -> Shown:
    """What got better or worse between two runs, as far as their intervals tell."""
    from quantkit import report
    from quantkit.report import difference

    found = difference.compare_runs(report.load(before), report.load(after))
    failure = difference.worse(found) if fail_on_worse else None
    return Shown(found.model_dump(mode="json"), partial(difference.show, found), as_json, failure)


@app.command()
@verb
def card(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that quantize wrote.")],
    results: Annotated[Path | None, typer.Option(metavar="RESULTS.json", help="Its row goes into the card.")] = None,
    row: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the row of the folder's name.")] = None,
) -> Shown:
    """Put results into an artifact's model card, or take an edited card into the manifest."""
    from quantkit import report
    from quantkit.card import fill_card

    return Shown(None, str(fill_card(artifact, None if results is None else report.load(results), row)))


@app.command()
@verb
def push(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder that quantize wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The model's id on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="When the repository is made.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Made when there is none.")] = None,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="Of the commit.")] = None,
    as_json: Json = False,
) -> Shown:
    """Verify an artifact and upload it to a hub, in one commit.

    The token is that of HF_TOKEN or of `hf auth login`.
    """
    from dataclasses import asdict

    from quantkit.push import push as upload

    done = upload(artifact, repo_id, private=private, revision=revision, message=message, progress=Progress())
    return Shown(asdict(done), f"{done.url}\ncommit {done.commit}", as_json)


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
def export(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A folder by quantkit or others.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="In a folder of its own; the manifest lies beside.")],
    exact: Annotated[
        bool, typer.Option("--exact/--no-exact", help="No: scales and minima rounded to float16; codes stay.")
    ] = True,
    force: Force = False,
    as_json: Json = False,
) -> Shown:
    """Make a GGUF file of an artifact, its codes as they are.

    For GPTQ, AWQ, round-to-nearest and compressed-tensors: nothing is rounded a second time, and what no GGUF type
    holds is refused. Weights and logits are compared.
    """
    from quantkit import words
    from quantkit.export import export as make

    manifest = make(artifact, out, exact=exact, force=force, progress=Progress())
    return Shown(manifest.model_dump(mode="json"), words.exported(manifest), as_json)


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
    return Shown(report.document(), report.text(), as_json, code=report.exit_code)


@app.command()
@verb
def doctor(as_json: Json = False) -> Shown:
    """Versions, devices, engines, what is missing."""
    from quantkit import words
    from quantkit.doctor import examine

    facts = examine()
    return Shown(facts, words.doctor(facts), as_json)


def execute(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code: the only place where errors become messages."""
    from quantkit.outcome import INTERRUPTED, report_failure, show

    try:
        result = app(args=list(arguments), prog_name="quantkit", standalone_mode=False)
        if isinstance(result, Shown):
            show(result.document, result.text, as_json=result.as_json)
            if result.failure is not None:
                return report_failure(result.failure, as_json=False)
            return result.code
        code = result if isinstance(result, int) else 0
        return report_failure(KeyboardInterrupt(), as_json="--json" in arguments) if code == INTERRUPTED else code
    except BaseException as error:
        return report_failure(error, as_json="--json" in arguments)


def main() -> None:
    """The entry point of the `quantkit` command."""
    from quantkit.interrupts import end, obey_signals

    obey_signals(as_json="--json" in sys.argv)
    end(execute(sys.argv[1:]))
