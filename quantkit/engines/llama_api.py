"""llama.cpp's C interface in the shared library of the xllamacpp wheel, for exactly one version of it.

The structs are passed by value, so a version with other fields would read garbage: the version is pinned, and the
default values that the library returns are held against the known ones before anything else is called.
Source: llama.cpp, include/llama.h, of the build that xllamacpp 2026.10.11549 carries.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import MissingDependencyError

VERSION = "2026.10.11549"

Structure = ctypes.Structure


class ModelParams(Structure):
    _fields_ = [
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParams(Structure):
    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("callbacks_and_types", c_void_p * 6),  # nothing that is set here; the cache's types are among them
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(Structure):
    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


F16 = 1 | 1 << 32
"""Two neighbouring enums, the types of the K and V caches, both GGML_TYPE_F16, as one word."""

MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}
CONTEXT_DEFAULTS = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "yarn_ext_factor": -1.0,
    "yarn_attn_factor": -1.0,
    "yarn_beta_fast": -1.0,
    "yarn_beta_slow": -1.0,
    "defrag_thold": -1.0,
    "callbacks_and_types": [None, None, F16, None, None, None],
    "offload_kqv": True,
    "no_perf": True,
    "op_offload": True,
    "swa_full": True,
}
"""What the pinned version returns; every field that is not named is zero."""

MODEL, CONTEXT, MEMORY, VOCAB = c_void_p, c_void_p, c_void_p, c_void_p
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (MODEL, [c_char_p, ModelParams]),
    "llama_model_free": (None, [MODEL]),
    "llama_model_get_vocab": (VOCAB, [MODEL]),
    "llama_vocab_n_tokens": (c_int32, [VOCAB]),
    "llama_init_from_model": (CONTEXT, [MODEL, ContextParams]),
    "llama_free": (None, [CONTEXT]),
    "llama_get_memory": (MEMORY, [CONTEXT]),
    "llama_memory_clear": (None, [MEMORY, c_bool]),
    "llama_decode": (c_int32, [CONTEXT, Batch]),
    "llama_get_logits": (POINTER(c_float), [CONTEXT]),
    "llama_get_logits_ith": (POINTER(c_float), [CONTEXT, c_int32]),
    "llama_synchronize": (None, [CONTEXT]),
    "llama_print_system_info": (c_char_p, []),
}

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)


class Library:
    """The loaded library. errors: the messages of level error and above since the last `clear`."""

    def __init__(self, path: Path):
        self.call = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(self.call, name)
            function.restype, function.argtypes = result, arguments
        self.errors: list[str] = []
        self._log = _LOG(self._heard)  # kept, because the library calls it as long as it is loaded
        self.call.llama_log_set(ctypes.cast(self._log, c_void_p), None)
        self.call.llama_backend_init()

    def _heard(self, level: int, text: bytes | None, _data: Any) -> None:
        if level == 4 and text:  # GGML_LOG_LEVEL_ERROR
            self.errors.append(text.decode(errors="replace").strip())

    def why(self) -> str:
        """The last error that the library logged, and forget it."""
        text = self.errors[-1] if self.errors else "it gave no reason"
        self.errors.clear()
        return text


def installed() -> str | None:
    """The version of the xllamacpp package, None when it is not installed."""
    try:
        return version("xllamacpp")
    except PackageNotFoundError:
        return None


@cache
def library() -> Library:
    """The library, its layout checked. Raises MissingDependencyError when it is absent or another version."""
    hint = f"pip install xllamacpp=={VERSION}"
    found = installed()
    if found != VERSION:
        raise MissingDependencyError(f"llama.cpp: xllamacpp {VERSION} is needed, found {found or 'none'}", hint=hint)
    spec = find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None, "installed, as its metadata say"
    files = [*Path(spec.origin).parent.glob("xllamacpp*.so"), *Path(spec.origin).parent.glob("xllamacpp*.pyd")]
    if not files:
        raise MissingDependencyError("llama.cpp: xllamacpp has no shared library", hint=hint)
    try:
        loaded = Library(files[0])
    except (OSError, AttributeError) as error:
        raise MissingDependencyError(f"llama.cpp: {files[0].name} cannot be used: {error}", hint=hint) from error
    for made, known in (
        (loaded.call.llama_model_default_params(), MODEL_DEFAULTS),
        (loaded.call.llama_context_default_params(), CONTEXT_DEFAULTS),
    ):
        differing = differences(made, known)
        if differing:
            raise MissingDependencyError(f"llama.cpp: {files[0].name} has another layout: {differing[0]}", hint=hint)
    return loaded


def differences(made: Structure, known: dict[str, Any]) -> list[str]:
    """Every field of a struct of defaults that is not what the pinned version returns."""
    found = []
    for name, *_ in made._fields_:
        value = getattr(made, name)
        value = list(value) if isinstance(value, ctypes.Array) else value
        expected = known.get(name)
        if value != expected and not (expected is None and not value):
            found.append(f"{type(made).__name__}.{name} is {value}, expected {expected or 0}")
    return found
