"""How each architecture is laid out, as data: which linears a block has, which share an input, what feeds them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.source import Source


@dataclass(frozen=True)
class LinearGroup:
    """Linears of a block that read the same input, which nothing else reads.

    linears: module names inside the block. producer: the module inside the block whose output channels are that input,
    so that a scale of the input can be folded into it; None when nothing linear stands before. producer_kind: "norm"
    (the gain of a normalization), "linear" (the rows of a linear), or "value" (the rows of the value projection, which
    several query heads may share). added_to: the module whose input is the hidden states that the outputs are added to
    as they are; None where they go elsewhere.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    producer_kind: str | None = None
    added_to: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where things are in a family of models; names are those of the Hugging Face checkpoint."""

    block_prefix: str  # with {index}
    groups: tuple[LinearGroup, ...]
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm_offset: float = 0.0  # Gemma multiplies by (1 + gain)
    trunk: str = "model"  # attribute of the transformers class that runs embedding and blocks
    layers: str = "model.layers"
    positions: str | None = None  # learned embeddings of positions
    transposed: bool = False  # the linears of the blocks are stored as [in, out], transformers' Conv1D
    fused: bool = False  # what a linear gives is taken apart, and held by the model until what reads it has run
    own_attention: bool = True  # nothing is asked for beside causal attention (model/attention.py)


@dataclass(frozen=True)
class Block:
    """One decoder block of one model: full tensor names.

    linears: full module names in order. groups: the linears by shared input, with full module names.
    tensors: every stored tensor of the block. transposed: its linears are stored as [in, out].
    """

    index: int
    prefix: str
    linears: tuple[str, ...]
    groups: tuple[LinearGroup, ...]
    tensors: tuple[str, ...]
    transposed: bool = False

    def oriented(self, weight: Tensor) -> Tensor:
        """The weight of a linear as [out, in] from what is stored, and the other way round."""
        return weight.T.contiguous() if self.transposed else weight


_LLAMA_GROUPS = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm", "norm"),
    LinearGroup(("self_attn.o_proj",), "self_attn.v_proj", "value", "input_layernorm"),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", "norm"),
    LinearGroup(("mlp.down_proj",), "mlp.up_proj", "linear", "post_attention_layernorm"),
)

# a norm stands between the outputs and the hidden states
_GEMMA_GROUPS = (
    _LLAMA_GROUPS[0],
    LinearGroup(("self_attn.o_proj",), "self_attn.v_proj", "value"),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", "norm"),
    LinearGroup(("mlp.down_proj",), "mlp.up_proj", "linear"),
)

# fused projections are one linear each; nothing linear alone feeds o_proj and down_proj there
_PHI3_GROUPS = (
    LinearGroup(("self_attn.qkv_proj",), "input_layernorm", "norm"),
    LinearGroup(("self_attn.o_proj",), added_to="input_layernorm"),
    LinearGroup(("mlp.gate_up_proj",), "post_attention_layernorm", "norm"),
    LinearGroup(("mlp.down_proj",), added_to="post_attention_layernorm"),
)

_GPT2_GROUPS = (
    LinearGroup(("attn.c_attn",), "ln_1", "norm"),
    LinearGroup(("attn.c_proj",), added_to="ln_1"),
    LinearGroup(("mlp.c_fc",), "ln_2", "norm"),
    LinearGroup(("mlp.c_proj",), added_to="ln_2"),
)

_LLAMA = Architecture(block_prefix="model.layers.{index}.", groups=_LLAMA_GROUPS)
_GEMMA = Architecture(block_prefix="model.layers.{index}.", groups=_GEMMA_GROUPS, norm_offset=1.0)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,  # its q and k norms act per head after the projection: nothing to fold there
    "Gemma2ForCausalLM": replace(_GEMMA, own_attention=False),  # a cap on the scores
    "Gemma3ForCausalLM": _GEMMA,
    "Phi3ForCausalLM": Architecture(block_prefix="model.layers.{index}.", groups=_PHI3_GROUPS, fused=True),
    "GPT2LMHeadModel": Architecture(
        block_prefix="transformer.h.{index}.",
        groups=_GPT2_GROUPS,
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        trunk="transformer",
        layers="transformer.h",
        positions="transformer.wpe",
        transposed=True,
        fused=True,
    ),
}


def architecture_of(config: dict[str, Any]) -> Architecture:
    """The layout of a model from its config.json. Raises ModelError for a family that is not in the table."""
    names = config.get("architectures") or ["(none)"]
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    raise ModelError(
        f"config.json: architectures: {', '.join(names)} is not supported; expected one of {', '.join(ARCHITECTURES)}",
        hint="a family is one entry of the table in quantkit/model/blocks.py",
    )


def head_dim(config: dict[str, Any]) -> int | None:
    """Channels of one attention head, None when the config does not tell."""
    if config.get("head_dim"):
        return int(config["head_dim"])
    for width, heads in (("hidden_size", "num_attention_heads"), ("n_embd", "n_head")):
        if config.get(width) and config.get(heads):
            return int(config[width]) // int(config[heads])
    return None


def context_length(config: dict[str, Any]) -> int | None:
    """How many positions a model was made for, None when the config does not tell."""
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def is_buffer(name: str) -> bool:
    """Whether a tensor is a table that old checkpoints store and every reader computes: rotary frequencies, masks."""
    return re.search(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$", name) is not None


def is_left_out(source: Source, name: str) -> bool:
    """Whether an artifact does not store a tensor of its source: a tied head, and tables that every reader computes."""
    return (source.tied_head and name == f"{architecture_of(source.config).head}.weight") or is_buffer(name)


def linear_shape(source: Source, linear: str) -> tuple[int, int]:
    """(out_features, in_features) of a linear by its module name, however it is stored."""
    rows, columns = source.shape(f"{linear}.weight")
    architecture = architecture_of(source.config)
    return (columns, rows) if architecture.transposed and linear != architecture.head else (rows, columns)


def heads_of(config: dict[str, Any]) -> int:
    """How many heads attention has."""
    return int(config.get("num_attention_heads") or config.get("n_head") or 1)


def state_columns(source: Source) -> int:
    """How many values a token has in the hidden states."""
    return source.shape(f"{architecture_of(source.config).embedding}.weight")[1]


def group_shape(source: Source, group: LinearGroup) -> tuple[int, int]:
    """(out_features, in_features) of the linears of one input, stacked by rows."""
    shapes = [linear_shape(source, linear) for linear in group.linears]
    return sum(rows for rows, _ in shapes), shapes[0][1]


def blocks_of(source: Source) -> list[Block]:
    """The decoder blocks of a model in order. Raises ModelError when the checkpoint lacks a linear that it must have,
    or has blocks that its config does not tell of."""
    architecture = architecture_of(source.config)
    by_prefix: dict[int, list[str]] = {}
    pattern = re.compile("^" + re.escape(architecture.block_prefix).replace(r"\{index\}", r"(\d+)"))
    names = source.names()
    for name in names:
        found = pattern.match(name)
        if found:
            by_prefix.setdefault(int(found.group(1)), []).append(name)
    count = int(source.config.get("num_hidden_layers") or source.config.get("n_layer") or len(by_prefix))
    beyond = [index for index in by_prefix if index >= count]
    if beyond:
        raise ModelError(
            f"{source.path}: holds tensors of block {max(beyond)}, but config.json tells of {count} blocks",
            hint="config.json belongs to another model, or was changed",
        )
    blocks, missing = [], []
    for index in range(count):
        prefix = architecture.block_prefix.format(index=index)
        groups = tuple(
            LinearGroup(
                tuple(prefix + linear for linear in group.linears),
                prefix + group.producer if group.producer else None,
                group.producer_kind,
                prefix + group.added_to if group.added_to else None,
            )
            for group in architecture.groups
        )
        linears = tuple(linear for group in groups for linear in group.linears)
        tensors = tuple(sorted(by_prefix.get(index, ())))
        present = set(tensors)
        missing += [f"{linear}.weight" for linear in linears if f"{linear}.weight" not in present]
        blocks.append(Block(index, prefix, linears, groups, tensors, architecture.transposed))
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise ModelError(
            f"{source.path}: {len(missing)} tensors that {count} blocks need are not stored: {shown}",
            hint="the download may be incomplete, or config.json belongs to another model",
        )
    return blocks
