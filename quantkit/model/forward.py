"""Running a model one block at a time: only the block at hand has weights, whatever the depth of the model.

The transformers model is built on the meta device from its config. A trial run in which every block is replaced by a
recorder tells what each block is called with (masks, rotary tables), so no architecture needs code of its own here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.arena import converted
from quantkit.device import Arithmetic
from quantkit.errors import ModelError
from quantkit.maths.compiled import ready_loops
from quantkit.maths.gram import Accumulator, GramAccumulator, InputStatistics, Look, SquaresAccumulator
from quantkit.memory import FreedMemory
from quantkit.model.blocks import Block, LinearGroup, architecture_of, blocks_of, group_shape
from quantkit.model.eight_bit import EightBitLinear, use_eight_bits
from quantkit.model.gates import use_compiled_gates
from quantkit.model.hidden import HiddenStates
from quantkit.model.load import without_weights
from quantkit.model.norms import use_compiled_norms
from quantkit.model.rotary import use_compiled_rotation
from quantkit.model.source import Source
from quantkit.model.watching import watched
from quantkit.tensors import GroupTensor

BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}
"""Tokens that go through a block at once: enough rows for a matrix product to run at full rate, few enough that what
lies between a block's linears stays small beside the hidden states."""


def batch_sequences(device: str, length: int) -> int:
    """How many sequences of so many tokens go through a block at once. device: "cpu" or "cuda"."""
    return max(1, BATCH_TOKENS[device] // length)


def between_linears(device: str, length: int, hidden: int, rows: int, linear_bytes: int) -> int:
    """Bytes that lie between the linears of a batch that runs. length: of a sequence. hidden: columns of the states,
    which count as float32. rows: of the largest group of linears. linear_bytes: of a value in what these multiply."""
    return max(BATCH_TOKENS[device], length) * (4 * 4 * hidden + 2 * rows * linear_bytes)


PART_TOKENS = 2048
"""Tokens that a part of them is: enough for a group's own block of the Gram matrix, which has few columns."""


def tokens_apart(look: Look, tokens: int) -> int:
    """Of how many tokens one goes into a Gram matrix."""
    return 1 if look is Look.WHOLE else max(1, tokens // PART_TOKENS)


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and passes the hidden states on."""

    def __init__(self) -> None:
        super().__init__()
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.args, self.kwargs = args, kwargs
        return hidden


class _EnoughError(Exception):
    """Raised inside a block once the last input that is wanted has been seen."""


class BlockRunner:
    """Runs the blocks of one model on hidden states, block by block, in the given arithmetic.

    freed: by which memory that batches and rounding leave goes back before much is asked for.
    """

    def __init__(self, source: Source, device: torch.device, arithmetic: Arithmetic, freed: FreedMemory | None = None):
        self.source, self.device, self.arithmetic = source, device, arithmetic
        self.freed = FreedMemory() if freed is None else freed
        self.dtype = arithmetic.states
        self.architecture = architecture_of(source.config)
        if arithmetic.compiled_on(device):
            ready_loops()  # before there is a model
        self.model = without_weights(source, self.dtype)
        self.model.config.use_cache = False
        if arithmetic.compiled_on(device):
            from quantkit.model.attention import use_causal_attention

            use_causal_attention(self.model)
            use_compiled_norms(self.model.modules())
            use_compiled_gates(self.model.modules())
            use_compiled_rotation(self.model.modules())
        self.model.eval()
        self.trunk = self.model.get_submodule(self.architecture.trunk)
        self.layers: nn.ModuleList = self.model.get_submodule(self.architecture.layers)  # type: ignore[assignment]
        if arithmetic.eight_bit_linears:
            # not a router, whose choices small errors would turn
            for group in chain.from_iterable(block.groups for block in blocks_of(source)):
                modules = map(self.model.get_submodule, group.linears)
                use_eight_bits(modules, wide=group.added_to is not None)
        self._arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def embed(self, ids: Tensor, spill: Path | None = None) -> HiddenStates:
        """Hidden states before the first block, [sequences, length, hidden], for ids int64 [sequences, length].

        Also learns what every block is called with at this length. Sequences are full, so no padding mask is needed.
        Only the rows of the embedding that the ids name are taken. spill: where the states lie when not in memory.
        """
        recorders = [_Recorder() for _ in self.layers]
        blocks = list(self.layers)
        embedding = self.trunk.get_submodule(self.architecture.embedding.removeprefix(f"{self.architecture.trunk}."))
        norm_name = self.architecture.final_norm.removeprefix(f"{self.architecture.trunk}.")
        norm = self.trunk.get_submodule(norm_name)
        meta = embedding.weight
        self._load_positions()
        used, places = ids.unique(return_inverse=True)
        table = self.source.read_rows(f"{self.architecture.embedding}.weight", used)
        together = batch_sequences(self.device.type, ids.shape[1])
        hidden = HiddenStates((*ids.shape, table.shape[1]), self.dtype, spill, together)
        try:
            # in the dtype of the states, which is then that of rotary tables and of Gemma's factor, whatever is stored
            embedding.weight = nn.Parameter(table.to(self.device, self.dtype), requires_grad=False)
            setattr(self.trunk, norm_name, nn.Identity())
            for position, recorder in enumerate(recorders):
                self.layers[position] = recorder
            with torch.inference_mode():
                for rows in self.batches(hidden):
                    output = self.trunk(input_ids=places[rows].to(self.device), use_cache=False)
                    hidden[rows] = output.last_hidden_state.to(self.dtype).cpu()
        finally:
            for position, block in enumerate(blocks):
                self.layers[position] = block
            setattr(self.trunk, norm_name, norm)
            embedding.weight = meta
        self._arguments = [
            (_for_any_batch(recorder.args), {key: _for_any_batch(value) for key, value in recorder.kwargs.items()})
            for recorder in recorders
        ]
        return hidden

    def _load_positions(self) -> None:
        """Give learned positions, which stand beside the embedding, their weights; they stay."""
        name = self.architecture.positions
        if name is not None:
            values = self.source.read(f"{name}.weight").to(self.device, self.dtype)
            self.model.get_submodule(name).weight = nn.Parameter(values, requires_grad=False)

    @contextmanager
    def loaded(self, block: Block, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
        """The module of a block with real weights: `tensors` by full name; the meta tensors are put back at the end."""
        module = self.layers[block.index]
        empty = dict(module.named_parameters())
        try:
            self.assign(module, block, tensors)
            yield module
        finally:
            module.to_empty(device="meta")
            # the very ones, which lie together: new ones would lie scattered, each of them holding a page of the heap
            module.load_state_dict(empty, strict=False, assign=True)

    def assign(self, module: nn.Module, block: Block, tensors: Mapping[str, Tensor]) -> None:
        """Give a block's module other weights: `tensors` by full name. Raises ModelError when one has a shape that the
        config does not ask for."""
        linears = {f"{linear}.weight" for linear in block.linears}

        def dtype(name: str, tensor: Tensor) -> torch.dtype:
            if name not in linears:
                return self.dtype
            owner = module.get_submodule(name.removeprefix(block.prefix).removesuffix(".weight"))
            # not a whole block of them, only to be coded and let go one by one
            as_stored = isinstance(owner, EightBitLinear) and tensor.dtype in (torch.bfloat16, torch.float16)
            return tensor.dtype if as_stored else self.arithmetic.linears

        state = {
            name.removeprefix(block.prefix): converted(tensor, self.device, dtype(name, tensor))
            for name, tensor in tensors.items()
        }
        for name, wanted in module.state_dict().items():
            if name in state and state[name].shape != wanted.shape:
                raise ModelError(
                    f"{self.source.path}: {block.prefix}{name}: shape {list(state[name].shape)}, "
                    f"expected {list(wanted.shape)} by config.json",
                    hint="config.json belongs to another model, or was changed",
                )
        module.load_state_dict(state, strict=False, assign=True)

    @property
    def by_codes(self) -> bool:
        """Whether linears that were rounded can multiply by their codes."""
        return self.arithmetic.four_bit_linears and not self.architecture.transposed

    def assign_rounded(self, module: nn.Module, block: Block, rounded: Mapping[str, Tensor | GroupTensor]) -> None:
        """Give linears of a block's module what they were rounded to, by full name: weights [out, in], or codes for
        those that multiply by them."""
        weights: dict[str, Tensor] = {}
        for linear, tensor in rounded.items():
            owner = module.get_submodule(linear.removeprefix(block.prefix))
            if isinstance(tensor, Tensor):
                weights[f"{linear}.weight"] = block.oriented(tensor)
            elif isinstance(owner, EightBitLinear):
                owner.take(tensor)
            else:
                weights[f"{linear}.weight"] = block.oriented(tensor.dequantize())
        if weights:
            self.assign(module, block, weights)

    def release(self, module: nn.Module, block: Block, linears: Iterable[str]) -> None:
        """Let go of the weights of some linears of a block's module, by full name. They cannot run until others are
        assigned."""
        for linear in linears:
            owner = module.get_submodule(linear.removeprefix(block.prefix))
            bias = owner.bias
            owner.to_empty(device="meta", recurse=False).bias = bias

    def expect(self, size: int) -> None:
        """Have freed memory go back, if it is time to, before so many bytes are asked for where the blocks run."""
        if self.device.type == "cpu":
            self.freed.give_back(size)

    def statistics(
        self,
        module: nn.Module,
        block: Block,
        hidden: HiddenStates,
        *,
        advance: bool,
        looks: Collection[Look] = (Look.WHOLE,),
    ) -> dict[Look, dict[str, InputStatistics]]:
        """Statistics of every linear's inputs in one pass, {look: {linear module name: statistics}}; linears that share
        an input share them.

        advance: also write the block's outputs over `hidden`; else the run ends where the last input has been seen.
        """
        shapes = [group_shape(self.source, group) for group in block.groups]
        grams = 0 if set(looks) == {Look.SQUARES} else sum(4 * columns**2 for _, columns in shapes)
        _, length, width = hidden.shape
        widest, value = max(rows for rows, _ in shapes), self.arithmetic.linears.itemsize
        self.expect(grams + between_linears(self.device.type, length, width, widest, value))
        seen = [{look: self.accumulator(group, look, hidden) for look in looks} for group in block.groups]
        last, ends = len(block.groups) - 1, False

        def watch(position: int) -> Callable[[Tensor], None]:
            def see(inputs: Tensor) -> None:
                for accumulator in seen[position].values():
                    accumulator.add(inputs)
                    if ends:
                        accumulator.settle()
                if position == last and not advance:
                    raise _EnoughError

            return see

        with ExitStack() as hooks:
            for position, group in enumerate(block.groups):
                hooks.enter_context(watched(module, block, group, watch(position)))
            for rows in self.batches(hidden):
                ends = rows.stop >= hidden.shape[0]
                try:
                    hidden[rows] = self.call(module, block, hidden[rows])
                except _EnoughError:
                    continue
        self.expect(grams)  # what the last batch left would lie beside the matrices
        found: dict[Look, dict[str, InputStatistics]] = {look: {} for look in looks}
        for group, accumulators in zip(block.groups, seen, strict=True):
            for look, accumulator in accumulators.items():
                found[look].update(dict.fromkeys(group.linears, accumulator.result()))
        self.expect(grams)
        return found

    def twin(self, block: Block, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A module of a block beside the one in the model, with weights of its own: `tensors` by full name."""
        layer = self.layers[block.index]
        # its weights are not copied, only to be let go
        empty = {id(own): nn.Parameter(own.to("meta"), requires_grad=False) for own in layer.parameters()}
        module = copy.deepcopy(layer, empty).to_empty(device="meta")
        self.assign(module, block, tensors)
        return module

    def accumulator(self, group: LinearGroup, look: Look, hidden: HiddenStates) -> Accumulator:
        columns = group_shape(self.source, group)[1]
        if look is Look.SQUARES:
            return SquaresAccumulator(columns, self.device)
        every = tokens_apart(look, hidden.shape[0] * hidden.shape[1])
        return GramAccumulator(columns, self.device, eight_bit=self.arithmetic.eight_bit_gram, every=every)

    def batches(self, hidden: HiddenStates) -> Iterator[slice]:
        """Sequences that go through a block at once, which lie together."""
        for start in range(0, hidden.shape[0], hidden.together):
            yield slice(start, start + hidden.together)

    def arguments(self, block: Block) -> tuple[Any, ...]:
        """What a block is called with beside its inputs, by position and by name; the same for all rows."""
        return self._arguments[block.index]

    def call(self, module: nn.Module, block: Block, rows: Tensor) -> Tensor:
        """A block's outputs on the CPU for a batch of its inputs."""
        args, kwargs = self._arguments[block.index]
        rows = rows.to(self.device)  # the host's are not held while the block runs
        with torch.inference_mode(), self._mixed():
            output = module(rows, *args, **kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result.cpu()

    def _mixed(self) -> torch.autocast:
        """Linears and attention in their own dtype, all else in that of the hidden states."""
        mixed = self.arithmetic.linears != self.dtype
        return torch.autocast(self.device.type, dtype=self.arithmetic.linears, enabled=mixed)


def _for_any_batch(value: Any) -> Any:
    """A keyword of a block, cut to one sequence so that it broadcasts over any number of them."""
    if isinstance(value, Tensor) and value.dim() >= 2:
        return value[:1]
    if isinstance(value, tuple):
        return tuple(_for_any_batch(item) for item in value)
    return value
