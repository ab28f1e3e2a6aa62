"""The tokenizer of a Hugging Face folder as the tokenizer.* keys of a GGUF file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantkit.errors import ModelError
from quantkit.formats.gguf_parity import check_ids
from quantkit.model.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    empty_sentencepiece_model,
)
from quantkit.model.reader import read_json_object
from quantkit.model.sequences import check_tokenizer_files, explained_tokenizer

ADDED_SCORE = -1e6
"""Score of tokens that a SentencePiece model does not know: below every score it gives, which are ranks."""


def tokenizer_metadata(
    folder: Path, config: dict[str, Any], rows: int, general: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The tokenizer.* keys for the tokenizer in a folder, checked: the ids that they give equal the folder's own.

    Where tokenizer.json and tokenizer.model differ, as they do in some models for text that begins with a space, either
    of them counts: llama.cpp follows the latter.
    rows: of the embedding matrix; ids that no token has are filled with unused ones. general: the file's general.*
    keys, some of which llama.cpp looks at. Raises ModelError for a tokenizer that is missing, of another kind, or that
    GGUF or llama.cpp would change.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json",
            hint="write it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    check_tokenizer_files(folder)
    with explained_tokenizer(str(path)):
        return _metadata(folder, path, config, rows, general or {})


def _metadata(
    folder: Path, path: Path, config: dict[str, Any], rows: int, general: Mapping[str, Any]
) -> dict[str, Any]:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ModelError(
            f"{path}: model type {spec['model']['type']} has no GGUF converter here; expected BPE",
            hint="llama.cpp reads Unigram without its fallback to bytes: line ends and rare letters would be lost",
        )
    settings = _read_json(folder / "tokenizer_config.json")
    byte_level = "ByteLevel" in json.dumps(spec["pre_tokenizer"])
    values = _byte_level_keys(spec, path) if byte_level else _sentencepiece_keys(spec, tokenizer, folder)
    _add_tokens(values, spec["added_tokens"], rows, path)
    values.update(_special_keys(tokenizer, settings, config, folder))
    template = _chat_template(folder, settings)
    if template:
        values["tokenizer.chat_template"] = template
    own = [lambda text: tokenizer.encode(text).ids]
    if values["tokenizer.ggml.model"] == "llama" and (folder / "tokenizer.model").is_file():
        own.append(_sentencepiece_ids(folder / "tokenizer.model", values))
    check_ids(values, own, tokenizer.get_added_tokens_decoder().values(), path, general)
    return values


def _sentencepiece_ids(path: Path, values: Mapping[str, Any]) -> Callable[[str], list[int]]:
    """What SentencePiece itself makes of a text, with the tokens that the keys put around it."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    around = {
        role: [values[f"tokenizer.ggml.{role}_token_id"]] if values[f"tokenizer.ggml.add_{role}_token"] else []
        for role in ("bos", "eos")
    }

    def ids_of(text: str) -> list[int]:
        return [*around["bos"], *processor.encode(text), *around["eos"]]

    return ids_of


def _byte_level_keys(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """The keys of a byte-level BPE. Raises ModelError when its way to cut text is not in the table."""
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(spec, path),
        "tokenizer.ggml.tokens": {number: token for token, number in vocabulary.items()},
        "tokenizer.ggml.token_type": dict.fromkeys(vocabulary.values(), NORMAL),
        "tokenizer.ggml.merges": merges,
    }


