"""Whether a GGUF file gives the token ids of the model's own tokenizer: read back, and in llama.cpp where installed."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from quantkit.errors import ModelError
from quantkit.model.gguf_tokenizer import SPACE, build_tokenizer

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
    "camelCase HTTPServer snake_case CamelCase ПриветМир x2y3 don'T I'm",
    "if True:\n                if a:\n\n\n\n\n\n\n\t\t\t\t\treturn" + " " * 40 + "deep",
    "a",
    "",
)
"""What token ids are compared on before a file counts as written: words, digits, code, spaces, emoji, scripts."""

SHOWN = 8
"""Ids of each list that a message shows, from the first that differs."""


def check_ids(
    values: Mapping[str, Any],
    own: Sequence[Callable[[str], list[int]]],
    added: Iterable[AddedToken],
    path: Path,
    general: Mapping[str, Any],
) -> None:
    """Hold the ids that the keys of a file give against those of the tokenizer that they were made from.

    own: the tokenizer, text to ids; one that agrees is enough where it has several forms. added: its added tokens.
    path: of the tokenizer, for messages. general: the general.* keys of the file, of which llama.cpp looks at
    architecture and name. Raises ModelError for the first text that gives other ids.
    """
    back = build_tokenizer(dict(values), str(path))
    hint = "the tokenizer does something that GGUF's keys cannot say"
    for text in CHECK_TEXTS:
        _compare(text, own, back.encode(text).ids, f"{path}: read back from GGUF", hint)
    del back
    with _LlamaVocabulary(values, general, path) as ids_of:
        if ids_of is None:
            return
        hint = "llama.cpp itself reads the tokenizer otherwise, and no key of GGUF would change that"
        for text in CHECK_TEXTS:
            _compare(text, own, ids_of(text), f"{path}: in llama.cpp", hint)
        for token in added:
            text, hint = _with_token(token)
            _compare(text, own[:1], ids_of(text), f"{path}: in llama.cpp", hint)


def _with_token(token: AddedToken) -> tuple[str, str]:
    """A text with an added token, and what to do when llama.cpp does not see it."""
    if token.lstrip or token.rstrip:
        return f"a {token.content} \nb", (
            f"{token.content} takes the white space beside it, which llama.cpp follows only in models with phi-3 in "
            "their name: rename the model's folder"
        )
    # a user-defined token of spaces stands for the spaces, not for the sign that SentencePiece writes them with
    spaces = token.content if token.special else token.content.replace(SPACE, " ")
    return spaces, "llama.cpp does not take this token as one"


def _compare(text: str, own: Sequence[Callable[[str], list[int]]], found: list[int], where: str, hint: str) -> None:
    if any(ids_of(text) == found for ids_of in own):
        return
    expected = own[0](text)
    pairs = enumerate(zip(expected, found, strict=False))
    at = next((place for place, (one, other) in pairs if one != other), min(len(expected), len(found)))
    raise ModelError(
        f"{where}, {text!r} would have other token ids: from token {at} on expected {_shown(expected[at:])}, "
        f"got {_shown(found[at:])}",
        hint=hint,
    )


def _shown(ids: list[int]) -> str:
    return f"[{', '.join(map(str, ids[:SHOWN]))}{', ...' if len(ids) > SHOWN else ''}]"


class _LlamaVocabulary:
    """A context in which llama.cpp has loaded the keys of a file; gives text -> ids, None where it is not installed."""

    def __init__(self, values: Mapping[str, Any], general: Mapping[str, Any], path: Path):
        self.values, self.general, self.path = values, general, path
        self._model: Any = None
        self._call: Any = None

    def __enter__(self) -> Callable[[str], list[int]] | None:
        from quantkit.engines.llama_api import VERSION, installed, library

        if installed() != VERSION:
            return None
        library_ = library()
        self._call = library_.call
        params = self._call.llama_model_default_params()
        params.vocab_only = True
        params.use_extra_bufts = False
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "vocabulary.gguf"
            write_keys(file, self.values, self.general)
            library_.errors.clear()
            self._model = self._call.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            reason = "; ".join(library_.errors) or library_.why()
            library_.errors.clear()
            raise ModelError(
                f"{self.path}: llama.cpp refuses the tokenizer: {reason}",
                hint="llama.cpp expects some tokens by the model's name: a folder called phi-3 must hold </s>",
            )
        i32 = ctypes.c_int32
        tokenize = self._call.llama_tokenize
        tokenize.restype = i32
        tokenize.argtypes = [ctypes.c_void_p, ctypes.c_char_p, i32, ctypes.c_void_p, i32, ctypes.c_bool, ctypes.c_bool]
        vocabulary = self._call.llama_model_get_vocab(self._model)

        def ids_of(text: str) -> list[int]:
            data = text.encode()
            ids = (i32 * (len(data) + 16))()  # a byte is a token at worst, and a few stand around a text
            count = tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
            assert count >= 0, "the buffer is large enough"
            return list(ids[:count])

        return ids_of

    def __exit__(self, *_: object) -> None:
        if self._model:
            self._call.llama_model_free(self._model)


def write_keys(file: Path, values: Mapping[str, Any], general: Mapping[str, Any]) -> None:
    """A GGUF file with a tokenizer and no tensors."""
    import gguf

    writer = gguf.GGUFWriter(file, general.get("general.architecture", "llama"))
    for key in ("general.name",):
        if key in general:
            put(writer, key, general[key])
    for key, value in values.items():
        put(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def put(writer: Any, key: str, value: Any) -> None:
    """Enter a value in a gguf.GGUFWriter as the type GGUF has for it: bool, uint32, float32, string, array."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
