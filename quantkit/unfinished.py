"""The work of one command that has not ended: what it was given, how far it is, and what becomes of it on failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quantkit.errors import DataError, Interrupted, ModelError, UsageError
from quantkit.output import no_space_explained
from quantkit.place import Place

SHOWN = 8

GO_ON = "the same command goes on from there; --restart begins again, and deleting that folder gives the work up"


class Unfinished:
    """The folders of a command's outputs; the first one's journal tells of all.

    given: what the bytes of the artifacts depend on, as JSON; other work that is found there is refused.
    """

    def __init__(self, outs: Sequence[Path], given: Mapping[str, Any]):
        self.places = [Place(out) for out in outs]
        self.given = dict(given)
        self.entries: list[dict[str, Any]] = []
        self.done, self.total = 0, 0  # blocks of the pass under way
        self.finished_passes = 0

    @property
    def main(self) -> Place:
        return self.places[0]

    def open(self, *, restart: bool) -> None:
        """Lock every place and find what can be gone on with. Raises UsageError when what is there is another's."""
        for place in self.places:
            place.open()
        if not restart:
            self._refuse_others()
        entries = self.main.journal.entries
        if not restart and entries and entries[0] == {"run": self.given}:
            self.entries = entries[1:]
            self.finished_passes = sum("finished" in entry for entry in self.entries)
            under_way = [entry for entry in self.entries if entry["pass"] == self.finished_passes]
            self.done = max((entry.get("done", 0) for entry in under_way), default=0)
            self.total = max((entry.get("blocks", 0) for entry in under_way), default=0)
        if not self.entries:
            for place in self.places:
                place.empty()
        for place in reversed(self.places):
            if not (place.journal.entries and self.entries):
                place.journal.append({"run": self.given})

    def _refuse_others(self) -> None:
        for place in self.places:
            entries = place.journal.entries
            if not entries or entries[0] == {"run": self.given} or not place.artifact.is_dir():
                continue  # nothing of worth is lost
            if place is self.main and not any("done" in entry for entry in entries):
                continue
            changed = list(_differences(entries[0].get("run"), self.given, ""))
            more = [f"... and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
            lines = "".join(f"\n  {line}" for line in [*changed[:SHOWN], *more])
            raise UsageError(
                f"{place.folder}: holds the unfinished work of a run that was given something else:{lines}",
                hint="--restart drops that work and begins again; or undo the change; or give another --out",
            )

    def held_bytes(self) -> int:
        """What the artifacts take on the disk so far."""
        files = [path.stat() for place in self.places for path in place.artifact.glob("*")]
        return sum(status.st_blocks * 512 for status in files)

    @property
    def worth_keeping(self) -> bool:
        """Whether anything would have to be done again without what is in the folders."""
        return self.done > 0 or self.finished_passes > 0

    @property
    def all_made(self) -> bool:
        return not any(place.artifact.is_dir() for place in self.places) and self.finished_passes > 0

    def kept(self) -> str:
        """What stays for the same command to go on with."""
        if self.all_made:
            return "kept the finished artifacts"
        before = f", and {self.finished_passes} earlier passes" if self.finished_passes else ""
        return f"kept {self.done} of {self.total} blocks{before} in {self.main.folder}"

    def interruption(self) -> Interrupted:
        """What to say of an end from outside."""
        if not self.worth_keeping:
            return Interrupted("interrupted; no block had been written down, so nothing was left behind")
        return Interrupted(f"interrupted; {self.kept()}", hint=GO_ON)

    def last_words(self) -> Interrupted:
        """Remove what is not worth keeping, and say what is kept: for a process that ends here and now."""
        error = self.interruption()
        if not self.worth_keeping:
            self.leave()
        return error

    def leave(self) -> None:
        """Give the locks back; what is not worth keeping is removed."""
        for place in reversed(self.places):
            if self.worth_keeping:
                place.close()
            else:
                place.remove()

    def remove(self) -> None:
        """Remove the folders, the journal that tells of all of them last."""
        for place in reversed(self.places):
            place.remove()


@contextmanager
def unfinished(outs: Sequence[Path], given: Mapping[str, Any], *, restart: bool) -> Iterator[Unfinished]:
    """Locked folders for a command's outputs, removed when the block ends well or cannot be gone on with.

    Raises UsageError when another process works there, or when what is there was given something else and `restart` is
    not set; DataError and Interrupted that say what was kept.
    """
    work = Unfinished(outs, given)
    try:
        with no_space_explained(outs[0]):
            work.open(restart=restart)
    except BaseException:
        for place in work.places:
            place.close()
        raise
    try:
        yield work
    except ModelError:
        work.remove()
        raise
    except KeyboardInterrupt as error:
        work.leave()
        raise work.interruption() from error
    except DataError as error:
        work.leave()
        if work.worth_keeping and not work.all_made:
            hint = GO_ON if error.hint is None else f"{error.hint}; {GO_ON}"
            raise DataError(f"{error.message}; {work.kept()}", hint=hint) from error
        raise
    except BaseException:
        work.leave()
        raise
    work.remove()


def _differences(before: Any, now: Any, name: str) -> Iterator[str]:
    """A line for each value that differs, by its dotted name."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*before, *(key for key in now if key not in before)]:
            dotted = f"{name}.{key}" if name else str(key)
            if key not in now:
                yield f"{dotted}: {_shown(before[key])}, now missing"
            elif key not in before:
                yield f"{dotted}: missing, now {_shown(now[key])}"
            else:
                yield from _differences(before[key], now[key], dotted)
    elif before != now:
        yield f"{name}: {_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
