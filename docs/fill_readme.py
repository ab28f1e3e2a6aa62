"""Fills what README.md and docs/ take from the program itself, so that neither can fall behind.

    python docs/fill_readme.py            writes
    python docs/fill_readme.py --check    writes nothing, exits with 1 when something is out of date

Between `<!-- NAME -->` and `<!-- /NAME -->` in README.md stand: demo-table, from reports/demo/report.md where that
exists, and recipe-reference, from the JSON schema; the latter in docs/recipes.md too, with recipe-list, the recipes
that ship. docs/commands.md is the help page of every command.
docs/engines.md takes engine-rules from quantkit/planning/rules.yaml.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO_SECTIONS = (
    "Summary",
    "Notes",
    "The rule of thumb beside the measurement",
    "Where measurement and folklore part (!)",
    "Where the measurement cannot tell (?)",
)
COMMANDS = (
    "",
    "plan",
    "quantize",
    "bench",
    "run",
    "compare",
    "report",
    "advise",
    "gate",
    "diff",
    "card",
    "push",
    "recipes",
    "recipes list",
    "recipes show",
    "recipes validate",
    "recipes schema",
    "calibration",
    "calibration list",
    "calibration show",
    "calibration build",
    "inspect",
    "export",
    "verify",
    "doctor",
)
SHORT_NAMES = {
    "ModelSection": "model",
    "CalibrationSection": "calibration",
    "TargetSection": "target",
    "Recipe": "recipe",
    "Suite": "suite",
    "GateSection": "gates",
}


def demo_table(report: str) -> str:
    """The parts of a report that a reader of the README wants, one heading level down."""
    head, *sections = re.split(r"^## ", report, flags=re.MULTILINE)
    kept = [head.split("\n", 1)[1].strip()]
    for section in sections:
        title, body = section.split("\n", 1)
        if title in DEMO_SECTIONS:
            heading = [] if title == "Summary" else [f"### {title}"]
            kept += [*heading, body.strip()]
    return "\n\n".join([*kept, "All of it: [reports/demo/report.md](reports/demo/report.md)."])


def recipe_reference(schema: dict[str, Any]) -> str:
    """A table of keys for each section of the JSON schema."""
    sections = schema["$defs"]
    titles = [(name, _title(name, section)) for name, section in sections.items()]
    parts = []
    for name, title in sorted(titles, key=lambda pair: (_rank(pair[1]), pair[1])):
        section = sections[name]
        parts.append(f"#### {title}")
        if "description" in section:
            parts.append(" ".join(section["description"].split("\n\n")[0].split()))
        required = section.get("required", [])
        keys = {key: value for key, value in section["properties"].items() if not (key == "name" and "const" in value)}
        if not keys:
            parts.append("No settings.")
            continue
        rows = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key, value in keys.items():
            default = "required" if key in required else _default(value)
            meaning = " ".join(value.get("description", "").split())
            rows.append("| " + " | ".join(map(_cell, (f"`{key}`", _type(value, sections), default, meaning))) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def recipe_list() -> str:
    """A table of the recipes and suites that ship."""
    from quantkit.shipped import list_recipes
    from quantkit.words import first_sentence

    rows = ["| name | kind | what |", "| --- | --- | --- |"]
    rows += [f"| `{r.name}` | {r.kind} | {_cell(first_sentence(r.description))} |" for r in list_recipes()]
    return "\n".join(rows)


def _rank(title: str) -> int:
    first = re.split("[`:]", title)[1]
    order = ("recipe", "suite", "recipes", "model", "method", "format", "calibration", "target", "bench", "gates")
    return order.index(first)


def _title(name: str, section: dict[str, Any]) -> str:
    """What the section is called in a file: its key, and its name where several sections go by one key."""
    if name in SHORT_NAMES:
        return f"`{SHORT_NAMES[name]}`"
    if name == "SuiteEntry":
        return "`recipes` of a suite"
    from quantkit.formats import FORMATS

    own = section["properties"]["name"]["const"]
    kind = "bench" if name.endswith("Bench") else "format" if own in FORMATS else "method"
    return f"`{kind}: {{name: {own}}}`"


def _type(value: dict[str, Any], sections: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return "entries, see below" if name == "SuiteEntry" else _title(name, sections[name]).strip("`")
    if "const" in value:
        return str(value["const"])
    if "enum" in value:
        return ", ".join(map(str, value["enum"]))
    choices = value.get("oneOf") or value.get("anyOf")
    if choices:
        kinds = list(dict.fromkeys(_type(choice, sections) for choice in choices))
        if all(": {name: " in kind for kind in kinds if kind != "null"):
            kinds = ["a section, see below", *(["null"] if "null" in kinds else [])]
        return ", ".join(kinds)
    if value.get("type") == "array":
        return f"list: {_type(value.get('items', {}), sections)}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[key]}" for key, sign in bounds.items() if key in value]
    names = {"object": "mapping", "string": "text", "boolean": "true, false"}
    kind = value.get("type", "anything")
    return " ".join([names.get(kind, kind), *limits])


def _default(value: dict[str, Any]) -> str:
    if "default" not in value:
        return "{}" if value.get("type") == "object" else "none"
    default = value["default"]
    if isinstance(default, dict):
        return "see below" if default else "{}"
    if isinstance(default, list):
        return f"[{', '.join(map(str, default))}]"
    return str(default) if isinstance(default, str | float) else json.dumps(default)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def plan_table(results: dict[str, Any]) -> str:
    """What was planned beside what was found, and how long a plan from the hub takes."""
    lines = [
        "| model | recipe | tensors, bytes | found | file, bytes | found | peak MB | found | off | s | found | off |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        planned, found, ratio = row["planned"], row["found"], row["ratio"]
        cells = [row["model"], row["recipe"]]
        cells += [str(side[key]) for key in ("tensor_bytes", "weight_file_bytes") for side in (planned, found)]
        cells += [f"{side['peak_rss_bytes'] / 1e6:.0f}" for side in (planned, found)]
        cells += [f"{ratio['peak_rss_bytes'] - 1:+.0%}"]
        cells += [f"{side['seconds']:.1f}" for side in (planned, found)] + [f"{ratio['seconds'] - 1:+.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    hub = results["hub"]
    told = (
        f"A plan for {hub['weight_bytes'] / 1e9:.0f} GB of weights on a hub on the loopback: "
        f"{', '.join(map(str, hub['seconds']))} s for the whole command, {hub['sent_bytes'] / 1e3:.0f} kB sent."
    )
    return "\n".join([*lines, "", told])


def engine_rules() -> str:
    """What each engine reads, and its rules, a table each."""
    from quantkit.planning.rules import engines

    parts = []
    for engine in engines():
        parts.append(f"### {engine.title}")
        if engine.otherwise is not None:
            parts.append(f"Refuses every format: {engine.otherwise.why}. Source: {engine.otherwise.source}.")
            continue
        reads = [f"- `{name}`: {source}" for name, source in engine.formats.items()]
        parts.append("Reads\n\n" + "\n".join(reads))
        rows = ["| when | verdict | why | source |", "| --- | --- | --- | --- |"]
        for rule in engine.rules:
            when = "; ".join(
                f"{key} {_condition(value)}" for key, value in rule.when.model_dump(exclude_none=True).items()
            )
            verdict = {"slowly": "takes it slowly", "refuses": "refuses it"}[rule.verdict]
            rows.append("| " + " | ".join(map(_cell, (when, verdict, rule.why, rule.source))) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _condition(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join("row" if item is None else str(item) for item in value)
    return str(value).lower()


def help_pages() -> str:
    """docs/commands.md: every help page as it is printed on 100 columns."""
    parts = ["# Commands", "What `--help` prints. `make readme` writes this page."]
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    for command in COMMANDS:
        words = ["-m", "quantkit", *command.split(), "--help"]
        page = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        text = "\n".join(line.rstrip() for line in page.stdout.strip().splitlines())
        parts.append(f"## `{' '.join(['quantkit', *command.split()])}`\n\n```\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def put(text: str, name: str, content: str) -> str:
    """The text with what stands between a pair of marks replaced."""
    found = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    assert found.search(text), f"no <!-- {name} --> ... <!-- /{name} -->"
    return found.sub(lambda match: f"{match[1]}{content}\n{match[2]}", text)


def wanted(*, demo: bool) -> dict[Path, str]:
    """Every file that this script writes, with what it should hold.

    demo: take the demo's table from the report that lies here; a new run of the demo does not make the documents stale.
    """
    from quantkit.recipe import json_schema

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = put(readme, "recipe-reference", recipe_reference(json_schema()))
    report = ROOT / "reports" / "demo" / "report.md"
    if demo and report.is_file():
        readme = put(readme, "demo-table", demo_table(report.read_text(encoding="utf-8")))
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    recipes = put(recipes, "recipe-list", recipe_list())
    recipes = put(recipes, "recipe-reference", recipe_reference(json_schema()))
    plans, results = ROOT / "docs" / "plan.md", ROOT / "benchmarks" / "results" / "plan.json"
    checked = plans.read_text(encoding="utf-8")
    if results.is_file():
        checked = put(checked, "plan-table", plan_table(json.loads(results.read_text(encoding="utf-8"))))
    engines = ROOT / "docs" / "engines.md"
    listed = put(engines.read_text(encoding="utf-8"), "engine-rules", engine_rules())
    return {
        ROOT / "README.md": readme,
        ROOT / "docs" / "recipes.md": recipes,
        engines: listed,
        plans: checked,
        ROOT / "docs" / "commands.md": help_pages(),
    }


def main() -> int:
    stale = []
    for path, content in wanted(demo="--check" not in sys.argv[1:]).items():
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            stale.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv[1:]:
                path.write_text(content, encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        print(f"written: {', '.join(stale) or 'nothing, all of it is up to date'}")
        return 0
    if stale:
        print(f"out of date: {', '.join(stale)}\nhint: make readme", file=sys.stderr)
    return bool(stale)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
