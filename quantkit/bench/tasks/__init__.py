"""Tasks for lm-eval that ship with quantkit, and where lm-eval keeps its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import UsageError
from quantkit.validation import suggestion

FOLDER = Path(__file__).parent
OWN = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
"""Name and definition of every task that ships; its rows lie beside it as .jsonl."""


def check_tasks(tasks: Sequence[str], data: Mapping[str, str]) -> None:
    """Refuse names that lm-eval does not know and files that are not there, before anything runs. Raises UsageError."""
    problems = []
    for name in tasks:
        if name not in OWN and definition(name) is None:
            problems.append(_unknown(name))
    for name, file in data.items():
        if name not in tasks:
            problems.append(f"data.{name}: is not among the tasks {', '.join(tasks)}")
        if not Path(file).expanduser().is_file():
            problems.append(f"data.{name}: {file}: no such file")
    problems = [problem for problem in problems if problem]
    if problems:
        raise UsageError("\n".join(f"bench: accuracy: {problem}" for problem in problems))


def _unknown(name: str) -> str:
    """Why a name is refused; empty for a group or tag of lm-eval, which no file is named after."""
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks  # reads every definition, which takes a while: only for names not found otherwise
    return "" if name in known else f'tasks: "{name}" is not a task of lm-eval or quantkit; {_near(name, known)}'


def _near(name: str, known: Sequence[str]) -> str:
    text = suggestion(name, [*known, *OWN])
    return text if text.startswith("did you mean") else "`lm-eval ls tasks` has them all"


def definition(name: str) -> Path | None:
    """The file of lm-eval that defines a task, None when none is named after it."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "a dependency of quantkit"
    for path in sorted((Path(spec.origin).parent / "tasks").rglob(f"{name}.yaml")):
        if task_config(path).get("task") == name:
            return path
    return None


def task_config(path: Path) -> dict[str, Any]:
    """What a definition says with the files it includes; functions stay names."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(path, resolve_func=False)
