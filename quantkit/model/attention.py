"""A model's attention on a CPU, by `maths/attention.py` where that says the same.

Registered as transformers asks of an attention of one's own (its AttentionInterface and AttentionMaskInterface).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantkit.maths.attention import causal_attention
from quantkit.tensors import let_go

NAME = "quantkit_causal"
"""What config._attn_implementation calls it."""

LIKE = "sdpa"
"""PyTorch's own, whose place it takes and which gets what is more than causal attention."""

KNOWN = frozenset({"scaling", "is_causal", "sliding_window", "position_ids", "cache_position"})
"""Settings that change nothing here: a window is in the mask unless it reaches over all tokens, and positions have been
turned into queries and keys before."""


def use_causal_attention(model: PreTrainedModel) -> None:
    """Let a model attend by `causal_attention`, where it would by PyTorch's and takes its attention from a table."""
    if model.config._attn_implementation != LIKE or not model._can_set_attn_implementation():
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """query [batch, heads, length, width], key and value [batch, key heads, length, width] to [batch, length, heads,
    width] and no weights. The three are emptied: the model still holds them, in as many rows as wait for what comes
    next, and reads them no more."""
    attended = _attended(module, query, key, value, attention_mask, **settings)
    for read in (query, key, value):
        let_go(read)
    return attended, None


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> Tensor:
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    if attention_mask is None and query.shape[2] == key.shape[2] and _only_causal(module, settings):
        narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
        with torch.autocast("cpu", enabled=False):  # scores keep float32, whatever the linears multiply in
            return causal_attention(query, key, value.to(narrow), scale)
    attended: Tensor = ALL_ATTENTION_FUNCTIONS[LIKE](module, query, key, value, attention_mask, **settings)[0]
    return attended


def _only_causal(module: nn.Module, settings: dict[str, Any]) -> bool:
    """Whether nothing is asked for beside causal attention: no dropout, sinks, bias or cap."""
    causal = settings.get("is_causal")
    asked = {name for name, given in settings.items() if given is not None and given is not False and name not in KNOWN}
    if asked - {"dropout"} or settings.get("dropout"):
        return False
    return bool(getattr(module, "is_causal", True) if causal is None else causal)
