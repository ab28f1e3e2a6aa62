"""Blocks of an artifact made again from the source by the recipe in its manifest, through the pipeline itself.

A method without calibration rounds each block on its own, so any block can be taken. A calibrated one looks at what
the blocks before gave: its first blocks are made again, with the calibration set that the manifest names.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint import Checkpoints
from quantkit.environment import environment
from quantkit.errors import QuantkitError
from quantkit.formats import open_artifact
from quantkit.formats.base import ArtifactSource, calibrates
from quantkit.formats.folder import FolderArtifact
from quantkit.formats.gguf import GGUFArtifact
from quantkit.manifest import Manifest
from quantkit.model.blocks import architecture_of, blocks_of
from quantkit.model.calibration import CalibrationSet, load_calibration
from quantkit.model.source import Source
from quantkit.pipeline import Job, quantize
from quantkit.plan import given_importance, plan_linears
from quantkit.progress import Progress
from quantkit.recipe import Recipe
from quantkit.unfinished import unfinished
from quantkit.verification.report import Report

BLOCKS = 2
"""How many are made again: one block of a calibrated method costs what it cost when the artifact was made."""


class SomeBlocks(Source):
    """A model of some blocks of another, numbered from 0, with all that stands beside the blocks."""

    def __init__(self, whole: Source, chosen: list[int]):
        self.whole, self.path, self.kind, self.notes = whole, whole.path, whole.kind, whole.notes
        architecture = architecture_of(whole.config)
        self.blocks = blocks_of(whole)
        self.real: dict[str, str] = {}
        for position, index in enumerate(chosen):
            prefix = architecture.block_prefix.format(index=position)
            block = self.blocks[index]
            self.real |= {prefix + name.removeprefix(block.prefix): name for name in block.tensors}
        inside = {name for block in self.blocks for name in block.tensors}
        self.real |= {name: name for name in whole.names() if name not in inside}
        self.shown = {real: shown for shown, real in self.real.items()}
        self.config = _shortened(whole.config, chosen)

    def names(self) -> list[str]:
        return list(self.real)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole.shape(self.real[name])

    def dtype(self, name: str) -> torch.dtype:
        return self.whole.dtype(self.real[name])

    def read(self, name: str) -> Tensor:
        return self.whole.read(self.real[name])

    def tokenizer_folder(self) -> Path:
        return self.whole.tokenizer_folder()

    def side_files(self) -> list[Path]:
        return self.whole.side_files()

    def lineage(self) -> dict[str, Any]:
        return self.whole.lineage()


def _shortened(config: dict[str, Any], chosen: list[int]) -> dict[str, Any]:
    found = dict(config)
    for key in ("num_hidden_layers", "n_layer"):
        if key in found:
            found[key] = len(chosen)
    if isinstance(found.get("layer_types"), list):
        found["layer_types"] = [found["layer_types"][index] for index in chosen]
    return found


def rederive(artifact: ArtifactSource, manifest: Manifest, source: Source, report: Report) -> None:
    """Make blocks again and compare the bytes of every tensor in them and beside the blocks."""
    try:
        recipe = Recipe.model_validate(manifest.recipe)
        plans = plan_linears(recipe, source)
        calibrated = calibrates(plans)
        calibration = _calibration(recipe, manifest, source) if calibrated else None
        chosen = _chosen(len(blocks_of(source)), calibrated, manifest.recipe_sha256)
        part = SomeBlocks(source, chosen)
        own = [
            replace(plan, name=part.shown[f"{plan.name}.weight"].removesuffix(".weight"))
            for plan in plans
            if f"{plan.name}.weight" in part.shown
        ]
        importance = given_importance("verify", source, plans)
        named = {
            part.shown[f"{name}.weight"].removesuffix(".weight"): value
            for name, value in importance.items()
            if f"{name}.weight" in part.shown
        }
        with _threads(manifest), tempfile.TemporaryDirectory(prefix="quantkit-verify-") as scratch:
            out = Path(scratch) / "again"
            job = Job("verify", recipe, own, out, named)
            with unfinished([out], {}, restart=True) as work:
                checkpoints = Checkpoints(work, 0, work.places)
                (again,) = quantize([job], part, calibration, torch.device("cpu"), Progress(quiet=True), checkpoints)
            differing = _compare(artifact, open_artifact(out), part, report)
    except (QuantkitError, ValueError) as error:
        message = error.message if isinstance(error, QuantkitError) else str(error)
        report.skip(f"blocks made again: {' '.join(message.splitlines())}")
        return
    total = len(blocks_of(source))
    shown = ", ".join(map(str, chosen))
    elsewhere = _made_elsewhere(manifest, again)
    if differing and calibrated and elsewhere:
        report.skip(
            f"blocks made again: {len(differing)} tensors differ, made with {elsewhere}; calibration follows it"
        )
        return
    report.find(*differing)
    if len(chosen) < total:
        why = "; the others follow from these and were not made again" if calibrated else ""
        report.skip(f"{total - len(chosen)} of {total} blocks: only {shown} were made again{why}")


def _chosen(count: int, calibrated: bool, seed: str) -> list[int]:
    """Which blocks: the first ones of a calibrated method, else a sample that the recipe's hash chooses."""
    if calibrated:
        return list(range(min(BLOCKS, count)))
    return sorted(random.Random(seed).sample(range(count), min(BLOCKS, count)))


