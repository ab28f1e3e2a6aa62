"""Whether a checkpoint is of the shape that its config.json tells, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantkit.errors import ModelError
from quantkit.model.blocks import architecture_of, blocks_of, group_shape, head_dim, heads_of, state_columns
from quantkit.model.source import PART, Source


def check_config_fits(source: Source) -> None:
    """Raises ModelError where widths of the stored tensors are not those of the config.

    A reader builds the model from its config, and could not load what was made of another shape. Which widths there are
    follows from the groups of linears, which every family has in the same order (model/blocks.py).
    """
    problems: dict[str, str] = {}
    for key, said, stored, name in _widths(source):
        if said is not None and said != stored:
            problems.setdefault(key, f"{key}: found {said}, expected {stored}: the columns of {name}")
    if problems:
        raise ModelError(
            "\n".join(f"{source.path}: config.json: {problem}" for problem in problems.values()),
            hint="config.json belongs to another model, or was changed",
        )


def check_head_fits(source: Source) -> None:
    """Raises ModelError where a head is stored that the config tells to be the embedding, and which is not: one of both
    would be lost, and which one depends on the reader."""
    architecture = architecture_of(source.config)
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    if not source.config.get("tie_word_embeddings") or head not in source.names():
        return
    rows = max(1, PART // source.shape(embedding)[1])
    parts = zip(source.in_parts(embedding, rows), source.in_parts(head, rows), strict=False)
    if source.shape(embedding) != source.shape(head) or not all(_same(one, other) for one, other in parts):
        raise ModelError(
            f"{source.path}: config.json: tie_word_embeddings is true, but a {head} is stored that is not {embedding}",
            hint="set it to false where the head is the model's own, or take the tensor out of the checkpoint",
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same, NaN where there is NaN."""
    return torch.equal(one, other) or torch.allclose(one.float(), other.float(), rtol=0, atol=0, equal_nan=True)


def check_ids_fit(source: Source, ids: Tensor) -> None:
    """Raises ModelError where token ids, int64 of any shape, go beyond the rows of the embedding."""
    name = f"{architecture_of(source.config).embedding}.weight"
    rows, largest = source.shape(name)[0], int(ids.max())
    if largest >= rows:
        raise ModelError(
            f"{source.path}: the tokenizer gives ids up to {largest}, but {name} has {rows} rows",
            hint="tokenizer and weights belong to different models",
        )


def _widths(source: Source) -> Iterator[tuple[str, int | None, int, str]]:
    """A key, what the config says of it, what is stored, and the tensor that has so many columns."""
    config = source.config
    hidden = "n_embd" if "n_embd" in config else "hidden_size"
    yield hidden, config.get(hidden), state_columns(source), "the embedding"
    for block in blocks_of(source):
        attention, inner = block.groups[1], block.groups[-1]
        width = head_dim(config)
        found = None if width is None else width * heads_of(config)
        yield "num_attention_heads x head_dim", found, group_shape(source, attention)[1], attention.linears[0]
        key = "n_inner" if "n_inner" in config else "intermediate_size"
        yield key, config.get(key), group_shape(source, inner)[1], inner.linears[0]