def pre_tokenizer_name(spec: dict[str, Any], path: Path) -> str:
    """The table's name for how a tokenizer.json cuts text. Raises ModelError when no entry cuts exactly so."""
    wanted = _cuts(spec["pre_tokenizer"])
    normalizer = spec["normalizer"]
    plain = normalizer is None or (normalizer["type"] == "Sequence" and not normalizer["normalizers"])
    for name, entry in PRE_TOKENIZERS.items():
        probe = Tokenizer.from_str('{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}')
        probe.pre_tokenizer = entry.build()
        same = _cuts(json.loads(probe.to_str())["pre_tokenizer"]) == wanted
        normal = plain or (entry.nfc and normalizer == {"type": "NFC"})
        if same and normal and entry.ignore_merges == bool(spec["model"].get("ignore_merges")):
            if entry.differs:
                raise ModelError(f"{path}: cuts text as {name} does; llama.cpp cuts {entry.differs}, in other places")
            return name
    raise ModelError(
        f"{path}: how it cuts text is none of {', '.join(PRE_TOKENIZERS)}, so llama.cpp would give other token ids: "
        f"pre_tokenizer {json.dumps(spec['pre_tokenizer'])}, normalizer {json.dumps(normalizer)}, "
        f"ignore_merges {bool(spec['model'].get('ignore_merges'))}",
        hint="an entry is a line in quantkit/model/gguf_tokenizer.py; its name must be one that llama.cpp knows",
    )


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer without what changes no id."""
    if pre_tokenizer is None:
        return []
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return [{key: value for key, value in step.items() if key != "trim_offsets"} for step in steps]


def _sentencepiece_keys(spec: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """The keys of a SentencePiece BPE, with the scores of tokenizer.model or, without it, such as order the merges of
    tokenizer.json alike. Raises ModelError for a damaged file or another kind of model."""
    path = folder / "tokenizer.model"
    first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    values: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": bool(first) and first[0].startswith(SPACE),
    }
    if not path.is_file():
        return values | _scores_of_merges(spec["model"])
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    proto = empty_sentencepiece_model()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path}: is damaged: {error}", hint="fetch the file again") from error
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ModelError(f"{path}: is not a BPE model; llama.cpp reads only that kind for this architecture")
    return values | {
        "tokenizer.ggml.tokens": {number: piece.piece for number, piece in enumerate(proto.pieces)},
        "tokenizer.ggml.scores": {number: piece.score for number, piece in enumerate(proto.pieces)},
        "tokenizer.ggml.token_type": {number: int(piece.type) for number, piece in enumerate(proto.pieces)},
    }


def _scores_of_merges(model: dict[str, Any]) -> dict[str, Any]:
    """Tokens, types and scores of a BPE that falls back to bytes: of two merges, the earlier makes the better token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge) if not isinstance(merge, str) else merge.replace(" ", "", 1), rank)
    types = {}
    for token, number in model["vocab"].items():
        is_byte = model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", token)
        types[number] = UNKNOWN if token == model["unk_token"] else BYTE if is_byte else NORMAL
    return {
        "tokenizer.ggml.tokens": {number: token for token, number in model["vocab"].items()},
        "tokenizer.ggml.scores": {
            number: float(-ranks.get(token, len(ranks))) for token, number in model["vocab"].items()
        },
        "tokenizer.ggml.token_type": types,
    }


def _add_tokens(values: dict[str, Any], added: Sequence[dict[str, Any]], rows: int, path: Path) -> None:
    """Enter added tokens, fill every id below `rows`, and turn {id: value} into lists."""
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    scores = values.get("tokenizer.ggml.scores")
    for token in added:
        number = token["id"]
        if number in tokens and scores is not None and types[number] not in (NORMAL, USER_DEFINED):
            continue  # the SentencePiece model already says what it is
        tokens[number] = token["content"]
        types[number] = CONTROL if token["special"] else USER_DEFINED
        if scores is not None:
            scores.setdefault(number, ADDED_SCORE)
    if scores is not None:
        tokens |= {
            number: token.replace(SPACE, " ") for number, token in tokens.items() if types[number] == USER_DEFINED
        }
    beyond = [number for number in tokens if number >= rows]
    if beyond:
        raise ModelError(
            f"{path}: {len(beyond)} tokens have ids beyond the {rows} rows of the embedding, the first is "
            f"{tokens[min(beyond)]!r} with {min(beyond)}",
            hint="the tokenizer belongs to another model, or the embedding was not resized for its added tokens",
        )
    values["tokenizer.ggml.tokens"] = [tokens.get(number, f"[PAD{number}]") for number in range(rows)]
    values["tokenizer.ggml.token_type"] = [types.get(number, UNUSED) for number in range(rows)]
    if scores is not None:
        values["tokenizer.ggml.scores"] = [float(scores.get(number, ADDED_SCORE)) for number in range(rows)]


def _special_keys(
    tokenizer: Tokenizer, settings: dict[str, Any], config: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Ids of the special tokens, and whether text gets a beginning and an end token."""
    values: dict[str, Any] = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        number = tokenizer.token_to_id(text) if text is not None else config.get(f"{role}_token_id")
        if isinstance(number, list):
            number = number[0] if number else None
        if number is not None and number >= 0:
            values[f"tokenizer.ggml.{key}_token_id"] = int(number)
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    others = [end for end in ends if end != values.get("tokenizer.ggml.eos_token_id")] if isinstance(ends, list) else []
    if others:
        values["tokenizer.ggml.eot_token_id"] = int(others[0])
    bare, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    start = len(full) - len(bare) if full[-len(bare) :] == bare else full.index(bare[0])
    before, after = full[:start], full[start + len(bare) :]
    for role, found in (("bos", before), ("eos", after)):
        number = values.get(f"tokenizer.ggml.{role}_token_id")
        if found not in ([], [number]):
            raise ModelError(
                f"{folder}: tokenizer.json puts {found} around a text; GGUF can say one {role} token, here {number}"
            )
        values[f"tokenizer.ggml.add_{role}_token"] = bool(found)
    return values


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty when there is no file. Raises ModelError when it is no object."""
    return read_json_object(path) if path.is_file() else {}
