"""How far an exported file is from the artifact it was made from: weights, then logits on a short real text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.bench.predictions import compare_whole
from quantkit.formats.base import ArtifactSource
from quantkit.formats.gguf import GGUFArtifact
from quantkit.formats.gguf_types import written_names
from quantkit.maths.measure import energies, sqnr_db
from quantkit.model.blocks import context_length
from quantkit.model.gguf_config import family_of_config
from quantkit.model.gguf_names import norm_offset
from quantkit.progress import Progress

TEXT, SEQUENCES, LENGTH = "pydoc", 2, 128
"""The held-out part of the set that needs no network."""


@dataclass(frozen=True)
class Difference:
    """Decoded weights of a file beside those of its artifact, both in float32, which holds either exactly.

    tensors: how many were compared. unequal: {tensor name: SQNR in dB} of those that differ in any bit. wrong: those of
    them that no rounding of the format explains. largest: of all absolute differences.
    """

    tensors: int
    unequal: dict[str, float | None]
    wrong: list[str]
    largest: float

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: how many tensors are equal, and of the others the least SQNR and the largest difference."""
        noise = [value for value in self.unequal.values() if value is not None]
        return {
            "tensors": self.tensors,
            "equal": self.tensors - len(self.unequal),
            "lowest_sqnr_db": min(noise) if noise else None,
            "largest_difference": self.largest,
        }


def compare_weights(artifact: ArtifactSource, exported: GGUFArtifact, progress: Progress) -> Difference:
    """Every tensor of a file, read back, against the artifact's."""
    family = family_of_config(artifact.config)
    names = written_names(artifact)
    unequal: dict[str, float | None] = {}
    wrong, largest = [], 0.0
    with progress.task("comparing weights", len(names)) as tracker:
        for name in names:
            expected, found = artifact.read(name).float(), exported.read(name)
            if not torch.equal(expected, found):
                unequal[name] = sqnr_db(*energies(expected, [found.flatten()]))
                largest = max(largest, float((expected - found).abs().max()))
                if not norm_offset(name, family):  # the file holds gain + 1, which float32 rounds
                    wrong.append(name)
            tracker.advance(note=name)
    return Difference(len(names), unequal, wrong, largest)


def compare_logits(artifact: Path, exported: Path, difference: Difference) -> dict[str, Any]:
    """Logits of the artifact's decoded weights in float32 against those of the file, on a short real text.

    decoded: against the file's decoded weights, computed alike; equal weights need no run. llama_cpp: against what
    llama.cpp computes, which rounds activations to 8 bits. Each has kl_nats (mean over positions), top1 (share of
    positions with the same likeliest token) and largest_difference, or `missing`, the reason why it was not measured.
    """
    from quantkit.engines import DECODED, ENGINES
    from quantkit.formats import open_artifact
    from quantkit.memory import NO_LIMIT
    from quantkit.model.calibration import load_calibration
    from quantkit.sections import CalibrationSection

    source = open_artifact(artifact)
    length = min(LENGTH, context_length(source.config) or LENGTH)
    section = CalibrationSection(set=TEXT, sequences=SEQUENCES, length=length)
    found: dict[str, Any] = {"set": TEXT, "part": "evaluation", "sequences": SEQUENCES, "length": length}
    needed, room = 4 * source.parameter_count(), 2 * NO_LIMIT.room_bytes(torch.device("cpu"))
    if needed > room:
        missing = {"missing": f"decoded weights take {needed / 1e9:.1f} GB, {room / 1e9:.1f} GB are free"}
        return {**found, "decoded": missing, "llama_cpp": missing}
    ids = load_calibration(section, source.tokenizer_folder(), "evaluation").ids
    reference = _logits(DECODED, artifact, ids)
    if difference.unequal:
        found["decoded"] = _compared(reference, _logits(DECODED, exported, ids))
    else:
        found["decoded"] = {"kl_nats": 0.0, "top1": 1.0, "largest_difference": 0.0}
    llama = ENGINES["llama.cpp"]
    missing_engine = llama.available()
    found["llama_cpp"] = (
        _compared(reference, _logits(llama, exported, ids))
        if missing_engine is None
        else {"missing": f"llama.cpp is not installed: {missing_engine}"}
    )
    return found


def _logits(engine: Any, path: Path, ids: Tensor) -> list[Tensor]:
    """Of each sequence of ids [sequences, length]: float32 [length, vocabulary]."""
    session = engine.load(path, torch.device("cpu"), torch.float32)
    try:
        return [session.logits(row) for row in ids]
    finally:
        session.close()


def _compared(reference: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    ours, theirs = (torch.cat(list(logits)) for logits in (reference, other))  # [positions, vocabulary]
    kl, top1 = compare_whole(ours.log_softmax(-1), theirs.log_softmax(-1))
    return {"kl_nats": kl, "top1": top1, "largest_difference": float((ours - theirs).abs().max())}
