"""A transformers model from any Source: built without weights, then filled tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from quantkit.errors import ModelError
from quantkit.model.blocks import architecture_of, is_buffer
from quantkit.model.source import Source
from quantkit.quiet import collecting_later, loading_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHOWN = 4
"""Names that a message lists before it only counts."""


def load_transformers(source: Source, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model of a folder, a GGUF file or a decoded artifact, ready to run, with weights of `dtype` on `device`.

    At no time is more than one tensor in memory twice. Raises ModelError naming every tensor that the architecture
    needs and the source lacks, that it does not know, or whose shape is another.
    """
    model = without_weights(source, dtype)
    wanted = dict(model.named_parameters())
    head = f"{architecture_of(source.config).head}.weight"
    if source.tied_head:
        wanted.pop(head, None)
    stored = [name for name in source.names() if not (name == head and source.tied_head)]
    _check(source, model, wanted, stored)
    for name in stored:
        if name in wanted:
            value = source.read(name).to(device=device, dtype=dtype)
            _put(model, name, nn.Parameter(value, requires_grad=False))
    if source.tied_head:
        output = model.get_output_embeddings()
        assert output is not None, "a causal language model has a head"
        output.weight = model.get_input_embeddings().weight  # type: ignore[assignment]
    for name, buffer in list(model.named_buffers()):
        _put(model, name, buffer.to(device))
    return model.eval()


def expected_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shape of every weight that a model with this config stores; a tied head is not among them.

    Raises ModelError when transformers cannot build the model.
    """
    model = without_weights(source, torch.float16)
    head = f"{architecture_of(source.config).head}.weight"
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if source.tied_head:
        shapes.pop(head, None)
    return shapes


def without_weights(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters on the meta device and its buffers, such as rotary frequencies, computed.

    Raises ModelError when transformers cannot build it.
    """
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    try:
        return built({**config, "tie_word_embeddings": source.tied_head}, dtype)
    except MemoryError:
        raise
    except Exception as error:  # what the library raises for odd settings is of any kind
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(
            f"{source.path}: config.json: transformers cannot build the model: {said}",
            hint="the file is damaged, or belongs to no model of this kind",
        ) from error


def built(config: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """What transformers builds from a config.json, on the meta device but for its buffers. Raises what it raises."""
    with loading_modules():
        from accelerate import init_empty_weights
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        settings = {key: value for key, value in config.items() if key != "model_type"}
        known = AutoConfig.for_model(config["model_type"], **settings)
        with suppress(KeyError):  # no causal model is known for it, which is told below
            MODEL_FOR_CAUSAL_LM_MAPPING[type(known)]  # imported when it is first asked for
    # there is nothing to fill with numbers, which takes as long as all the rest
    with collecting_later(), init_empty_weights(include_buffers=False), _EmptyOnMeta(), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(known, dtype=dtype)
    return model


class _EmptyOnMeta(TorchFunctionMode):
    """Makes the tensors that weights begin as on the meta device at once, where `init_empty_weights` moves them there.

    Moving needs no page of memory either, but it spreads what stays over an address space as large as the model, into
    whose gaps later tensors go one after another: more of it is resident from block to block.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _check(source: Source, model: PreTrainedModel, wanted: dict[str, Any], stored: list[str]) -> None:
    """Hold the names and shapes of a source against those of the architecture before anything is read."""
    present = set(stored)
    buffers = {name for name, _ in model.named_buffers()}
    missing = [name for name in wanted if name not in present]
    known = {*wanted, *buffers}
    unknown = [name for name in stored if name not in known and not is_buffer(name)]
    wrong = [
        f"{name} ({list(source.shape(name))} stored, {list(wanted[name].shape)} expected)"
        for name in stored
        if name in wanted and tuple(source.shape(name)) != tuple(wanted[name].shape)
    ]
    problems = [
        f"{source.path}: {len(names)} tensors {what}: {_shown(names)}"
        for names, what in (
            (missing, "that the model needs are not stored"),
            (unknown, "are not those of the model"),
            (wrong, "have another shape"),
        )
        if names
    ]
    if problems:
        raise ModelError(
            "\n".join(problems), hint="the download may be incomplete, or config.json belongs to another model"
        )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter or buffer by its full name."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        setattr(module, leaf, value)
