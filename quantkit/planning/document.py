"""What `quantkit plan --json` prints: a stable document, bytes and seconds as numbers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from quantkit.planning.verdicts import EngineVerdict


class PlannedModel(BaseModel):
    """The model as its headers tell. weight_bytes: of its tensors, which a hub id has to be downloaded for."""

    id: str
    kind: str
    parameters: int
    weight_bytes: int
    blocks: int
    linears: int
    tied_head: bool


class ArtifactForecast(BaseModel):
    """Sizes. tensor_bytes: of all tensors' data, exact. weight_file_bytes: with headers; null where the tokenizer,
    which a GGUF file holds, is not at hand. bits_per_weight: of the quantized linears."""

    tensor_bytes: int
    weight_file_bytes: int | None
    weight_file_exact: bool
    bits_per_weight: float | None
    bits_per_weight_all: float


class Memory(BaseModel):
    """The peak of the process, and on a GPU of its memory. error: in parts of the whole, either way."""

    peak_rss_bytes: int
    parts_bytes: dict[str, int]
    peak_vram_bytes: int | None
    vram_parts_bytes: dict[str, int]
    error: float


class Disk(BaseModel):
    """Bytes that have to be free: for the artifact, for scratch files while it runs, for a download into the hub's
    cache."""

    artifact_bytes: int
    scratch_bytes: int
    download_bytes: int


class Time(BaseModel):
    """Seconds of the whole command, download not counted. error: in parts of the whole, either way."""

    seconds: float
    parts_s: dict[str, float]
    error: float


class PlanDocument(BaseModel):
    """Everything known of a run before it. Forecasts are null when the recipe does not fit the model."""

    schema_version: Literal[1] = 1
    recipe: str
    recipe_sha256: str
    method: str
    format: str
    device: str
    model: PlannedModel
    fits: bool = Field(description="whether quantize would start")
    problems: list[str] = Field(description="why not, one line each")
    hint: str | None
    cautions: list[str]
    artifact: ArtifactForecast | None
    memory: Memory | None
    disk: Disk | None
    time: Time | None
    engines: list[EngineVerdict]
