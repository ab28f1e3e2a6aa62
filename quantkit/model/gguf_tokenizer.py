"""The tokenizer inside a GGUF file as tokenizer files, and the table of pre-tokenizers that both directions use.

`tokenizer.ggml.pre` names how text is cut before merging. A wrong cut loads and silently degrades, so a name that is
not in the table is an error. The patterns are those of the models' own tokenizer.json files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from quantkit.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""ggml's token types."""

SPACE = "▁"
"""How SentencePiece writes a space inside a piece; llama.cpp wants user-defined tokens with spaces instead."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_AFTER_DIGITS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _AFTER_DIGITS
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _AFTER_DIGITS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text: `build` makes it; `aliases` are other names that llama.cpp treats alike.

    ignore_merges: a piece that is a token as a whole is taken without looking at merges. adds_bos: what holds when
    the file does not say. nfc: the models' own tokenizers normalize text first (llama.cpp does not). differs: what
    llama.cpp cuts otherwise than the models' own tokenizers under this name, so that it is read but not written.
    """

    build: Callable[[], Any]
    aliases: tuple[str, ...] = ()
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False
    differs: str = ""


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _split(pattern: str) -> Callable[[], Any]:
    def build() -> Any:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return build


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(_gpt2, aliases=("mpt", "olmo", "jais", "phi-2")),
    "smollm": PreTokenizer(_digits_then_gpt2, aliases=("starcoder", "refact", "codeshell")),
    "llama-bpe": PreTokenizer(_split(_LLAMA3), aliases=("llama3", "llama-v3"), ignore_merges=True, adds_bos=True),
    "dbrx": PreTokenizer(_split(_LLAMA3), aliases=("smaug-bpe",)),  # Phi-4 cuts so
    "tekken": PreTokenizer(
        _split(_TEKKEN), ignore_merges=True, differs="words with combining marks, as in Hindi or Thai"
    ),
    "qwen2": PreTokenizer(_split(_QWEN2), nfc=True),
    "deepseek-r1-qwen": PreTokenizer(_split(_QWEN2)),
}


def pre_tokenizer(name: str | None, where: str) -> PreTokenizer:
    """The entry for a name or an alias. Raises ModelError for a name that is not in the table."""
    for known, entry in PRE_TOKENIZERS.items():
        if name == known or name in entry.aliases:
            return entry
    names = ", ".join(name for known, entry in PRE_TOKENIZERS.items() for name in (known, *entry.aliases))
    raise ModelError(
        f"{where}: tokenizer.ggml.pre: {name or '(missing)'} is not supported; expected one of {names}",
        hint="how text is cut must be known exactly; an entry is a line in quantkit/model/gguf_tokenizer.py",
    )