def _calibration(recipe: Recipe, manifest: Manifest, source: Source) -> CalibrationSet:
    """The token ids that the manifest names. Raises ValueError when the set gives others today."""
    found = load_calibration(recipe.calibration, source.tokenizer_folder())
    stated = (manifest.calibration or {}).get("fingerprint")
    if found.fingerprint != stated:
        raise ValueError(f"the calibration set has fingerprint {found.fingerprint}, the manifest {stated}")
    return found


@contextmanager
def _threads(manifest: Manifest) -> Iterator[None]:
    """As many threads as the artifact was made with: sums of products are taken in another order else."""
    before, wanted = torch.get_num_threads(), manifest.environment.get("threads")
    if type(wanted) is int and 0 < wanted <= 1024:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _made_elsewhere(manifest: Manifest, again: Manifest) -> str:
    """What of the manifest's environment and arithmetic is another one here, in words; empty when nothing is."""
    here = environment()
    keys = ("python", "platform", "cpu", "device")
    found = [f"{key} {manifest.environment.get(key)}" for key in keys if manifest.environment.get(key) != here[key]]
    packages = manifest.environment.get("packages")
    for name in ("torch", "numba", "transformers"):
        if not isinstance(packages, dict) or packages.get(name) != here["packages"].get(name):
            found.append(f"another {name}")
    stated, now = ((one.calibration or {}).get("arithmetic") for one in (manifest, again))
    if stated is not None and stated != now:
        found.append(stated)
    return ", ".join(found)


def _compare(artifact: ArtifactSource, again: ArtifactSource, part: SomeBlocks, report: Report) -> list[str]:
    """A line for each tensor of the second artifact that the first stores otherwise."""
    found = []
    for name in again.names():
        real = part.real[name]
        if real not in artifact.names():
            found.append(f"{real}: missing, expected it as it was made again")
            continue
        differing = _differing(artifact, real, again, name)
        if differing:
            found.append(f"{differing}: found other bytes than the ones made again from the source")
        report.count("tensors made again")
    return found


def _differing(artifact: ArtifactSource, real: str, again: ArtifactSource, name: str) -> str | None:
    """The stored tensor that differs, None when all bytes of a weight are the same."""
    if isinstance(artifact, GGUFArtifact) and isinstance(again, GGUFArtifact):
        first, second = artifact.info(real), again.info(name)
        same = (first.type_name, first.shape) == (second.type_name, second.shape)
        same = same and torch.equal(artifact.file.raw(first.name), again.file.raw(second.name))
        return None if same else first.name
    assert isinstance(artifact, FolderArtifact) and isinstance(again, FolderArtifact)
    here, there = artifact.stored_parts(real), again.stored_parts(name)
    module, other = real.removesuffix(".weight"), name.removesuffix(".weight")
    ours = {stored.removeprefix(module): value for stored, value in here.items()}
    theirs = {stored.removeprefix(other): value for stored, value in there.items()}
    if ours.keys() != theirs.keys():
        return real
    return next((module + ending for ending, value in ours.items() if not _same(value, theirs[ending])), None)


def _same(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.contiguous().reshape(-1).view(torch.uint8), second.contiguous().reshape(-1).view(torch.uint8)
    )
