"""Puts a card into a new artifact's folder, and the source's licence files where the format left them out."""

from __future__ import annotations

from pathlib import Path

from quantkit.card.licence import licence_of
from quantkit.card.text import card_text
from quantkit.manifest import FileRecord, Manifest, file_record, write_atomic
from quantkit.model.front_matter import CARD
from quantkit.model.reader import is_licence_file
from quantkit.model.source import Source


def with_card(manifest: Manifest, source: Source, folder: Path) -> Manifest:
    """The manifest with README.md and licence files among its files; both are in the folder then.

    The card depends on the manifest alone, without its times and its machine: equal runs give equal bytes.
    """
    card = source.card()
    base = card.get("base_model")
    licences = [path for path in source.side_files() if is_licence_file(path.name)]
    written = {record.name for record in manifest.files}
    for path in licences:
        if path.name not in written:
            write_atomic(folder / path.name, path.read_bytes())
    licence = licence_of(card, licences, base)
    write_atomic(folder / CARD, card_text(manifest, card, licence).encode())
    new = [file_record(folder / name, folder) for name in (*(path.name for path in licences), CARD)]
    return with_files(manifest, new)


def card_files(source: Source) -> list[str]:
    """Names of the files that `with_card` leaves in the folder."""
    return [CARD, *(path.name for path in source.side_files() if is_licence_file(path.name))]


def with_files(manifest: Manifest, records: list[FileRecord]) -> Manifest:
    """A manifest in which these records replace those of the same names, in the order of names."""
    files = {record.name: record for record in (*manifest.files, *records)}
    return manifest.model_copy(update={"files": [files[name] for name in sorted(files)]})
