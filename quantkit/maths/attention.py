"""Causal attention on a CPU: by loops of our own with AVX-512, else, and in bfloat16 where there are matrix units, by
torch's products.

PyTorch's kernel rounds scores to bfloat16, where values are, and takes most of its time for the softmax. Here scores
keep float32, whatever is multiplied, and a query meets few keys that it may not see, which is faster and as near to
float32 or nearer; docs/performance.md has the figures.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.arena import empty
from quantkit.device import multiplies_bfloat16, multiplies_wide_bfloat16, multiplies_wide_floats
from quantkit.maths.compiled import all_between, writable
from quantkit.maths.products import rounding_allowed

CHUNK = 128
"""Queries whose scores are held at once by torch's products: few enough to stay in the second-level cache."""


def has_own_loops(dtype: torch.dtype) -> bool:
    """Whether values of a dtype are gathered by loops of our own."""
    if dtype == torch.bfloat16 and multiplies_bfloat16():
        return multiplies_wide_bfloat16()
    return multiplies_wide_floats()


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What each token gathers from itself and those before it: [batch, length, heads, value width], as the values are.

    query: [batch, heads, length, width]; key: [batch, key heads, length, width]; any float dtype. value: bfloat16 or
    float32 [batch, key heads, length, value width]; weights, and where the processor multiplies bfloat16 queries and
    keys as well, are rounded to its dtype. All on the CPU. heads is a multiple of key heads, and as many neighbours
    share one. scale multiplies the scores. A value that is not finite may show in tokens shortly before it. Raises
    ValueError for other shapes and dtypes.
    """
    batch, heads, length, width = query.shape
    groups = value.shape[1]
    if key.shape != (batch, groups, length, width) or value.shape[:3] != key.shape[:3] or heads % max(1, groups):
        raise ValueError(f"queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}")
    if value.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"values in {value.dtype}, expected float32 or bfloat16")
    if not has_own_loops(value.dtype):
        return _by_torch(query.float(), key.float(), value, scale)
    numbers = value if multiplies_wide_bfloat16() else value.float()
    return _by_own_loops(query, key, numbers, scale).to(value.dtype)


def _by_own_loops(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `causal_attention`, in the dtype of the values."""
    from quantkit.maths.attention_kernel import QUERIES, TILE_COLUMNS, attend, lay_heads
    from quantkit.maths.int_kernel import blocks_of

    query, key, value = (given if given.stride(-1) == 1 else given.contiguous() for given in (query, key, value))
    batch, groups, length, wide = value.shape
    heads, width = query.shape[1], query.shape[3]
    size = 4 // value.itemsize  # numbers in a word
    word = torch.float32 if size == 1 else torch.int32
    keys = empty((batch, groups, -(-length // TILE_COLUMNS), -(-width // size), TILE_COLUMNS), word)
    values = empty((batch, groups, -(-wide // TILE_COLUMNS), -(-length // size), TILE_COLUMNS), word)
    gathered = empty((batch, length, heads, wide), value.dtype)
    right = (all_between(key), _steps(key), all_between(value), _steps(value))
    lay_heads(batch * groups, *right, (length, width, wide), keys.numpy(), values.numpy())
    given = (all_between(query), _steps(query), keys.numpy(), values.numpy(), width, scale)
    attend(batch * groups * blocks_of(length, QUERIES), *given, writable(gathered))
    return gathered


def _steps(heads: Tensor) -> NDArray[np.int64]:
    """From one of a batch, a head and a token to the next."""
    return np.array(heads.stride()[:3], np.int64)


def _by_torch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `causal_attention`; query and key float32."""
    from quantkit.maths.softmax_kernel import bands_of, causal_softmax

    batch, heads, length, width = query.shape
    groups = key.shape[1]
    shared = heads // groups
    queries = query.reshape(batch, groups, shared, length, width)
    keys = key.reshape(batch * groups, length, width).transpose(1, 2)
    values = value.reshape(batch * groups, length, value.shape[-1])
    gathered = empty((batch, length, groups, shared, values.shape[-1]), value.dtype)
    chunk = min(CHUNK, length)
    room = empty((batch * heads * chunk * length,))  # for the largest chunk, and all before it
    weights_room = empty(room.shape, value.dtype)
    for first in range(0, length, chunk):
        end = min(first + chunk, length)
        wide = (batch * groups, shared * (end - first), end)
        count = wide[0] * wide[1] * end
        scores, weights = room[:count].view(wide), weights_room[:count].view(wide)
        asking = queries[:, :, :, first:end]
        if shared > 1:  # else they lie in one piece for each head
            asking = empty(asking.shape).copy_(asking)
        with rounding_allowed() if value.dtype == torch.bfloat16 else nullcontext():
            torch.bmm(asking.reshape(*wide[:2], width), keys[:, :, :end], out=scores)
        rows = (batch * heads, end - first, end)
        causal_softmax(bands_of(*rows[:2]), scores.view(rows).numpy(), first, scale, writable(weights.view(rows)))
        found = empty((*wide[:2], values.shape[-1]), value.dtype)
        torch.bmm(weights, values[:, :end], out=found)
        gathered[:, first:end] = found.view(batch, groups, shared, end - first, -1).permute(0, 3, 1, 2, 4)
    return gathered.view(batch, length, heads, -1)
