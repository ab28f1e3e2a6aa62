"""One place that makes the libraries behave: their noise off the screen, their idle threads off the processor.

Called before they are imported, in every process.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # it warns at every fork otherwise, and the machine's threads are torch's
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    # OpenMP's threads wait by spinning for long: beside another busy process that made quantizing 5 to 10 times slower.
    # After this many turns, some 0.1 ms, they sleep, which costs an idle machine nothing (docs/performance.md).
    "GOMP_SPINCOUNT": "5000",
}
"""A user who sets one of them keeps what was set."""

_SET_HERE: set[str] = set()
"""Those of them that this process set."""

KNOWN_WARNINGS = (
    "MatMul8bitLt: inputs will be cast from",  # by every linear of every forward pass on a CPU
    "You passed `quantization_config` or equivalent",  # by every loading that tells transformers how to decode
)
"""Beginnings of messages that say nothing a user can act on; every other warning stays."""


def quiet_libraries() -> None:
    """Silence by name what is known to be noise; QUANTKIT_DEBUG=1 lets all of it through."""
    if debugging():
        return
    for name, value in ENVIRONMENT.items():
        if name not in os.environ:
            os.environ[name] = value
            _SET_HERE.add(name)
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)


def variables_as_given() -> dict[str, str]:
    """The environment as the user gave it, for processes that are not ours to tune."""
    return {name: value for name, value in os.environ.items() if name not in _SET_HERE}


def debugging() -> bool:
    """Whether the user asked for tracebacks and all messages."""
    return os.environ.get("QUANTKIT_DEBUG", "") not in ("", "0")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KNOWN_WARNINGS)


@contextmanager
def collecting_later() -> Iterator[None]:
    """No garbage collection while modules load, which make none to speak of: a fifth of the time that torch's and
    transformers' take."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


_ASIDE = False
"""Whether `collecting_only_new` lasts."""


@contextmanager
def collecting_only_new() -> Iterator[None]:
    """Garbage collection passes over what is there already, which is mostly the modules of torch and transformers: to
    look through them takes a quarter of a second."""
    global _ASIDE
    if gc.get_freeze_count():  # someone's own, who has their reasons
        yield
        return
    try:
        gc.freeze()
        _ASIDE = True
        yield
    finally:
        _ASIDE = False
        gc.unfreeze()


@contextmanager
def loading_modules() -> Iterator[None]:
    """`collecting_later` for imports alone, which are passed over as well while `collecting_only_new` lasts.

    Nothing else is to be made here: it would stay until that ends or `collect_all` is called, as does what is garbage
    by then and not collected.
    """
    before = len(sys.modules)
    with collecting_later():
        yield
        if _ASIDE and len(sys.modules) > before:
            gc.freeze()


def collect_all() -> None:
    """Collect garbage among what is passed over as well, which imports leave: six megabytes, most of them copies of the
    list of all modules that `inspect` makes for a signature. It takes a third of a second. What is there then is passed
    over in its turn."""
    if _ASIDE:
        gc.unfreeze()
    gc.collect()
    if _ASIDE:
        gc.freeze()


@contextmanager
def stdout_for_data() -> Iterator[None]:
    """Send to stderr whatever libraries and child processes write to stdout while the block runs."""
    sys.stdout.flush()
    saved = None
    with suppress(OSError):  # a closed descriptor has nothing to keep clean
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)
