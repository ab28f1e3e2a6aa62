"""Models at rest: a Hugging Face folder, a .gguf file or a hub id, opened as a Source that reads when it is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.manifest import MANIFEST_NAME, file_record
from quantkit.model.blocks import ARCHITECTURES
from quantkit.model.config_check import check_config
from quantkit.model.front_matter import CARD, front_matter
from quantkit.model.hub import HUB_ID, download_model
from quantkit.model.safetensors_file import DTYPES, Entry, SafetensorsFile
from quantkit.model.source import Source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
"""A folder with one of them has a tokenizer."""

SIDE_FILES = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
LICENCES = ("licen[cs]e*", "notice*", "copying*", "use_policy*")
"""In lower case; names of files are compared without case."""

MAX_JSON_BYTES = 100_000_000  # the index of the largest published models has 10 MB

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_CONVERT = (
    "pickled weights can run any code when loaded, so they are refused; where you trust them, convert: "
    "transformers.AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
)


def open_source(
    model: str, *, revision: str = "main", token: str | None = None, trust_remote_code: bool = False
) -> Source:
    """The model in a folder, a .gguf file or a hub repository; only headers are read.

    revision: branch, tag or commit of a hub id. token: for the hub; HF_TOKEN when None. trust_remote_code: its
    tokenizer may be code of its own. Raises ModelError.
    """
    path = Path(model).expanduser()
    if not model.strip():
        raise ModelError("no model: found an empty name", hint="expected a folder, a .gguf file or a hub id OWNER/NAME")
    try:
        if path.is_dir():
            return _open_folder(path, trust_remote_code)
        if path.exists():
            return _open_file(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if HUB_ID.fullmatch(model) and not model.endswith((".gguf", ".safetensors", ".bin", ".pt")):
        names = [*SIDE_FILES, CARD, "config.json", INDEX]
        names += [spelled for name in LICENCES for spelled in (name, name.upper(), name.capitalize())]
        names += ["*.py"] if trust_remote_code else []
        folder, commit = download_model(model, revision, token, names, _needed_weights)
        return SafetensorsSource(folder, hub_id=model, commit=commit, trust_remote_code=trust_remote_code)
    kind = "file" if path.suffix else "file or folder"
    raise ModelError(f"{model}: no such {kind}", hint="expected a folder, a .gguf file or a hub id OWNER/NAME")


def _open_folder(folder: Path, trust_remote_code: bool = False) -> Source:
    found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf")
    if found and not (folder / "config.json").is_file():
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise ModelError(f"{folder}: holds {len(found)} .gguf files: {names}", hint="give one of the files")
        return _open_file(found[0])
    return SafetensorsSource(folder, trust_remote_code=trust_remote_code)


def _open_file(path: Path) -> Source:
    if path.suffix == ".gguf":
        from quantkit.model.gguf_source import GGUFSource

        return GGUFSource(path)
    if any(fnmatchcase(path.name, pattern) for pattern in _PICKLES):
        raise ModelError(f"{path}: pickled weights, expected safetensors", hint=_CONVERT)
    hint = f"give the folder that holds it: {path.parent}" if path.suffix == ".safetensors" else None
    raise ModelError(f"{path}: a file, expected a folder, a .gguf file or a hub id", hint=hint)


class SafetensorsSource(Source):
    """A Hugging Face folder: config.json beside model.safetensors, or beside an index and its shards.

    hub_id, commit: where the folder came from, None for a local one. Every header is read and checked at once, no
    weight is. Raises ModelError when the folder is no model, is damaged, or is already quantized.
    """

    kind = "safetensors"

    def __init__(
        self, folder: Path, *, hub_id: str | None = None, commit: str | None = None, trust_remote_code: bool = False
    ):
        self.path = folder
        self.trust_remote_code = trust_remote_code
        self.hub_id = hub_id
        self.commit = commit
        self.config = read_config(folder)
        self._files = open_shards(folder)
        self._stored_names = full_names(self.config, self._files)
        self._lineage: dict[str, Any] | None = None
        self._hashing = Lock()

    def names(self) -> list[str]:
        """By shard, then in the order of the bytes: reading in this order is sequential."""
        return list(self._stored_names)

    def _entry(self, name: str) -> Entry:
        stored = self._stored_name(name)
        return self._files[stored].entries[stored]

    def _stored_name(self, name: str) -> str:
        if name not in self._stored_names:
            raise ModelError(f"{self.path}: holds no tensor {name}")
        return self._stored_names[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._entry(name).dtype]

    def read(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        return self._files[stored].read(stored)

    def weight_paths(self) -> list[Path]:
        return sorted({file.path for file in self._files.values()})

    def in_parts(self, name: str, rows: int) -> Iterator[Tensor]:
        stored = self._stored_name(name)
        for first in range(0, self.shape(name)[0], rows):
            yield self._files[stored].read(stored, slice(first, first + rows))

    def tokenizer_folder(self) -> Path:
        if not any((self.path / name).is_file() for name in TOKENIZER_FILES):
            raise ModelError(
                f"{self.path}: holds no tokenizer; expected one of {', '.join(TOKENIZER_FILES)}",
                hint="copy the tokenizer files of the original model into the folder",
            )
        return self.path

    def side_files(self) -> list[Path]:
        files = [path for path in self.path.iterdir() if path.is_file()]
        code = ".py" if self.trust_remote_code else None  # its tokenizer is nothing without it
        return sorted(path for path in files if is_side_file(path.name) or path.suffix == code)

    def card(self) -> dict[str, Any]:
        own = {key: value for key, value in front_matter(self.path).items() if key != "base_model"}
        return {"base_model": self.hub_id, **own} if self.hub_id else own

    def lineage(self) -> dict[str, Any]:
        with self._hashing:  # a run hashes ahead in another thread
            if self._lineage is None:
                self._lineage = {
                    "kind": self.kind,
                    "id": self.hub_id or self.path.resolve().name,
                    "revision": self.commit,
                    "files": weight_files(self.path, self._files),
                }
                if self.trust_remote_code:
                    self._lineage["trust_remote_code"] = True
            return self._lineage


def full_names(config: dict[str, Any], stored: Iterable[str]) -> dict[str, str]:
    """Each tensor's name in the whole model and the stored one, which lacks the trunk's name where a checkpoint was
    saved from the trunk alone, as that of GPT-2 was."""
    names = list(stored)
    for architecture in (ARCHITECTURES[name] for name in config.get("architectures") or () if name in ARCHITECTURES):
        trunk = f"{architecture.trunk}."
        if f"{architecture.embedding.removeprefix(trunk)}.weight" in names:
            return {name if name.startswith(f"{architecture.head}.") else trunk + name: name for name in names}
    return {name: name for name in names}


def open_shards(folder: Path, dtypes: Mapping[str, torch.dtype] = DTYPES) -> dict[str, SafetensorsFile]:
    """Every tensor of a folder and the file that holds it, by shard, then in the order of the bytes; headers are read.

    dtypes: names of those that are accepted. Raises ModelError when a file is missing or damaged.
    """
    wanted = weight_map_of(folder)
    if wanted is None:
        if not (folder / WEIGHTS).is_file():
            raise _no_weights(folder)
        shards = [SafetensorsFile(folder / WEIGHTS, dtypes)]
    else:
        shards = _shards(folder, wanted, dtypes)
    return {
        name: shard
        for shard in shards
        for name in shard.entries
        if wanted is None or wanted.get(name) == shard.path.name
    }


def weight_files(folder: Path, files: Mapping[str, SafetensorsFile]) -> list[dict[str, Any]]:
    """Name, bytes and sha256 of each file that tensors are in."""
    return [file_record(path, folder).model_dump() for path in sorted({file.path for file in files.values()})]


def is_side_file(name: str) -> bool:
    """Whether an artifact carries a file of this name on unaltered."""
    return name in SIDE_FILES or is_licence_file(name)


def is_licence_file(name: str) -> bool:
    """Whether a file of this name holds a licence or what belongs to one: a notice, a use policy."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in LICENCES)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model that is not quantized yet. Raises ModelError."""
    path = folder / "config.json"
    if not path.is_file():
        inside = any(fnmatchcase(entry.name, "*.safetensors") for entry in folder.iterdir())
        raise ModelError(
            f"{folder}: not a model: no config.json" + (" beside the weights" if inside else ""),
            hint="expected a Hugging Face folder with config.json and model.safetensors, or a .gguf file",
        )
    config = read_json_object(path)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        made_here = f"; {MANIFEST_NAME} in the folder names it" if (folder / MANIFEST_NAME).is_file() else ""
        raise ModelError(
            f"{folder}: already quantized ({method or 'method not named'}), expected original weights",
            hint=f"take the model it was made from{made_here}",
        )
    config.pop("quantization_config", None)
    check_config(str(path), config)
    names = config.get("architectures") or []
    if config.get("auto_map") and not any(name in ARCHITECTURES for name in names):
        raise ModelError(
            f"{path}: auto_map: {', '.join(names) or 'the model'} is code of the repository's own, which is never run; "
            f"expected one of {', '.join(ARCHITECTURES)}",
            hint="a family is one entry of the table in quantkit/model/blocks.py",
        )
    return config


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError when it is missing, too large or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise ModelError(f"{path}: {size} bytes, expected {MAX_JSON_BYTES} or fewer")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not JSON: {error}", hint="the download may be incomplete") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a {type(value).__name__}, expected an object")
    return value


