"""Which licence an artifact is under: what its source says, never a guess."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantkit.report.markdown import escaped

TERMS = ("licen[cs]e*", "copying*")
"""Files that hold a licence, in lower case; a notice or a use policy comes on top of one."""

KNOWN = {
    "apache-2.0": (
        r"terms and conditions for use reproduction and distribution.*end of terms and conditions",
        "d8221a4f10c01c6f",
        r"(apache license version 2 0 january 2004( https? www apache org licenses)? ?)?",
        r"( ?appendix how to apply the apache license to your work( \w+){0,200})?",
    ),
    "mit": (
        r"permission is hereby granted free of charge.*dealings in the software",
        "0cf21bdfd1964a97",
        r"((the )?mit license( mit)? ?)?(copyright( \w+){1,40} ?)?",
        r"",
    ),
}
"""Licence on the hub -> pattern of its terms, sha256 of their words (first 16 digits), what may stand around them.

A text that adds a word to the terms is another licence."""


@dataclass(frozen=True)
class Licence:
    """fields: of a card's front matter, empty when nothing is known. said: where that comes from, as a sentence."""

    said: str
    fields: dict[str, Any] = field(default_factory=dict)


def licence_of(card: Mapping[str, Any], files: Sequence[Path], base_model: str | None) -> Licence:
    """The licence that a source's own card or files name.

    card: the front matter of the source's model card, or what a GGUF file says in its place. files: licence files and
    notices that the artifact carries. base_model: the source's hub id, to complete a link that is relative to it.
    """
    names = ", ".join(f"`{path.name}`" for path in files)
    along = f" {names} of the source {'is' if len(files) == 1 else 'are'} copied along." if files else ""
    named = card.get("license")
    if isinstance(named, str | list) and named:
        fields = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
        _complete_link(fields, {path.name for path in files}, base_model)
        shown = named if isinstance(named, str) else ", ".join(map(str, named))
        if fields.get("license_name"):
            shown += f" ({fields['license_name']})"
        return Licence(f"{escaped(shown)}, as the source itself says.{along}", fields)
    terms = [path for path in files if any(fnmatchcase(path.name.lower(), pattern) for pattern in TERMS)]
    if not terms:
        return Licence(
            "Not known: the source names no licence, neither in a model card nor in a file beside its weights. "
            f"Find out under which terms it was published before this artifact goes to others.{along}"
        )
    found = {recognize(path.read_text(encoding="utf-8", errors="replace")) for path in terms}
    one = found.pop() if len(found) == 1 else None
    if one is None:
        fields = {"license": "other", "license_link": terms[0].name}
        return Licence(f"The source's own terms: its card names no licence.{along}", fields)
    return Licence(f"{one}: the text of `{terms[0].name}`.{along}", {"license": one})


def _complete_link(fields: dict[str, Any], names: set[str], base_model: str | None) -> None:
    """A link relative to the source's repository leads nowhere from the artifact's, unless the file came along."""
    link = fields.get("license_link")
    if not isinstance(link, str) or "://" in link or link in names:
        return
    if base_model is None:
        del fields["license_link"]
    else:
        fields["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link.lstrip('./')}"


def recognize(text: str) -> str | None:
    """The hub's name of a licence whose text this is, word for word; None for any other."""
    words = " ".join(re.sub(r"[^a-z0-9]+", " ", text.lower()).split())
    for name, (pattern, digest, before, behind) in KNOWN.items():
        found = re.search(pattern, words)
        if found and hashlib.sha256(found[0].encode()).hexdigest().startswith(digest):
            around = re.fullmatch(before, words[: found.start()]) and re.fullmatch(behind, words[found.end() :])
            return name if around else None
    return None
