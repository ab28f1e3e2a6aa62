"""Causal attention on a CPU: scores in float32, weights and values in bfloat16 where the processor has units for it.

PyTorch's kernel rounds queries, keys and scores to bfloat16 and takes most of its time for the softmax. Here the scores
keep float32 and a chunk of queries meets only the keys that it may see, which is faster and nearer to float32 at once;
docs/performance.md has the figures.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from quantkit.arena import empty
from quantkit.maths.compiled import writable
from quantkit.maths.products import rounding_allowed

CHUNK = 128
"""Queries whose scores are held at once: few enough to stay in the second-level cache."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What each token gathers from itself and those before it: [batch, length, heads, value width], as the values are.

    query: [batch, heads, length, width]; key: [batch, key heads, length, width]; any float dtype. value: bfloat16 or
    float32 [batch, key heads, length, value width]; weights are rounded to its dtype. All on the CPU. heads is a
    multiple of key heads, and as many neighbours share one. scale multiplies the scores.
    """
    from quantkit.maths.softmax_kernel import bands_of, causal_softmax

    batch, heads, length, width = query.shape
    groups = key.shape[1]
    shared = heads // groups
    queries = query.float().view(batch, groups, shared, length, width)
    keys = key.float().reshape(batch * groups, length, width).transpose(1, 2)
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
