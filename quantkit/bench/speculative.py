"""Speculative decoding: the artifact drafts for its baseline, measured through transformers' assisted generation.

The baseline's own greedy answer comes out either way. How many of the drafted tokens it accepts, and whether drafting
pays, is what is measured. Source: Leviathan et al. 2023, Fast Inference from Transformers via Speculative Decoding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantkit.bench.divergence import ids_path
from quantkit.bench.measurement import Measurement
from quantkit.bench.run import Run
from quantkit.bench.statistics import standard_error
from quantkit.sections import SpeculativeBench

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure(section: SpeculativeBench, run: Run) -> list[Measurement]:
    """acceptance: accepted tokens of those drafted; draft_speedup: time of the baseline alone over time with the draft.

    Both are means over prompts with their standard errors. Nothing for the baseline itself. A file that no engine with
    a transformers model runs drafts by its decoded weights, labelled: its acceptance is that of the artifact, its speed
    is not.
    """
    if run.is_baseline:
        return []
    ids = torch.from_numpy(np.load(ids_path(run.scratch, section)))  # [prompts, prompt_tokens]
    with run.beside_baseline() as (target, session):
        draft = session.model
        assert draft is not None
        _drafts_always(draft, section.draft_tokens)
        settings = {
            **section.model_dump(mode="json", exclude={"name"}),
            "threads": torch.get_num_threads(),
            "dtype": session.dtype,
            **session.details,
        }
        shares, ratios = [], []
        _generate(target, ids[:1], section, draft)  # once to warm up
        for prompt in ids.split(1):
            alone = _seconds(target, prompt, section, None)
            together = _seconds(target, prompt, section, draft)
            with _counted(target) as rounds, _counted(draft) as drafted:
                made = _generate(target, prompt, section, draft)
            shares.append((made - rounds[0]) / drafted[0])
            ratios.append(alone / together)
        engine = session.engine
    return [
        _mean("acceptance", "fraction", shares, engine, settings),
        _mean("draft_speedup", "x", ratios, engine, settings),
    ]


def _mean(metric: str, unit: str, values: list[float], engine: str, settings: dict[str, Any]) -> Measurement:
    return Measurement(
        metric=metric,
        value=statistics.fmean(values),
        unit=unit,
        error=standard_error(values),
        samples=len(values),
        engine=engine,
        settings=settings,
    )


def _seconds(
    target: PreTrainedModel, prompt: Tensor, section: SpeculativeBench, draft: PreTrainedModel | None
) -> float:
    """The median over repetitions."""
    found = []
    for _ in range(section.repetitions):
        started = time.perf_counter()
        _generate(target, prompt, section, draft)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def _generate(target: PreTrainedModel, prompt: Tensor, section: SpeculativeBench, draft: PreTrainedModel | None) -> int:
    """How many tokens were made: always all that were asked for, since nothing ends them early."""
    ids = prompt.to(target.device)
    with torch.inference_mode():
        made = target.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=draft,
            do_sample=False,
            max_new_tokens=section.decode_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return int(made.shape[1] - ids.shape[1])


def _drafts_always(draft: PreTrainedModel, tokens: int) -> None:
    """Have every round draft the same number of tokens, however sure the draft is."""
    config = draft.generation_config
    assert config is not None
    config.num_assistant_tokens = tokens
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    config.eos_token_id = None


@contextmanager
def _counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """How often a model is called meanwhile: a target once a round, a draft once a token."""
    count = [0]

    def called(*_: Any) -> None:
        count[0] += 1

    handle = model.register_forward_pre_hook(called)
    try:
        yield count
    finally:
        handle.remove()
