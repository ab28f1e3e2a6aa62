"""Telling that loops are being compiled: a first run on a machine stands still for it, a minute on a slow one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

SAID = "compiling loops for this processor, which are kept for later runs: a few seconds to a minute"


@contextmanager
def compiling_told(say: Callable[[str], None]) -> Iterator[None]:
    """Say so once, when the first loop is compiled that numba finds no code of in its cache."""
    from numba.core import event  # type: ignore[import-untyped]

    class Once(event.Listener):  # type: ignore[misc]
        told = False

        def on_start(self, event: object) -> None:
            if not self.told:
                self.told = True
                with suppress(OSError):  # a closed stderr is no reason for a loop to fail
                    say(SAID)

        def on_end(self, event: object) -> None:
            """Nothing to say."""

    with event.install_listener("numba:compile", Once()):
        yield
