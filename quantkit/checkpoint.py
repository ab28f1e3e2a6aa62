"""What a pass over the model writes down so that it can go on behind a block: when, what, and how it is read back."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import DataError, UsageError
from quantkit.formats.safetensors_shard import lost
from quantkit.manifest import Manifest, TensorRecord, fsync_folder, read_manifest
from quantkit.model.hidden import HiddenStates
from quantkit.one_block import JobState, ModelRun
from quantkit.place import Place
from quantkit.unfinished import Unfinished

FIRST_S = 1.0
"""Before this nothing is written down: it would take as long to read it back."""

SHARE = 0.01
"""Of the time, the most that writing down may take, the first time aside: hidden states of a large calibration set are
gigabytes, so that they are written behind every block only where a block takes long enough."""


class Checkpoints:
    """The checkpoints of one pass. index: of the pass in its command. places: of its jobs, in their order."""

    def __init__(self, work: Unfinished, index: int, places: Sequence[Place]):
        self._work, self._index, self._places = work, index, list(places)
        self._entries = [entry for entry in work.entries if entry["pass"] == index]
        self._written, self._cost_s = time.monotonic(), 0.0
        self._told = 0  # checkpoints in the journal
        self.done = 0
        self.seconds = 0.0  # that earlier runs spent for all jobs together

    @property
    def finished(self) -> bool:
        """Whether an earlier run completed the artifacts of the pass; `publish` is all that may be left."""
        return any("finished" in entry for entry in self._entries)

    def begin(self, total: int, given: Mapping[str, Any]) -> list[Path]:
        """The folders for the artifacts of the pass; empty ones where nothing was written down. total: blocks.

        given: what the pass depends on besides what the command was given. Raises UsageError when it has changed.
        """
        found = [entry["given"] for entry in self._entries if "given" in entry]
        if found and found[0] != given:
            changed = [f"{key}: {found[0].get(key)}, now {value}" for key, value in given.items()]
            raise UsageError(
                f"{self._work.main.folder}: holds unfinished work with another calibration: {', '.join(changed)}",
                hint="--restart drops that work and begins again; or restore the calibration set",
            )
        if not found:
            self._append({"given": dict(given), "blocks": total})
        dones = [entry["done"] for entry in self._entries if "done" in entry]
        self._told = len(dones)
        self.done = self._work.done = dones[-1] if dones else 0
        self._work.total = total
        for place in self._places:
            if not self.done:
                shutil.rmtree(place.artifact, ignore_errors=True)
            place.artifact.mkdir(exist_ok=bool(self.done))
        return [place.artifact for place in self._places]

    def restore(self, states: Sequence[JobState], run: ModelRun | None) -> None:
        """Bring jobs and hidden states to where the last checkpoint was. Raises DataError when files are missing."""
        dones = [entry for entry in self._entries if "done" in entry]
        if not dones:
            return
        for position, state in enumerate(states):
            told = [entry["jobs"][position] for entry in dones]
            state.writer.restore([job["writer"] for job in told])
            state.records += [TensorRecord.model_validate(record) for job in told for record in job["records"]]
            state.records_told = len(state.records)
            state.own_s = told[-1]["own_s"]
        self.seconds = dones[-1]["seconds"]
        if run is not None and self.done < self._work.total:
            self._read_hidden(dones[-1], states, run)

    def _read_hidden(self, entry: Mapping[str, Any], states: Sequence[JobState], run: ModelRun) -> None:
        pattern = run.hidden
        assert pattern is not None, "the embedded calibration set"
        free, run.hidden = [pattern], None
        path = self._states_path(self._told)
        try:
            with path.open("rb") as file:
                for holder in entry["hidden"]:
                    hidden = free.pop() if free else pattern.room_for(pattern.shape[0])
                    hidden.read_from(file)
                    if holder is None:
                        run.hidden = hidden
                    else:
                        position, name = holder
                        setattr(states[position], name, hidden)
                if file.read() != _mark(self.done):
                    raise lost(path)
        except (FileNotFoundError, EOFError) as error:
            raise lost(path) from error

    def after_block(self, done: int, states: Sequence[JobState], run: ModelRun | None, seconds: float) -> None:
        """Write down that `done` blocks are finished, unless that would take too much of the time.

        seconds: spent so far for all jobs together.
        """
        started = time.monotonic()
        if started - self._written < max(FIRST_S, self._cost_s / SHARE):
            return
        held: list[tuple[tuple[int, str] | None, HiddenStates]] = []
        if run is not None and done < self._work.total:
            held = [
                ((position, name), hidden)
                for position, state in enumerate(states)
                for name in ("hidden", "beside")
                if (hidden := getattr(state, name)) is not None
            ]
            held += [(None, run.hidden)] if run.hidden is not None else []
            self._write_hidden([hidden for _, hidden in held], done)
        told = []
        for place, state in zip(self._places, states, strict=True):
            records = [record.model_dump(mode="json") for record in state.records[state.records_told :]]
            state.records_told = len(state.records)
            told.append({"writer": state.writer.checkpoint(), "records": records, "own_s": state.own_s})
            fsync_folder(place.artifact)
        fsync_folder(self._work.main.folder)
        entry = {"done": done, "hidden": [holder for holder, _ in held], "jobs": told, "seconds": seconds}
        self._append(entry)
        self._told += 1
        self.done = self._work.done = done
        self._written = time.monotonic()
        self._cost_s = self._written - started

    def finish(self) -> None:
        """Write down that all artifacts of the pass are complete."""
        for place in self._places:
            fsync_folder(place.artifact)
        self._append({"finished": True})
        self._work.done = 0
        self._work.finished_passes += 1

    def publish(self) -> list[Manifest]:
        """Give the artifacts their places. Raises UsageError when a user's file is in the way."""
        found = []
        for place in self._places:
            place.publish()
            manifest = read_manifest(place.out)
            if manifest is None:
                raise DataError(f"{place.out}: was complete, and is gone", hint="--restart begins again")
            found.append(manifest)
        for number in (0, 1):
            self._states_path(number).unlink(missing_ok=True)
        return found

    def _write_hidden(self, held: Sequence[HiddenStates], done: int) -> None:
        """Write hidden states behind so many blocks, over those of the last checkpoint but one: what the file has on
        the disk and in the page cache is used again, which takes half of the time that a new file does."""
        path = self._states_path(self._told + 1)
        with path.open("r+b" if path.exists() else "wb", buffering=0) as file:
            for hidden in held:
                hidden.write_to(file)
            file.write(_mark(done))
            file.truncate()
            os.fsync(file.fileno())

    def _states_path(self, number: int) -> Path:
        """Where the hidden states of the checkpoint of that number lie: one of two files in turn, so that those of the
        last one stay until the journal tells of the next."""
        return self._work.main.folder / f"states-{self._index}-{number % 2}"

    def _append(self, entry: Mapping[str, Any]) -> None:
        self._work.main.journal.append({"pass": self._index, **entry})


def _mark(done: int) -> bytes:
    """What stands behind the hidden states in a file: behind how many blocks they are."""
    return done.to_bytes(8, "little")