def weight_map_of(folder: Path) -> dict[str, str] | None:
    """Tensor name to shard, None when all weights are (or would be) in one file."""
    path = folder / INDEX
    if (folder / WEIGHTS).is_file() or not path.is_file():
        return None
    mapping = read_json_object(path).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise ModelError(f"{path}: weight_map: expected a file name for each tensor")
    outside = sorted({str(name)[:80] for name in mapping.values() if not _is_shard_name(name)})
    if outside:
        raise ModelError(
            f"{path}: weight_map: expected .safetensors files of the same folder, found {', '.join(outside[:4])}",
            hint="do not use this model: its index reaches for other files",
        )
    return mapping


def _is_shard_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and all(letter.isalnum() or letter in "._-" for letter in name)
    )


def _stays_inside(path: Path) -> bool:
    """Whether a shard, or what it links to, lies in its folder; the hub's cache keeps files as links to its blobs."""
    folder = path.parent.resolve()
    roots = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    return any(path.resolve().is_relative_to(root) for root in roots)


def _needed_weights(folder: Path) -> list[str]:
    """The weight files that a repository with these small files must have. Raises ModelError for a quantized model."""
    read_config(folder)
    return [WEIGHTS, *sorted(set((weight_map_of(folder) or {}).values()))]


def _shards(folder: Path, weight_map: dict[str, str], dtypes: Mapping[str, torch.dtype]) -> list[SafetensorsFile]:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:8])}",
            hint="the download may be incomplete: fetch the missing files",
        )
    outside = [name for name in names if not _stays_inside(folder / name)]
    if outside:
        raise ModelError(
            f"{folder / INDEX}: names links that lead out of the folder: {', '.join(outside[:4])}",
            hint="put the files themselves in their place, if you trust them",
        )
    shards = [SafetensorsFile(folder / name, dtypes) for name in names]
    held = {shard.path.name: shard.entries for shard in shards}
    absent = [f"{tensor} in {name}" for tensor, name in weight_map.items() if tensor not in held[name]]
    if absent:
        shown = ", ".join(absent[:4]) + (f" and {len(absent) - 4} more" if len(absent) > 4 else "")
        raise ModelError(
            f"{folder / INDEX}: names {len(absent)} tensors that their shards do not hold: {shown}",
            hint="index and shards belong to different models, or a download was interrupted",
        )
    return shards


def _no_weights(folder: Path) -> ModelError:
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = [name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKLES)]
    if pickled:
        return ModelError(f"{folder}: pickled weights ({', '.join(pickled[:4])}), expected {WEIGHTS}", hint=_CONVERT)
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    found = f"; found {', '.join(others[:4])}" if others else ""
    return ModelError(
        f"{folder}: no weights: expected {WEIGHTS}, or {INDEX} with its shards{found}",
        hint="an adapter has to be merged into its base model first; of a hub repository with pickled weights only, "
        "nothing is downloaded: convert them with transformers",
    )
