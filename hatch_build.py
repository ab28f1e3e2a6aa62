"""Puts recipes/ and calibration/ into a wheel; an editable install reads them where they lie and gets no copy."""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ShippedData(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            for folder in ("recipes", "calibration"):
                build_data["force_include"][folder] = f"quantkit/_data/{folder}"
