"""The rows of a comparison before they have run: for each engine its command, its job and what the row is called."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit import __version__
from quantkit.errors import RecipeError
from quantkit.progress import Progress
from quantkit.quiet import variables_as_given
from quantkit.recipe import Recipe
from quantkit.reference.engines import OWN, ReferenceEngine, Request
from quantkit.reference.environments import EnvironmentFailed, python_of
from quantkit.reference.results import Cost

if TYPE_CHECKING:
    import torch

    from quantkit.model.source import Source

FOREIGN_VARIABLES = ("PYTHONPATH", "PYTHONHOME")
"""What this process imports from must not be seen in another environment."""


@dataclass(frozen=True)
class Setting:
    """What all rows share.

    recipe: the first one. ids_file: JSON with the calibration's token ids, None when no method needs them. dtype: what
    other engines compute in, the fastest on this device.
    """

    source: Source
    recipe: Recipe
    ids_file: Path | None
    device: torch.device
    threads: int
    dtype: str


@dataclass
class Entry:
    """One row in the making. command, job and environment: of its process. reason: why it did not run, or not well."""

    engine: str
    label: str
    settings: dict[str, Any]
    command: list[str] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    reason: str | None = None
    runs: list[Cost] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)


def request_of(name: str, recipe: Recipe) -> Request:
    """What a recipe asks of an engine. Raises RecipeError for what other engines are not given to do."""
    method = recipe.method
    problems = []
    if method.name == "ggml":
        problems.append(f"{name}: method.name: no other engine here does ggml; expected gptq, awq, rtn, int8 or nf4")
    if recipe.overrides:
        problems.append(f"{name}: overrides: other engines are given one method for all linears")
    if recipe.skip != ("lm_head",):
        problems.append(f"{name}: skip: {list(recipe.skip)}, expected the default: other engines skip the head alone")
    if problems:
        raise RecipeError.from_problems(problems)
    grid = getattr(method, "grid", None)
    if grid is None:
        return Request(method.name, None, None, getattr(method, "block_size", None))
    return Request(method.name, grid.bits, grid.symmetric, grid.group_size)


def own_entry(setting: Setting, recipe: Recipe, stem: str, limit_bytes: int | None = None) -> Entry:
    """quantkit's own run of a recipe, on the comparison's token ids; all else in it is its own. limit_bytes: of the
    memory that it may take."""
    if setting.ids_file is not None:
        calibration = recipe.calibration.model_copy(update={"set": str(setting.ids_file)})
        recipe = recipe.model_copy(update={"calibration": calibration})
    propagate = getattr(recipe.method, "propagate", None)
    inputs = f", {propagate} inputs" if propagate else ""
    under = f", --max-memory {limit_bytes / 1e6:.0f}MB" if limit_bytes is not None else ""
    searches = [path or os.getcwd() for path in sys.path]
    return Entry(
        engine=OWN,
        label=f"{OWN} {__version__}, {stem}: {recipe.method.label()}{inputs}{under}",
        settings=recipe.method.model_dump(mode="json") | ({"max_memory_bytes": limit_bytes} if under else {}),
        # -P: a folder named like a package where the user stands must not be imported in its stead
        command=[sys.executable, "-P", "-m", "quantkit.reference.own"],
        job={
            "recipe": recipe.model_dump(mode="json"),
            "model": str(setting.source.path.absolute()),
            "device": setting.device.type,
            "threads": setting.threads,
            "max_memory_bytes": limit_bytes,
        },
        environment=_variables(setting) | {"PYTHONPATH": os.pathsep.join(searches)},
    )


def reference_entry(setting: Setting, engine: ReferenceEngine, request: Request, progress: Progress) -> Entry:
    """Another engine's run; its environment is made if need be. Without one the entry carries the reason."""
    method: Any = setting.recipe.method
    note = engine.note(request.method)
    dtype = setting.recipe.model.dtype if engine.pins is None else engine.dtypes.get(request.method, setting.dtype)
    settings = {
        "method": request.method,
        "bits": request.bits,
        "group_size": request.group_size,
        "symmetric": request.symmetric,
        "act_order": getattr(method, "act_order", None),
        "double_quant": getattr(method, "double_quant", None),
        "dtype": dtype,
        "storage_dtype": setting.recipe.model.dtype,
    }
    chosen = [word for key, word in (("act_order", "act-order"), ("double_quant", "double-quant")) if settings[key]]
    how = ", ".join(part for part in (" ".join([str(request), *chosen]), note, dtype) if part)
    entry = Entry(engine.name, f"{engine.name} {engine.version}: {how}", settings)
    entry.reason = engine.refuses(request, gpu=setting.device.type == "cuda")
    if entry.reason is not None:
        return entry
    try:
        python = python_of(engine, progress)
    except EnvironmentFailed as error:
        entry.reason = f"no environment: {error}"
        return entry
    entry.command = [str(python), "-P", str(engine.worker)]
    entry.job = {
        **settings,
        **engine.options,
        "engine": engine.name,
        "model": str(setting.source.path.absolute()),
        "ids": None if setting.ids_file is None else str(setting.ids_file),
        "threads": setting.threads,
        "versions": [engine.name, "torch", "transformers"],
    }
    variables = _variables(setting)
    entry.environment = {name: value for name, value in variables.items() if name not in FOREIGN_VARIABLES}
    return entry


def _variables(setting: Setting) -> dict[str, str]:
    """Of every job's process: the same number of threads, and no hub, because all that is needed is here. What quantkit
    sets for itself, such as how long threads spin, its own process sets again; the others keep their defaults."""
    given = {"OMP_NUM_THREADS": str(setting.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if setting.device.type == "cpu":
        given["CUDA_VISIBLE_DEVICES"] = ""
    return {**variables_as_given(), **given}
