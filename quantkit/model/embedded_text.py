"""English prose that needs no network: the language reference that every Python carries in `pydoc_data.topics`.

Python 3.11.7 gives 72,469 tokens for calibration and 8,264 for evaluation with SmolLM2's tokenizer (49,152 entries):
141 sequences of 512 and 32 of 256. Other versions of Python carry other editions of the text, so only the fingerprint
of the token ids says whether two runs saw the same.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Mapping

from quantkit.errors import MissingDependencyError

EVALUATION_SHARE = 0.08
"""Of the characters, at least: enough for 16 sequences of 256 tokens, and leaves 128 of 512, which the shipped recipes
calibrate on, to tokenizers that need a tenth fewer tokens than SmolLM2's."""

MIN_CHARACTERS = 200  # what is left of a topic that others hold whole is headings

_MARKUP = re.compile(r"[*=\-~^.+|\s]{3,}|[|+].*[|+]")  # underlines of headings, rows of tables
_LIST_ITEM = re.compile(r"(?:[*•-]|\d+\.)\s")


def pydoc_documents() -> tuple[list[str], list[str]]:
    """The documents for calibration and those for evaluation; no paragraph is in both.

    Raises MissingDependencyError where Python was installed without its documentation topics.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise MissingDependencyError(
            "pydoc_data.topics: not part of this Python; the calibration set pydoc is made of it",
            hint="give --set calibration.set=FILE with a text of your own, or install Python's whole standard library",
        ) from error
    return split_topics(topics)


def split_topics(topics: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Documents for calibration and for evaluation from topics by name, cleaned, every paragraph kept once.

    Topics quote each other at length: a paragraph belongs to the shortest topic that has it. Whole topics are drawn
    for evaluation in the order of the sha256 of their names, which no seed changes.
    """
    documents: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        own = []
        for paragraph in paragraphs(topics[name]):
            identity = " ".join(paragraph.split())
            if identity not in seen:
                seen.add(identity)
                own.append(paragraph)
        text = "\n\n".join(own)
        if len(text) >= MIN_CHARACTERS:
            documents[name] = text
    wanted = EVALUATION_SHARE * sum(map(len, documents.values()))
    held_out: set[str] = set()
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if sum(len(documents[taken]) for taken in held_out) >= wanted:
            break
        held_out.add(name)
    names = sorted(documents)
    return [documents[name] for name in names if name not in held_out], [documents[name] for name in sorted(held_out)]


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a topic without underlines, tables and indentation; wrapped prose is put on one line."""
    lines = [line for line in text.splitlines() if not line.strip() or not _MARKUP.fullmatch(line.strip())]
    found = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        paragraph = textwrap.dedent(block).strip()
        if paragraph:
            found.append(_unwrapped(paragraph) if _is_prose(paragraph) else paragraph)
    return found


def _is_prose(paragraph: str) -> bool:
    """Whether joining the lines cannot hurt: it reads like a sentence, and no line is set in further."""
    bullet = _LIST_ITEM.match(paragraph)
    rest = paragraph[bullet.end() :] if bullet else paragraph
    indents = {len(line) - len(line.lstrip()) for line in paragraph.splitlines()[1:]}
    return (
        (rest[:1].isupper() or rest[:1] in set('"*“('))
        and paragraph[-1] in ".:;,)"
        and ">>>" not in paragraph
        and "::=" not in paragraph
        and indents <= {bullet.end() if bullet else 0}
    )


def _unwrapped(paragraph: str) -> str:
    # a line that ends in a hyphen was broken inside a word, such as "built-in"
    return re.sub(r"(?<=\w-)\n\s*(?=\w)", "", paragraph).replace("\n", " ").replace("  ", " ")
