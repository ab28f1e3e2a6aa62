"""Causal attention on a CPU with units for bfloat16: scores in float32, weights and values in bfloat16.

PyTorch's kernel rounds queries, keys and scores to bfloat16 and takes most of its time for the softmax. Here the scores
keep float32 and a chunk of queries meets only the keys that it may see, which is faster and nearer to float32 at once;
docs/performance.md has the figures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.maths.products import rounding_allowed

CHUNK = 128
"""Queries whose scores are held at once: few enough to stay in the second-level cache."""


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """What each token gathers from itself and those before it: bfloat16 [batch, length, heads, value width].

    query: [batch, heads, length, width]; key: [batch, key heads, length, width]; value: [batch, key heads, length,
    value width]; any float dtype, on the CPU. heads is a multiple of key heads, and as many neighbours share one. scale
    multiplies the scores.
    """
    from quantkit.maths.softmax_kernel import causal_softmax

    batch, heads, length, width = query.shape
    groups = key.shape[1]
    shared = heads // groups
    queries = query.float().view(batch, groups, shared, length, width)
    keys = key.float().reshape(batch * groups, length, width).transpose(1, 2)
    values = value.bfloat16().reshape(batch * groups, length, value.shape[-1])
    gathered = torch.empty(batch, length, groups, shared, values.shape[-1], dtype=torch.bfloat16)
    chunk = min(CHUNK, length)
    room = torch.empty(batch * heads * chunk * length)  # taken once, since fresh pages cost as much as the product
    weights_room = torch.empty(room.shape, dtype=torch.bfloat16)
    for first in range(0, length, chunk):
        end = min(first + chunk, length)
        wide = (batch * groups, shared * (end - first), end)
        count = wide[0] * wide[1] * end
        scores, weights = room[:count].view(wide), weights_room[:count].view(wide)
        with rounding_allowed():
            torch.bmm(queries[:, :, :, first:end].reshape(*wide[:2], width), keys[:, :, :end], out=scores)
        rows = (batch * heads, end - first, end)
        causal_softmax(scores.view(rows).numpy(), first, scale, weights.view(torch.uint16).view(rows).numpy())
        found = torch.bmm(weights, values[:, :end]).view(batch, groups, shared, end - first, -1)
        gathered[:, first:end] = found.permute(0, 3, 1, 2, 4)
    return gathered.view(batch, length, heads, -1)