def build_tokenizer(metadata: dict[str, Any], where: str) -> Tokenizer:
    """The tokenizer that a file's tokenizer.ggml keys describe.

    where: what to name in a message. Raises ModelError for a kind that is not supported or keys that contradict.
    """
    kind = metadata.get("tokenizer.ggml.model", "(none)")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens", [])
    if not tokens:
        raise ModelError(f"{where}: holds no tokenizer: tokenizer.ggml.tokens is missing")
    if len(set(tokens)) != len(tokens):
        twice = next(token for token, count in Counter(tokens).items() if count > 1)
        raise ModelError(f"{where}: tokenizer.ggml.tokens: {twice!r} stands there twice; expected each token once")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"{where}: tokenizer.ggml.token_type names {len(types)} of {len(tokens)} tokens")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, where)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, where)
    else:
        raise ModelError(
            f"{where}: tokenizer.ggml.model: {kind} is not supported; expected gpt2 or llama",
            hint="give the model as a Hugging Face folder, which brings its own tokenizer",
        )
    added = [
        AddedToken(token, special=kind_of != USER_DEFINED, normalized=False)
        for token, kind_of in zip(tokens, types, strict=True)
        if kind_of in (CONTROL, USER_DEFINED) or (kind_of == UNKNOWN and kind == "llama")
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def adds_bos_eos(metadata: dict[str, Any], where: str) -> tuple[bool, bool]:
    """Whether text gets a beginning and an end token; llama.cpp's defaults where the file does not say."""
    sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    default = sentencepiece or pre_tokenizer(metadata.get("tokenizer.ggml.pre"), where).adds_bos
    return (
        bool(metadata.get("tokenizer.ggml.add_bos_token", default)),
        bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )


def special_token(metadata: dict[str, Any], role: str) -> str | None:
    """The text of the token with a role: bos, eos, unknown or padding; None when the file names none."""
    number = metadata.get(f"tokenizer.ggml.{role}_token_id")
    tokens = metadata["tokenizer.ggml.tokens"]
    return tokens[number] if number is not None and 0 <= number < len(tokens) else None


def _template(metadata: dict[str, Any], where: str) -> processors.TemplateProcessing | None:
    with_bos, with_eos = adds_bos_eos(metadata, where)
    roles = [("bos", with_bos), ("eos", with_eos)]
    texts = {role: special_token(metadata, role) if wanted else None for role, wanted in roles}
    if not any(texts.values()):
        return None
    single = [f"{texts['bos']}:0" if texts["bos"] else "", "$A:0", f"{texts['eos']}:0" if texts["eos"] else ""]
    pair = [part.replace("$A", "$B").replace(":0", ":1") for part in single]
    ids = {text: metadata[f"tokenizer.ggml.{role}_token_id"] for role, text in texts.items() if text}
    return processors.TemplateProcessing(
        single=[part for part in single if part],
        pair=[part for part in (*single, *pair) if part],
        special_tokens=list(ids.items()),
    )


def _byte_level(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    entry = pre_tokenizer(metadata.get("tokenizer.ggml.pre"), where)
    merges = []
    for line in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = line.partition(" ")  # the byte alphabet has no space
        merges.append((left, right))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=entry.ignore_merges)
    except Exception as error:  # the library raises a bare Exception
        raise ModelError(f"{where}: tokenizer.ggml.merges do not fit tokenizer.ggml.tokens: {error}") from error
    tokenizer = Tokenizer(model)
    if entry.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = entry.build()
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = processors.ByteLevel(trim_offsets=False)
    template = _template(metadata, where)
    tokenizer.post_processor = byte_level if template is None else processors.Sequence([byte_level, template])
    return tokenizer


def merges_of_scores(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies: every cut of a token in two tokens, best score first."""
    numbers = {token: number for number, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for number, token in enumerate(tokens):
        if types[number] not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in numbers and right in numbers:
                found.append((-scores[number], numbers[left], numbers[right], left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], where: str) -> Tokenizer:
    scores, types = metadata.get("tokenizer.ggml.scores"), metadata.get("tokenizer.ggml.token_type")
    if scores is None or types is None or len(scores) != len(tokens) or len(types) != len(tokens):
        raise ModelError(f"{where}: tokenizer.ggml.scores and token_type must name all {len(tokens)} tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    model = models.BPE(
        vocabulary,
        merges_of_scores(tokens, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    template = _template(metadata, where)
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def write_tokenizer_files(metadata: dict[str, Any], folder: Path, where: str, max_length: int) -> None:
    """Put the tokenizer's files, its chat template and generation_config.json into a folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = build_tokenizer(metadata, where)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special_token(metadata, "bos"),
        eos_token=special_token(metadata, "eos"),
        unk_token=special_token(metadata, "unknown"),
        pad_token=special_token(metadata, "padding"),
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    fast.save_pretrained(folder)
    if metadata["tokenizer.ggml.model"] == "llama":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(metadata))
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    settings: dict[str, Any] = {key: metadata.get(f"tokenizer.ggml.{role}_token_id") for key, role in roles.items()}
    turn_end = metadata.get("tokenizer.ggml.eot_token_id")
    if turn_end is not None and turn_end != settings["eos_token_id"]:
        settings["eos_token_id"] = [number for number in (settings["eos_token_id"], turn_end) if number is not None]
    settings = {key: value for key, value in settings.items() if value is not None}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def empty_sentencepiece_model() -> Any:
    """A ModelProto, the message that a tokenizer.model is."""
    from sentencepiece import sentencepiece_model_pb2

    generated: Any = sentencepiece_model_pb2  # its classes are made at import and unknown to type checkers
    return generated.ModelProto()


def sentencepiece_model(metadata: dict[str, Any]) -> bytes:
    """The tokenizer.model that the tokens, scores and types of a file stand for."""
    proto = empty_sentencepiece_model()
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    for token, score, kind in zip(tokens, scores, metadata["tokenizer.ggml.token_type"], strict=True):
        piece = token.replace(" ", SPACE) if kind == USER_DEFINED else token
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in metadata["tokenizer.ggml.token_type"]
    for role, field in (("unknown", "unk_id"), ("bos", "bos_id"), ("eos", "eos_id"), ("padding", "pad_id")):
        setattr(trainer, field, metadata.get(f"tokenizer.ggml.{role}_token_id", -1))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    result: bytes = proto.SerializeToString()
    return result
