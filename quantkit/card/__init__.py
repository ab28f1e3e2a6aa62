"""The model card of an artifact: README.md, written from its manifest, with a table that results fill later."""

from __future__ import annotations

from quantkit.card.fill import fill_card
from quantkit.card.write import card_files, with_card

__all__ = ["card_files", "fill_card", "with_card"]
