"""Accuracy: lm-eval's stock tasks by name, their rows from the hub or a local file, and quantkit's own small task."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.bench.tasks import OWN, definition, task_config
from quantkit.errors import UsageError
from quantkit.sections import AccuracyBench

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from quantkit.engines import Session

PREFERRED = ("acc", "exact_match", "acc_norm")
"""The metric of a task that is reported: the first of these that it has, else the first for which higher is better."""


def measure(section: AccuracyBench, run: Run) -> list[Measurement]:
    """accuracy/TASK for every task, with lm-eval's standard error; the score of each question goes to `run.samples`.

    A task whose rows cannot be had is missing, with the reason. Raises UsageError when a redirected task draws examples
    from a split that the file does not have.
    """
    found: list[Measurement] = []
    tasks: dict[str, Task] = {}
    for name in section.tasks:
        try:
            tasks |= load_tasks(name, section.data.get(name), run.scratch / "tasks")
        except UsageError:
            raise
        except Exception as error:  # hub, datasets and lm-eval raise what they like for data that cannot be had
            local = f"the rows of {section.data[name]} do not fit it" if name in section.data else None
            found.append(_missing(name, error, local or f"no rows (data: {{{name}: FILE}} takes local ones)"))
    if not tasks:
        return found
    session = run.quality()
    for name in [name for name, task in tasks.items() if session.model is None and draws(task)]:
        reason = f"{session.engine} decodes greedily here, and the task draws its answers at random"
        found.append(Measurement(metric=f"accuracy/{name}", value=None, unit="fraction", missing=reason))
        del tasks[name]
    if not tasks:
        return found
    try:
        results = evaluate(list(tasks.values()), session, run, section)
    except Exception as error:  # a row without a field of the prompt, a context that is too long: anything
        return [*found, *(_missing(name, error, "lm-eval failed") for name in tasks)]
    for name, task in tasks.items():
        metric, filter_name = _reported(task, results["results"][name])
        scores = results["results"][name]
        spread = scores.get(f"{metric}_stderr,{filter_name}")
        answers = [answer for answer in results["samples"][name] if answer.get("filter", "none") == filter_name]
        answers.sort(key=lambda answer: answer["doc_id"])
        values = [float(answer[metric]) for answer in answers if isinstance(answer.get(metric), int | float)]
        if len(values) == len(answers):
            run.samples[name] = values
        found.append(
            Measurement(
                metric=f"accuracy/{name}",
                value=float(scores[f"{metric},{filter_name}"]),
                unit="fraction",
                error=float(spread) if isinstance(spread, int | float) and math.isfinite(spread) else None,
                samples=len(answers),
                engine=session.engine,
                settings={
                    "metric": metric,
                    "limit": section.limit,
                    "num_fewshot": results["n-shot"].get(name, 0),
                    "data": Path(section.data[name]).name if name in section.data else None,
                    "task_version": results["versions"].get(name),
                    "lm_eval": version("lm-eval"),
                    "dtype": session.dtype,
                    **session.details,
                },
            )
        )
    return found


def load_tasks(name: str, data: str | None, scratch: Path) -> dict[str, Task]:
    """The tasks that a name stands for (several for a group), their rows loaded.

    data: a json or jsonl file with rows in the fields of the stock data set; prompt, scoring and metrics stay those of
    the stock task. scratch: where definitions that point to it, and what `datasets` makes of it, are written.
    """
    from lm_eval.tasks import TaskManager

    stock = OWN.get(name) or definition(name)
    if data is not None or name in OWN:
        if stock is None:
            raise UsageError(f"bench: accuracy: data.{name}: is a group; give a file for each of its tasks")
        rows = Path(data).expanduser().absolute() if data is not None else stock.with_suffix(".jsonl")
        redirect(name, stock, rows, scratch)
        folders: list[str | Path] = [scratch]
    else:
        folders = [] if stock is None else [stock.parent]
    # every definition of lm-eval is read otherwise, which takes longer than many a task
    manager = TaskManager(include_path=folders, include_defaults=not folders)
    return dict(manager.load([name])["tasks"])


def redirect(name: str, stock: Path, rows: Path, folder: Path) -> Path:
    """Write a definition that is the stock one with its rows from a local file.

    Raises UsageError when the task draws examples from a split of its own.
    """
    config = task_config(stock)
    split = config.get("test_split") or config.get("validation_split")
    shots, source = config.get("num_fewshot") or 0, config.get("fewshot_split") or config.get("training_split")
    if shots and source != split:
        raise UsageError(
            f"bench: accuracy: data.{name}: the task shows {shots} examples of its split {source}; a file has one split"
        )
    changed = {
        "include": str(stock),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(rows)}, "cache_dir": str(folder / "datasets")},
        "training_split": None,
        "validation_split": None if config.get("test_split") else split,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(changed, sort_keys=False))
    return path


def evaluate(tasks: Sequence[Task], session: Session, run: Run, section: AccuracyBench) -> dict[str, Any]:
    """What lm-eval's simple_evaluate answers for loaded tasks, with a record of each question.

    A transformers model is given to lm-eval's own class for it, which puts several questions into a pass; any other
    session answers from its logits. The tokenizer is the source's in both cases.
    """
    from lm_eval.evaluator import simple_evaluate

    from quantkit.model.sequences import load_tokenizer

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tokenizer = load_tokenizer(run.tokenizer_folder)
    if session.model is not None:
        from lm_eval.models.huggingface import HFLM

        lm: Any = HFLM(
            pretrained=session.model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=section.batch_size,
            device=str(session.model.device),
        )
    else:
        from quantkit.bench.session_lm import SessionLM

        lm = SessionLM(session, tokenizer, run.subject.source.config)
    results: dict[str, Any] = simple_evaluate(model=lm, tasks=list(tasks), limit=section.limit, log_samples=True)
    return results


def draws(task: Task) -> bool:
    """Whether a task asks for answers drawn at random."""
    settings = task.dump_config().get("generation_kwargs") or {}
    return bool(settings.get("do_sample") or float(settings.get("temperature") or 0) > 0)


def _reported(task: Task, scores: Mapping[str, Any]) -> tuple[str, str]:
    """Metric and filter of the number that stands for a task."""
    keys = [tuple(key.split(",", 1)) for key in scores if "," in key and not key.split(",")[0].endswith("_stderr")]
    for wanted in (*PREFERRED, *(name for name, better in task.higher_is_better().items() if better)):
        for metric, filter_name in keys:
            if metric == wanted:
                return metric, filter_name
    metric, filter_name = keys[0]
    return metric, filter_name


def _missing(name: str, error: Exception, what: str) -> Measurement:
    text = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
    return Measurement(metric=f"accuracy/{name}", value=None, unit="fraction", missing=f"{what}: {reason}")
