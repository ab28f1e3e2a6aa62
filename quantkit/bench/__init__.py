"""The registry of metrics: to add one, write its file and put its function beside the section of recipes it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.bench.measurement import Measurement

Metric = Callable[..., "list[Measurement]"]

METRICS = ("throughput", "memory", "divergence", "accuracy", "speculative")
"""Every metric by its name in recipes, which is also its file, in the order they run.

Speed first, in a process that has done nothing else; then memory, whose peak is that of loading and running; then
quality, which may need the weights in another dtype; at last what needs two models at once.
"""


def metric(name: str) -> Metric:
    """The function `measure(section, run)` of a metric; its file is imported now."""
    measure: Metric = import_module(f"quantkit.bench.{name}").measure
    return measure


def in_order(sections: Sequence[Any]) -> list[tuple[int, Any]]:
    """The sections of a recipe with their positions, in the order they run."""
    return sorted(enumerate(sections), key=lambda pair: METRICS.index(pair[1].name))
