"""What a GGUF file says of a model beside its tensors: architecture, tokenizer, name and licence, from any source."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantkit.errors import ModelError
from quantkit.model.gguf_config import family_of_config, metadata_of_config
from quantkit.model.gguf_source import GGUFSource
from quantkit.model.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    build_tokenizer,
    empty_sentencepiece_model,
)
from quantkit.model.source import Source

QUANTIZATION_VERSION = 2
ADDED_SCORE = -1000.0
"""Score of tokens that a SentencePiece model does not know: below every score it gives."""

CHECK_TEXTS = (
    "The capital of France is Paris, isn't it? WE'LL see -- they've \"asked\" 'twice'.",
    "In 2024, 1234567 people paid $9,876.54 (±0.5%) for 3rd-hand 10x20 cm boxes; call 0049-30-1234.",
    "def f(x: int) -> float:\n    if x <= 10 and not y:\n\t\treturn x**2 + 3.14e-10  # note\n\n\n    pass\r\n",
    "   leading,  inner   and trailing spaces   ",
    "tabs\t\tand\n\n \n newlines\n",
    '{"key": [1, 2.5, null], "url": "https://example.org/a_b?c=d&e=%20"}',
    "emoji 😀👩‍👩‍👧🏽 ok ❤️ ½ ² Ⅷ ① … — “quotes” «»",
    "Привет, мир! Как дела? Γειά σου Κόσμε café naïve Ærø",
    "你好，世界。今天2024年 日本語のテキスト カタカナ 안녕하세요 세계",
    "مرحبا بالعالم ١٢٣ हिन्दी में लिखा है १२३ ไทยภาษา עברית",
)
"""What token ids are compared on before a file counts as written: words, digits, code, spaces, emoji, scripts."""


def file_metadata(source: Source, rows: int, file_type: str) -> dict[str, Any]:
    """Every key of the file but general.architecture, with its value.

    rows: of the embedding matrix. file_type: ggml's name of the type that most linears have. Raises ModelError when the
    config or the tokenizer cannot be said in GGUF.
    """
    architecture = family_of_config(source.config).architecture
    values = general_metadata(source, file_type)
    values.update({f"{architecture}.{key}": value for key, value in metadata_of_config(source.config).items()})
    values.update(tokenizer_metadata(source.tokenizer_folder(), source.config, rows))
    return values


def general_metadata(source: Source, file_type: str) -> dict[str, Any]:
    """The general.* keys: what the model is called, how large it is, under which licence, in which types."""
    from gguf.constants import LlamaFileType
    from gguf.utility import model_weight_count_rounded_notation

    values: dict[str, Any] = {"general.type": "model", "general.name": model_name(source)}
    values["general.size_label"] = model_weight_count_rounded_notation(source.parameter_count())
    if isinstance(source, GGUFSource):
        kept = ("name", "basename", "finetune", "organization", "license", "languages", "size_label")
        found = {f"general.{key}": source.file.metadata.get(f"general.{key}") for key in kept}
        values.update({key: value for key, value in found.items() if value})
    else:
        licence = _card(source.path).get("license")
        if isinstance(licence, str):
            values["general.license"] = licence
    number = LlamaFileType.ALL_F32 if file_type == "F32" else LlamaFileType[f"MOSTLY_{file_type}"]
    values["general.file_type"] = int(number)
    values["general.quantization_version"] = QUANTIZATION_VERSION
    return values


def model_name(source: Source) -> str:
    """What the model is called: the folder's or file's name without hashes and types."""
    path = source.path
    if path.is_dir():
        if path.parent.name == "snapshots":  # the hub's cache: models--ORGANIZATION--NAME/snapshots/HASH
            return path.parent.parent.name.rpartition("--")[2]
        return path.resolve().name
    name = path.stem
    if isinstance(source, GGUFSource):
        for ending in (f".{source.main_type}", f"-{source.main_type}", f"_{source.main_type}"):
            if name.upper().endswith(ending):
                return name[: -len(ending)]
    return name


def _card(folder: Path) -> dict[str, Any]:
    """The front matter of a model card, empty when there is none."""
    import yaml

    path = folder / "README.md"
    if not path.is_file():
        return {}
    parts = path.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def tokenizer_metadata(folder: Path, config: dict[str, Any], rows: int) -> dict[str, Any]:
    """The tokenizer.* keys for the tokenizer in a folder, checked: the ids read back from them equal the folder's own.

    rows: of the embedding matrix; ids that no token has are filled with unused ones. Raises ModelError for a tokenizer
    that is missing, of another kind, or that GGUF would change.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json",
            hint="write it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise ModelError(f"{path}: model type {spec['model']['type']} has no GGUF converter here; expected BPE")
    settings = _read_json(folder / "tokenizer_config.json")
    byte_level = "ByteLevel" in json.dumps(spec["pre_tokenizer"])
    values = _byte_level_keys(spec, path) if byte_level else _sentencepiece_keys(folder)
    _add_tokens(values, spec["added_tokens"], rows, path)
    values.update(_special_keys(tokenizer, settings, config, folder))
    template = _chat_template(folder, settings)
    if template:
        values["tokenizer.chat_template"] = template
    _check_ids(values, tokenizer, path)
    return values


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


def _sentencepiece_keys(folder: Path) -> dict[str, Any]:
    """The keys of a SentencePiece BPE, whose scores only tokenizer.model has. Raises ModelError without it."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.model: tokenizer.json is a SentencePiece tokenizer and does not hold its scores",
            hint="put the model's tokenizer.model beside its tokenizer.json",
        )
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    proto = empty_sentencepiece_model()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelError(f"{path}: is damaged: {error}", hint="fetch the file again") from error
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ModelError(f"{path}: is not a BPE model; llama.cpp reads only that kind for this architecture")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": {number: piece.piece for number, piece in enumerate(proto.pieces)},
        "tokenizer.ggml.scores": {number: piece.score for number, piece in enumerate(proto.pieces)},
        "tokenizer.ggml.token_type": {number: int(piece.type) for number, piece in enumerate(proto.pieces)},
        "tokenizer.ggml.add_space_prefix": bool(proto.normalizer_spec.add_dummy_prefix),
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
    """A JSON object from a file, empty when there is no file. Raises ModelError when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _check_ids(values: dict[str, Any], tokenizer: Tokenizer, path: Path) -> None:
    """Raises ModelError when the tokenizer read back from the keys gives other ids than the one they were made from."""
    back = build_tokenizer(values, str(path))
    for text in CHECK_TEXTS:
        expected, found = tokenizer.encode(text).ids, back.encode(text).ids
        if expected != found:
            pairs = zip(expected, found, strict=False)
            at = next((place for place, (one, other) in enumerate(pairs) if one != other), len(found))
            raise ModelError(
                f"{path}: token ids would change in GGUF: at token {at} of {text!r} expected "
                f"{expected[at : at + 3]}, got {found[at : at + 3]}",
                hint="the tokenizer does something that GGUF's keys cannot say",
            )
