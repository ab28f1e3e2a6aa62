"""The keys of a GGUF header that quantkit reads, checked for their kind before anyone uses them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantkit.errors import ModelError
from quantkit.model.config_check import SHOWN, Rule, problems_of_settings, texts, whole

MAX_TOKEN_CHARACTERS = 4096  # the longest token of a published vocabulary has 256


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) in (int, float) for item in value)


def _tokens(value: Any) -> bool:
    return texts(value) and all(len(item) <= MAX_TOKEN_CHARACTERS for item in value)


_TEXT: Rule = ((lambda value: isinstance(value, str)), "text")
_ID = whole(-1, 1 << 32)
_FLAG: Rule = ((lambda value: isinstance(value, bool)), "true or false")

RULES: dict[str, Rule] = {
    **dict.fromkeys(("general.architecture", "general.type", "general.name", "general.license"), _TEXT),
    **dict.fromkeys(("general.basename", "general.finetune", "general.organization", "general.size_label"), _TEXT),
    "general.languages": (texts, "a list of texts"),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), _TEXT),
    "tokenizer.ggml.tokens": (_tokens, f"a list of texts of up to {MAX_TOKEN_CHARACTERS} characters"),
    "tokenizer.ggml.merges": (texts, "a list of texts"),
    **dict.fromkeys(("tokenizer.ggml.scores", "tokenizer.ggml.token_type"), (_numbers, "a list of numbers")),
    **{f"tokenizer.ggml.{role}_token_id": _ID for role in ("bos", "eos", "unknown", "padding", "eot")},
    **{f"tokenizer.ggml.add_{name}": _FLAG for name in ("bos_token", "eos_token", "space_prefix")},
    "split.count": whole(0, 1 << 16),
    "imatrix.datasets": (texts, "a list of texts"),
    **dict.fromkeys(("imatrix.chunk_count", "imatrix.chunk_size"), whole(0, 1 << 32)),
}


def check_metadata(where: str, metadata: Mapping[str, Any]) -> None:
    """Raises ModelError with every key whose value is of another kind."""
    problems = problems_of_settings(where, metadata, RULES)
    if problems:
        raise ModelError("\n".join(problems[:SHOWN]), hint="the file is damaged, or of another kind")
