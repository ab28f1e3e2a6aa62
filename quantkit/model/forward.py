"""Running a model one block at a time: only the block at hand has weights, whatever the depth of the model.

The transformers model is built on the meta device from its config. A trial run in which every block is replaced by a
recorder tells what each block is called with (masks, rotary tables), so no architecture needs code of its own here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.maths.gram import GramAccumulator, InputStatistics
from quantkit.model.blocks import Block, architecture_of
from quantkit.model.source import Source

BATCH_TOKENS = 4096
"""Tokens that go through a block at once: enough rows for a matrix product to run at full rate."""


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "transformers calls blocks with keywords"
        self.kwargs = kwargs
        return hidden


class _EnoughError(Exception):
    """Raised inside a block once the last input that is wanted has been seen."""


class BlockRunner:
    """Runs the blocks of one model on hidden states, block by block.

    dtype: of the weights and hidden states while running; float32 on a CPU without half-precision units.
    """

    def __init__(self, source: Source, device: torch.device, dtype: torch.dtype):
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source, self.device, self.dtype = source, device, dtype
        self.architecture = architecture_of(source.config)
        settings = {key: value for key, value in source.config.items() if key != "model_type"}
        config = AutoConfig.for_model(source.config["model_type"], **settings)
        config.use_cache = False
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        self.model.eval()
        self.trunk = self.model.get_submodule(self.architecture.trunk)
        self.layers: nn.ModuleList = self.model.get_submodule(self.architecture.layers)  # type: ignore[assignment]
        self._kwargs: list[dict[str, Any]] = []

    def embed(self, ids: Tensor) -> Tensor:
        """Hidden states before the first block: [sequences, length, hidden] on the CPU, for ids int64 [sequences,
        length].

        Also learns what every block is called with at this length. Sequences are full, so no padding mask is needed.
        """
        recorders = [_Recorder() for _ in self.layers]
        blocks = list(self.layers)
        embedding = self.trunk.get_submodule(self.architecture.embedding.removeprefix(f"{self.architecture.trunk}."))
        norm_name = self.architecture.final_norm.removeprefix(f"{self.architecture.trunk}.")
        norm = self.trunk.get_submodule(norm_name)
        meta = embedding.weight
        table = self.source.read(f"{self.architecture.embedding}.weight")
        try:
            embedding.weight = nn.Parameter(table.to(self.device), requires_grad=False)
            setattr(self.trunk, norm_name, nn.Identity())
            for position, recorder in enumerate(recorders):
                self.layers[position] = recorder
            hidden = []
            with torch.inference_mode():
                for rows in ids.split(self._rows(ids)):
                    output = self.trunk(input_ids=rows.to(self.device), use_cache=False)
                    hidden.append(output.last_hidden_state.to(self.dtype).cpu())
        finally:
            for position, block in enumerate(blocks):
                self.layers[position] = block
            setattr(self.trunk, norm_name, norm)
            embedding.weight = meta
        self._kwargs = [
            {key: _for_any_batch(value) for key, value in recorder.kwargs.items()} for recorder in recorders
        ]
        return torch.cat(hidden)

    def _rows(self, ids_or_hidden: Tensor) -> int:
        return max(1, BATCH_TOKENS // ids_or_hidden.shape[1])

    @contextmanager
    def loaded(self, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module of a block with real weights: `tensors` by full name; the meta tensors are put back at the end."""
        module = self.layers[block.index]
        try:
            self.assign(module, block, tensors)
            yield module
        finally:
            module.to_empty(device="meta")

    def assign(self, module: nn.Module, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give a block's module other weights: `tensors` by full name."""
        state = {
            name.removeprefix(block.prefix): tensor.to(self.device, self.dtype) for name, tensor in tensors.items()
        }
        module.load_state_dict(state, strict=False, assign=True)

    def forward(self, module: nn.Module, block: Block, hidden: Tensor) -> Tensor:
        """The block's outputs [sequences, length, hidden]; written over `hidden`, which is returned."""
        for rows in self._batches(hidden):
            hidden[rows] = self._call(module, block, hidden[rows]).to(hidden.device)
        return hidden

    def statistics(
        self, module: nn.Module, block: Block, hidden: Tensor, *, advance: bool
    ) -> dict[str, InputStatistics]:
        """Statistics of every linear's inputs, {linear module name: statistics}; those that share an input share them.

        advance: also write the block's outputs over `hidden`; else the run ends where the last input has been seen.
        """
        accumulators: list[GramAccumulator | None] = [None] * len(block.groups)
        handles = []
        last = len(block.groups) - 1

        def watch(position: int) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                accumulator = accumulators[position]
                if accumulator is None:
                    accumulator = GramAccumulator(inputs[0].shape[-1], inputs[0].device)
                    accumulators[position] = accumulator
                accumulator.add(inputs[0])
                if position == last and not advance:
                    raise _EnoughError

            return hook

        for position, group in enumerate(block.groups):
            reader = module.get_submodule(group.linears[0].removeprefix(block.prefix))
            handles.append(reader.register_forward_pre_hook(watch(position)))
        try:
            for rows in self._batches(hidden):
                try:
                    output = self._call(module, block, hidden[rows])
                except _EnoughError:
                    continue
                hidden[rows] = output.to(hidden.device)
        finally:
            for handle in handles:
                handle.remove()
        found: dict[str, InputStatistics] = {}
        for group, accumulator in zip(block.groups, accumulators, strict=True):
            assert accumulator is not None, f"{group.linears[0]} was never called"
            result = accumulator.result()
            found.update(dict.fromkeys(group.linears, result))
        return found

    def _batches(self, hidden: Tensor) -> Iterator[slice]:
        size = self._rows(hidden)
        for start in range(0, hidden.shape[0], size):
            yield slice(start, start + size)

    def _call(self, module: nn.Module, block: Block, rows: Tensor) -> Tensor:
        with torch.inference_mode():
            output = module(rows.to(self.device), **self._kwargs[block.index])
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def _for_any_batch(value: Any) -> Any:
    """A keyword of a block, cut to one sequence so that it broadcasts over any number of them."""
    if isinstance(value, Tensor) and value.dim() >= 2:
        return value[:1]
    if isinstance(value, tuple):
        return tuple(_for_any_batch(item) for item in value)
    return value
