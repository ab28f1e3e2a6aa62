"""Documents to token ids: shuffled, tokenized, joined, cut into rows of one length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import DataError, ModelError, QuantkitError
from quantkit.model.reader import MAX_JSON_BYTES, read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 64  # documents tokenized at a time: a large set is not tokenized beyond what is needed

TOKENIZER_INPUTS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files that decide which ids a text becomes."""


def tokenizer_sha256(folder: Path) -> str:
    """sha256 over the names and contents of a tokenizer's files."""
    digest = hashlib.sha256()
    for name in TOKENIZER_INPUTS:
        if (folder / name).is_file():
            digest.update(f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; nothing is fetched. trust_remote_code: run the folder's own code where it has some,
    which is refused otherwise. Raises ModelError."""
    from transformers import AutoTokenizer

    check_tokenizer_files(folder, trust_remote_code=trust_remote_code)
    with explained_tokenizer(f"{folder}: the tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        len(tokenizer)  # some damage shows at the first use
    return tokenizer  # type: ignore[no-any-return]


def check_tokenizer_files(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Hold the sizes and the settings of a tokenizer's files against what one has. Raises ModelError."""
    for name in TOKENIZER_INPUTS:
        file = folder / name
        if file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{file}: {file.stat().st_size} bytes, expected {MAX_JSON_BYTES} or fewer")
    settings = folder / "tokenizer_config.json"
    own_code = read_json_object(settings).get("auto_map") if settings.is_file() else None
    if own_code and not trust_remote_code:
        raise ModelError(
            f"{settings}: auto_map: the tokenizer is code of the repository's own, which is not run",
            hint="read that code; --trust-remote-code runs it, and the manifest records that it was run",
        )


@contextmanager
def explained_tokenizer(where: str) -> Iterator[None]:
    """Tell what goes wrong in the tokenizers library as a ModelError; its Rust part panics on damaged files."""
    try:
        yield
    except (QuantkitError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        line = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise ModelError(f"{where}: {line}", hint="fetch its files again") from error


class ChatRenderer:
    """Chat messages to text with the model's own template. Raises DataError when it has none or refuses them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, where: str):
        self.tokenizer = tokenizer
        self.where = where

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise DataError(
                f"{self.where}: holds chat messages, but the tokenizer has no chat template to render them with",
                hint="take a set of plain text, or the instruction-tuned model",
            )
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(str(message["role"]) for message in messages[:6])
            raise DataError(f"{self.where}: the chat template refuses messages of {roles}: {error}") from error


def pack(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int, seed: int, where: str
) -> list[list[int]]:
    """`sequences` rows of `length` token ids from shuffled documents.

    The end token stands between documents; the begin token heads every row when the tokenizer puts one before a text.
    Raises DataError when there is too little text, with how much there was.
    """
    order = list(texts)
    random.Random(seed).shuffle(order)
    head = _begin_token(tokenizer)
    separator = _separator(tokenizer)
    rows: list[list[int]] = []
    stream: list[int] = []
    at = total = 0  # read position in the stream; tokens seen so far
    for first in range(0, len(order), BATCH):
        encoded = tokenizer(order[first : first + BATCH], add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            stream += ids + separator
            total += len(ids) + len(separator)
        while len(rows) < sequences:
            # a chat template may begin a document with the begin token itself
            begin = [] if head is None or (at < len(stream) and stream[at] == head) else [head]
            end = at + length - len(begin)
            if end > len(stream):
                break
            rows.append(begin + stream[at:end])
            at = end
        if len(rows) == sequences:
            return rows
        del stream[:at]
        at = 0
    needed = sequences * (length - (head is not None))
    raise DataError(
        f"{where}: too little text: {total} tokens, needed {needed} for {sequences} sequences of {length}",
        hint=f"it is enough for {len(rows)} sequences of {length}: lower sequences or length, or take a larger set",
    )


def _begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    begin = tokenizer.bos_token_id
    return begin if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else None  # type: ignore[index]


def _separator(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end token; a blank line for a tokenizer that has none."""
    if tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return list(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
