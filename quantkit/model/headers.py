"""A model by its config and headers alone: enough to plan a run, without a byte of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.blocks import architecture_of
from quantkit.model.hub import HUB_ID, fetch_files, hub_errors
from quantkit.model.load import built
from quantkit.model.reader import (
    INDEX,
    WEIGHTS,
    full_names,
    is_side_file,
    open_source,
    read_config,
    weight_map_of,
)
from quantkit.model.safetensors_file import DTYPES, MAX_HEADER_BYTES, Entry, checked_entries, parse_header
from quantkit.model.source import Source

FIRST_BYTES = 1 << 16
"""Of a shard that are asked for at once: a shard of 5 GB has a header of a few kilobytes."""

CONNECTIONS = 16
TIMEOUT_S = 10.0

Shape = tuple[torch.dtype, tuple[int, ...]]


class HeaderSource(Source):
    """Names, shapes and dtypes of a model's tensors; `read` refuses.

    path: the folder with config.json. shapes: {name in the whole model: dtype and shape}. hub_id, commit: where the
    folder came from, None for a local one.
    """

    kind = "safetensors"

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        shapes: Mapping[str, Shape],
        *,
        notes: tuple[str, ...] = (),
        hub_id: str | None = None,
        commit: str | None = None,
    ):
        self.path, self.config, self.notes = path, config, notes
        self.hub_id, self.commit = hub_id, commit
        self._shapes = dict(shapes)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name][1]

    def dtype(self, name: str) -> torch.dtype:
        return self._shapes[name][0]

    def read(self, name: str) -> Tensor:
        raise ModelError(f"{self.path}: {name}: only the headers of this model are here")

    def tokenizer_folder(self) -> Path:
        raise ModelError(f"{self.path}: only the headers of this model are here, not its tokenizer")

    def side_files(self) -> list[Path]:
        return sorted(path for path in self.path.iterdir() if path.is_file() and is_side_file(path.name))

    def lineage(self) -> dict[str, Any]:
        return {"kind": self.kind, "id": self.hub_id or self.path.resolve().name, "revision": self.commit, "files": []}


def open_headers(model: str, *, revision: str = "main", token: str | None = None) -> Source:
    """A model as `open_source` gives it, but of a hub id only config.json, the index and the headers are fetched.

    Where there is a config and no weights at all, the shapes are those that transformers builds from it.
    Raises ModelError.
    """
    path = Path(model).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not _has_weights(path):
        return _of_config(path)
    if path.exists() or not HUB_ID.fullmatch(model) or model.endswith((".gguf", ".safetensors", ".bin", ".pt")):
        return open_source(model)
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return open_source(model, revision=revision)
    folder = fetch_files(model, revision, token, ["config.json", INDEX])
    return _of_hub(folder, model, token)


def _has_weights(folder: Path) -> bool:
    """Whether there is anything that the reader will open or refuse: an index, or files of weights of any kind."""
    kinds = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl")
    return any(entry.suffix in kinds or entry.name == INDEX for entry in folder.iterdir())


def _of_hub(folder: Path, model: str, token: str | None) -> Source:
    from huggingface_hub.errors import EntryNotFoundError

    config = read_config(folder)
    weight_map = weight_map_of(folder)
    files = sorted(set(weight_map.values())) if weight_map else [WEIGHTS]

    def entries(name: str) -> dict[str, Entry]:
        return _remote_entries(model, folder.name, name, token)

    with hub_errors(model, folder.name), ThreadPoolExecutor(CONNECTIONS) as pool:
        try:
            parts = list(pool.map(entries, files))
        except EntryNotFoundError:
            return _of_config(folder, hub_id=model, commit=folder.name)
    stored = {name: (DTYPES[entry.dtype], entry.shape) for part in parts for name, entry in part.items()}
    shapes = {name: stored[held] for name, held in full_names(config, stored).items()}
    return HeaderSource(folder, config, shapes, hub_id=model, commit=folder.name)


def _remote_entries(model: str, commit: str, name: str, token: str | None) -> dict[str, Entry]:
    """The tensors of a file on the hub, by ranged reads of its header. Raises the hub's errors and ModelError."""
    where = f"{model}/{name}"
    text, size = _remote_bytes(model, commit, name, token, 0, FIRST_BYTES)
    length = int.from_bytes(text[:8], "little")
    if len(text) < 8 or length > MAX_HEADER_BYTES:
        raise ModelError(f"{where}: not a safetensors file, expected a header of {MAX_HEADER_BYTES} bytes or fewer")
    if len(text) < 8 + length:
        rest, _ = _remote_bytes(model, commit, name, token, len(text), 8 + length)
        text += rest
    return checked_entries(where, parse_header(where, text[8 : 8 + length]), 8 + length, size)


def _remote_bytes(model: str, commit: str, name: str, token: str | None, start: int, stop: int) -> tuple[bytes, int]:
    """Bytes `start` to `stop`, or to the end, of a file on the hub, and its size."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(model, name, revision=commit)
    headers = {**build_hf_headers(token=token), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
        hf_raise_for_status(response)
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code != 206 or not total.isdecimal():
            raise ModelError(
                f"{model}/{name}: the hub sends whole files only, expected it to answer a range",
                hint="download the model and give its folder",
            )
        return response.read(), int(total)


def _of_config(folder: Path, *, hub_id: str | None = None, commit: str | None = None) -> HeaderSource:
    """The model that transformers builds from a config, without weights. Raises ModelError."""
    config = read_config(folder)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
    try:
        model = built(config, dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{folder}: no weights, and transformers builds no model from config.json: {str(error)[:200]}",
            hint="give a folder with weights, or a hub id of a repository that has safetensors",
        ) from error
    tied = bool(config.get("tie_word_embeddings", model.config.tie_word_embeddings))
    config["tie_word_embeddings"] = tied
    head = f"{architecture_of(config).head}.weight"
    shapes = {
        name: (dtype, tuple(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not (tied and name == head)
    }
    notes = ("no weights were found: shapes are those that config.json asks for",)
    return HeaderSource(folder, config, shapes, notes=notes, hub_id=hub_id, commit=commit)
