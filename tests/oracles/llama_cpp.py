"""llama.cpp itself, where the xllamacpp wheel is installed: its encoder, tokenizer and logits, through ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantkit.engines.llama_api import Batch, ContextParams, ModelParams


@cache
def library() -> Any:
    """The shared library, quiet and initialized; skips the test where it is not installed."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed, so llama.cpp cannot be asked")
    lib = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, pointer, pointer, i64, i64, i64, pointer]),
        "llama_model_default_params": (ModelParams, []),
        "llama_context_default_params": (ContextParams, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, ModelParams]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_model_free": (None, [pointer]),
        "llama_tokenize": (i32, [pointer, ctypes.c_char_p, i32, pointer, i32, ctypes.c_bool, ctypes.c_bool]),
        "llama_vocab_n_tokens": (i32, [pointer]),
        "llama_init_from_model": (pointer, [pointer, ContextParams]),
        "llama_free": (None, [pointer]),
        "llama_decode": (i32, [pointer, Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_log_set": (None, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.said = []
    heard = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    lib.heard = heard(lambda level, text, _: lib.said.append(text) if level == 4 else None)  # GGML_LOG_LEVEL_ERROR
    lib.llama_log_set(ctypes.cast(lib.heard, ctypes.c_void_p), None)
    lib.llama_backend_init()
    return lib


def quantize(
    weight: np.ndarray[Any, Any],
    type_number: int,
    row_bytes: int,
    importance: np.ndarray[Any, Any] | None = None,
) -> np.ndarray[Any, Any]:
    """ggml_quantize_chunk: float32 [rows, columns] to uint8 [rows, row_bytes]; importance: float32 [columns]."""
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    out = np.zeros((weight.shape[0], row_bytes), dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(type_number, weight.ctypes.data, out.ctypes.data, 0, *weight.shape, weights)
    assert written == out.size
    return out


class Model:
    """A GGUF file that llama.cpp has loaded."""

    def __init__(self, path: Path, *, vocab_only: bool = False):
        self.lib = library()
        params = self.lib.llama_model_default_params()
        params.vocab_only = vocab_only
        params.use_extra_bufts = False  # weights are not repacked at load, which crashes on some processors
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"llama.cpp does not load {path}: {self.lib.said[-3:]}"
        self.vocab = self.lib.llama_model_get_vocab(self.model)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Token ids with the tokens that the file adds around a text; special tokens in the text are recognized."""
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 16))()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(ids), True, True)
        assert count >= 0
        return list(ids[:count])

    def last_logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits after the last token: float32 [vocabulary]."""
        return self.logits(ids)[-1]

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Logits after every token: float32 [tokens, vocabulary]."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = -(-len(ids) // 256) * 256
        params.n_outputs_max = params.n_outputs_max_per_seq = params.n_ctx
        context = self.lib.llama_init_from_model(self.model, params)
        assert context
        count, i32 = len(ids), ctypes.c_int32
        owner = (i32 * 1)(0)
        owners = (ctypes.POINTER(i32) * count)(*[ctypes.cast(owner, ctypes.POINTER(i32))] * count)
        batch = Batch(
            count,
            (i32 * count)(*ids),
            None,
            (i32 * count)(*range(count)),
            (i32 * count)(*[1] * count),
            owners,
            (ctypes.c_int8 * count)(*[1] * count),
        )
        try:
            assert self.lib.llama_decode(context, batch) == 0
            shape = (count, self.lib.llama_vocab_n_tokens(self.vocab))
            return np.ctypeslib.as_array(self.lib.llama_get_logits(context), shape).copy()
        finally:
            self.lib.llama_free(context)
