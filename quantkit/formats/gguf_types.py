"""Which tensors a GGUF file has, in which types, and what it says of them: from the plan and the headers alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from quantkit.formats.base import LinearPlan
from quantkit.formats.imatrix import read_imatrix
from quantkit.manifest import TensorRecord
from quantkit.maths.ggml import type_size
from quantkit.methods.ggml_mixes import misfit_reason
from quantkit.model.blocks import architecture_of, is_left_out, linear_shape
from quantkit.model.gguf_config import family_of_config
from quantkit.model.gguf_names import file_order
from quantkit.model.source import Source

DTYPE_TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


def written_names(source: Source) -> list[str]:
    """The tensors of a source that go into a file, in the order of the file; a tied head is not among them."""
    names = [name for name in source.names() if not is_left_out(source, name)]
    family = family_of_config(source.config)
    return sorted(names, key=lambda name: file_order(name, family))


def file_type_of(plans: list[LinearPlan]) -> str | None:
    """The type or mix of most linears, None when all are skipped."""
    counts = Counter(plan.method.file_type for plan in plans if plan.method is not None)
    return counts.most_common(1)[0][0] if counts else None


def embedding_method(plans: list[LinearPlan]) -> Any | None:
    """The settings that say the embedding's type: those that name one, else those of most linears; None when all are
    skipped."""
    methods = [plan.method for plan in plans if plan.method is not None]
    told = [method for method in methods if method.embedding_type is not None]
    return next((method for method in told or methods if told or method.file_type == file_type_of(plans)), None)


def is_added(source: Source, name: str) -> bool:
    """Whether llama.cpp adds a tensor or multiplies by its elements, which it does in F32: vectors, learned
    positions."""
    return len(source.shape(name)) == 1 or name == f"{architecture_of(source.config).positions}.weight"


def tensor_types(source: Source, plans: list[LinearPlan], dtype: torch.dtype) -> dict[str, str]:
    """ggml's type for every tensor that is written: what was planned, F32 for what is added, `dtype` for the rest."""
    planned = {f"{plan.name}.weight": plan.method for plan in plans if plan.method is not None}
    architecture = architecture_of(source.config)
    embedding = f"{architecture.embedding}.weight"
    main = embedding_method(plans)
    types = {}
    for name in written_names(source):
        if name in planned:
            types[name] = planned[name].type_for(linear_shape(source, name.removesuffix(".weight"))[1])
        elif is_added(source, name):
            types[name] = "F32"
        elif name == embedding and main is not None:
            types[name] = main.embedding_types(source, name)[1]
        else:
            types[name] = DTYPE_TYPES[dtype]
    return types


def substitutes_of(source: Source, plans: list[LinearPlan]) -> tuple[TensorRecord, ...]:
    """A record of the embedding, where it does not get the type that the mix wants."""
    embedding = architecture_of(source.config).embedding
    method = embedding_method(plans)
    if method is None:
        return ()
    columns = source.shape(f"{embedding}.weight")[1]
    wanted, given = method.embedding_types(source, f"{embedding}.weight")
    if wanted == given:
        return ()
    record = TensorRecord(
        name=embedding,
        requested=method.label(),
        applied=f"gguf {given}",
        bits_per_weight=type_size(given, columns) * 8 / columns,
        reason=misfit_reason(wanted, columns),
    )
    return (record,)


def imatrix_metadata(source: Source, plans: list[LinearPlan], own_name: str) -> dict[str, Any]:
    """quantize.imatrix.*: where the importance of the columns comes from; empty when there is none.

    own_name: of the file that a calibrated importance is written to.
    """
    head = architecture_of(source.config).head
    methods = [plan.method for plan in plans if plan.method is not None and plan.name != head]
    weighed = [method for method in methods if method.importance]
    if not weighed:
        return {}
    method = weighed[0]
    if method.calibrated:
        file, dataset, entries, chunks = own_name, method.dataset, len(weighed), method.chunks
    else:
        matrix = read_imatrix(Path(method.importance))
        file, entries, chunks = method.importance, len(matrix.entries), matrix.chunks
        dataset = matrix.datasets[0] if matrix.datasets else ""
    found = {"file": file, "dataset": dataset, "entries_count": entries, "chunks_count": chunks}
    return {f"quantize.imatrix.{key}": value for key, value in found.items() if value}
