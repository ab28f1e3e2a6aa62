"""Small tokenizers trained on the spot, each with the pre-tokenizer, normalizer and special tokens of a family."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SCRIPTS = (
    "Привет, мир! Как дела? Это длинный текст о погоде, книгах и людях. ПриветМир. Γειά σου Κόσμε, καλημέρα.",
    "你好，世界。今天的天气很好。日本語のテキストはここにあります。カタカナ 안녕하세요 세계 여러분",
    "مرحبا بالعالم كيف الحال ١٢٣ हिन्दी में लिखा है १२३ नमस्ते दुनिया ไทยภาษา สวัสดี עברית שלום",
    "café naïve Ærø façade 😀👩‍👩‍👧🏽 ❤️ ½ ² Ⅷ ① … — “quotes” «»",
    "def f(x: int) -> float:\n    if x <= 10:\n\t\treturn x**2 + 3.14e-10\n\n\n    pass\r\n",
    "camelCase HTTPServer don'T I'm",
    "In 2024, 1234567 people paid $9,876.54 (±0.5%) for 3rd-hand 10x20 cm boxes; call 0049-30-1234. WE'LL THEY'RE",
)

ROWS = 1300
"""Rows of an embedding that these vocabularies fit into."""

BYTE_LEVEL = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2", "phi4": "dbrx"}
"""Styles that a GGUF file may have, with llama.cpp's name of the pre-tokenizer."""

SENTENCEPIECE = ("llama", "mistral", "phi3", "gemma")

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def texts() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)[:20]] + list(SCRIPTS) * 20


def _split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), byte_level])


def general_of(style: str) -> dict[str, str]:
    """The general.* keys of a GGUF file with such a tokenizer; llama.cpp looks for phi-3 in the name."""
    return {"general.name": "phi-3-mini" if style == "phi3" else style}


def write_style(folder: Path, style: str) -> Path:
    """A tokenizer of any style."""
    return write_sentencepiece(folder, style) if style in SENTENCEPIECE else write_byte_level(folder, style)


def write_byte_level(folder: Path, style: str, size: int = 1200) -> Path:
    """tokenizer.json and tokenizer_config.json of gpt2, smollm, llama3, qwen2, phi4 or tekken style."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=style in ("llama3", "tekken")))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = {
        "gpt2": lambda: plain,
        "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "llama3": lambda: _split(_LETTERS + r"|\p{N}{1,3}" + _TAIL),
        "phi4": lambda: _split(_LETTERS + r"|\p{N}{1,3}" + _TAIL),
        "qwen2": lambda: _split(_LETTERS + r"|\p{N}" + _TAIL),
        "tekken": lambda: _split(_TEKKEN),
    }[style]()
    if style == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    byte_level: Any = processors.ByteLevel(trim_offsets=False)
    if style == "llama3":
        first = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
        byte_level = processors.Sequence([byte_level, first])
    tokenizer.post_processor = byte_level
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    return folder


def train_sentencepiece(style: str, size: int, model_type: str = "bpe") -> bytes:
    """A tokenizer.model as Llama 2 and Phi-3 ("llama") or Gemma have it."""
    import sentencepiece

    made = io.BytesIO()
    gemma = style == "gemma"
    lines = [line for text in texts() for line in text.splitlines() if line.strip()]
    ids: dict[str, Any] = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    if gemma:
        ids = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3, eos_piece="<eos>", bos_piece="<bos>", pad_piece="<pad>")
        ids["control_symbols"] = ["<mask>"]
        ids["user_defined_symbols"] = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\t", "▁▁", "▁▁▁▁", "<table>"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        model_type=model_type,
        vocab_size=size,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.99995,
        minloglevel=2,
        **ids,
    )
    return made.getvalue()


def write_sentencepiece(folder: Path, style: str, size: int = 1200) -> Path:
    """tokenizer.model, tokenizer.json and tokenizer_config.json of llama, mistral, phi3 or gemma style.

    The merges are those that transformers' own converter makes of the scores.
    """
    from sentencepiece import sentencepiece_model_pb2
    from transformers.convert_slow_tokenizer import generate_merges

    folder.mkdir(parents=True, exist_ok=True)
    data = train_sentencepiece(style, size)
    (folder / "tokenizer.model").write_bytes(data)
    proto = sentencepiece_model_pb2.ModelProto.FromString(data)  # type: ignore[attr-defined]
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    model = models.BPE(
        vocabulary,
        generate_merges(vocabulary, scores),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    bos, eos = ("<bos>", "<eos>") if style == "gemma" else ("<s>", "</s>")
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif style == "mistral":  # as its later tokenizers: not "legacy"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(steps if style == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, vocabulary[bos])]
    )
    for piece in proto.pieces:
        if piece.type in (2, 3, 4):
            special = piece.type != 4 or "turn" in piece.piece
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False, special=special)])
    if style == "phi3":
        chat = [AddedToken(name, normalized=False, special=True, rstrip=True) for name in ("<|user|>", "<|end|>")]
        tokenizer.add_tokens([AddedToken("<|endoftext|>", normalized=False, special=True), *chat])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
