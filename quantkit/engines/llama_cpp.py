"""llama.cpp: GGUF artifacts, through the shared library of the xllamacpp wheel."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.engines.base import ROOM, Engine, Session
from quantkit.engines.llama_api import VERSION, Batch, installed, library
from quantkit.errors import ModelError

LOAD_MODE_NONE = 0
"""Weights are read into memory, not mapped: resident memory then does not depend on which pages were touched."""

UBATCH = 512
"""Tokens computed together, llama.cpp's own default."""


def repacks(system_info: bytes) -> bool:
    """Whether weights may be repacked at load, which is llama.cpp's default: not in a build that computes with AMX.

    system_info: what `llama_print_system_info` says, such as b"CPU : AVX2 = 1 | AMX_INT8 = 1 | ". Builds for AMX
    crash while repacking for it; they alone run such code, on whatever processor, and no other build names it.
    """
    return b"AMX" not in system_info


class LlamaSession(Session):
    """A GGUF file in llama.cpp on the CPU.

    threads: of both prompt and decode, those of torch in this process, so that engines are compared alike. details
    tells them, and whether weights were repacked for the processor; where not, why not.
    """

    engine = "llama.cpp"
    dtype = "8-bit blocks"  # ggml rounds the activations of each product with quantized weights

    def __init__(self, path: Path, threads: int):
        self._lib = library()
        self.threads = threads
        params = self._lib.call.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODE_NONE
        params.use_extra_bufts = repacks(self._lib.call.llama_print_system_info())
        self.details = {"threads": threads, "repacking": True if params.use_extra_bufts else "off: crashes with AMX"}
        self._model = self._lib.call.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ModelError(f"{path}: llama.cpp refuses it: {self._lib.why()}")
        self._path = path
        self._vocabulary = self._lib.call.llama_vocab_n_tokens(self._lib.call.llama_model_get_vocab(self._model))
        self._context: Any = None
        self._room = (0, 0, 0)  # sequences, tokens each, logits a step
        self._batch = 0
        self._length = 0

    def logits(self, ids: Tensor, last: int | None = None) -> Tensor:
        count = ids.numel()
        first = count - (last or count)
        self._open(1, count, UBATCH)
        out = torch.empty(count - first, self._vocabulary)
        # a step holds the logits of its own tokens only, however long the sequence
        for start in range(0, count, UBATCH):
            positions = range(start, min(start + UBATCH, count))
            wanted = [position >= first for position in positions]
            self._run(ids[start : positions.stop].tolist(), positions, [0] * len(positions), wanted)
            if kept := sum(wanted):
                end = positions.stop - first
                out[end - kept : end] = self._rows(kept)
        return out

    def prefill(self, ids: Tensor, room: int = ROOM) -> Tensor:
        batch, length = ids.shape
        self._open(batch, length + room, batch)
        self._batch, self._length = batch, length
        positions = [position for _ in range(batch) for position in range(length)]
        sequences = [sequence for sequence in range(batch) for _ in range(length)]
        wanted = [position == length - 1 for position in positions]
        self._run(ids.flatten().tolist(), positions, sequences, wanted)
        return torch.stack([self._row(length * (row + 1) - 1).argmax() for row in range(batch)])

    def decode(self, tokens: Tensor) -> Tensor:
        assert tokens.numel() == self._batch, "prefill comes before decode"
        batch = self._batch
        self._run(tokens.tolist(), [self._length] * batch, list(range(batch)), [True] * batch)
        self._length += 1
        return torch.stack([self._row(row).argmax() for row in range(batch)])

    def _open(self, batch: int, length: int, outputs: int) -> None:
        """An empty cache for `batch` sequences of `length` tokens; an old one is reused if it fits.

        outputs: tokens of one step whose logits are kept, which is what the buffer for them is made for.
        """
        each = -(-length // 256) * 256  # llama.cpp looks at 256 places of the cache at a time
        if self._context is None or self._room[::2] != (batch, outputs) or self._room[1] < each:
            self._free()
            params = self._lib.call.llama_context_default_params()
            params.n_ctx = batch * each
            params.n_batch = batch * each
            params.n_ubatch = UBATCH
            params.n_seq_max = batch
            params.n_outputs_max = outputs
            params.n_outputs_max_per_seq = outputs // batch
            params.n_threads = params.n_threads_batch = self.threads
            self._context = self._lib.call.llama_init_from_model(self._model, params)
            if not self._context:
                raise ModelError(f"{self._path}: llama.cpp makes no context of {batch} x {each}: {self._lib.why()}")
            self._room = (batch, each, outputs)
        self._lib.call.llama_memory_clear(self._lib.call.llama_get_memory(self._context), True)

    def _run(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int], wanted: Sequence[bool]
    ) -> None:
        """Compute tokens at positions of sequences; logits are kept where `wanted`."""
        count = len(tokens)
        ids = (ctypes.c_int32 * count)(*tokens)
        pos = (ctypes.c_int32 * count)(*positions)
        ones = (ctypes.c_int32 * count)(*([1] * count))
        owners = [(ctypes.c_int32 * 1)(sequence) for sequence in sequences]
        pointers = (ctypes.POINTER(ctypes.c_int32) * count)(
            *(ctypes.cast(owner, ctypes.POINTER(ctypes.c_int32)) for owner in owners)
        )
        keep = (ctypes.c_int8 * count)(*wanted)
        code = self._lib.call.llama_decode(self._context, Batch(count, ids, None, pos, ones, pointers, keep))
        if code:
            raise ModelError(f"{self._path}: llama.cpp fails with code {code} on {count} tokens: {self._lib.why()}")
        self._lib.call.llama_synchronize(self._context)

    def _row(self, index: int) -> Tensor:
        """A copy of the logits of the token at `index` of the last batch: float32 [vocabulary]."""
        pointer = self._lib.call.llama_get_logits_ith(self._context, index)
        assert pointer, "asked for in the batch"
        row = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * self._vocabulary)).contents
        return torch.frombuffer(row, dtype=torch.float32).clone()

    def _rows(self, count: int) -> Tensor:
        """The logits that the last step kept, of one sequence: float32 [count, vocabulary], until the next step."""
        pointer = self._lib.call.llama_get_logits(self._context)
        size = count * self._vocabulary
        values = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * size)).contents
        return torch.frombuffer(values, dtype=torch.float32).view(count, self._vocabulary)

    def _free(self) -> None:
        if self._context is not None:
            self._lib.call.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        self._free()
        if self._model is not None:
            self._lib.call.llama_model_free(self._model)
            self._model = None


class LlamaCpp(Engine):
    """llama.cpp as the prebuilt xllamacpp wheel carries it."""

    name = "llama.cpp"

    def available(self) -> str | None:
        found = installed()
        if found is None:
            return f"pip install xllamacpp=={VERSION}"
        return None if found == VERSION else f"pip install xllamacpp=={VERSION} (found {found})"

    def prepare(self) -> None:
        library()

    def load(self, path: Path, device: torch.device, dtype: torch.dtype) -> Session:
        if path.is_dir():
            files = [item for item in path.iterdir() if item.suffix == ".gguf"]
            if len(files) != 1:
                raise ModelError(f"{path}: {len(files)} .gguf files, expected one")
            path = files[0]
        return LlamaSession(path, torch.get_num_threads())
