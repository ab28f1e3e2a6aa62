"""doctor: what is installed, what runs here, and what to install for the rest."""

from __future__ import annotations

import json
import sys
import types

import pytest

from quantkit import words
from quantkit.doctor import examine
from quantkit.environment import PACKAGES
from quantkit.formats import FORMATS


class Engine:
    def __init__(self, reason: str | None):
        self.reason = reason

    def available(self) -> str | None:
        return self.reason


@pytest.fixture
def two_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = types.ModuleType("quantkit.engines")
    registry.ENGINES = {"ready-one": Engine(None), "absent-one": Engine("pip install absent")}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantkit.engines", registry)
    monkeypatch.setattr(FORMATS["gguf"], "engines", ("absent-one", "ready-one"))
    monkeypatch.setattr(FORMATS["autoawq"], "engines", ("absent-one",))


@pytest.mark.usefixtures("two_engines")
def test_engines_say_what_they_run_and_what_is_missing() -> None:
    facts = examine()
    by_name = {engine["name"]: engine for engine in facts["engines"]}
    assert by_name["ready-one"] == {"name": "ready-one", "formats": ["gguf"], "available": True, "reason": None}
    assert by_name["absent-one"]["formats"] == ["autoawq", "gguf"]
    assert facts["missing"] == ["absent-one: pip install absent"]
    assert facts["formats"]["gguf"] == "ready-one" and facts["formats"]["autoawq"] is None


@pytest.mark.usefixtures("two_engines")
def test_the_facts_are_numbers_and_fit_json() -> None:
    facts = json.loads(json.dumps(examine(), allow_nan=False))
    assert facts["python"] == sys.version.split()[0]
    assert set(facts["packages"]) == set(PACKAGES) and facts["packages"]["torch"]
    assert facts["cpu"]["cores"] >= 1 and facts["cpu"]["threads"] >= 1
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["disk"]["free_bytes"] >= 0


@pytest.mark.usefixtures("two_engines")
def test_the_text_has_every_engine_and_package() -> None:
    text = words.doctor(examine())
    assert "ready-one" in text and "pip install absent" in text
    assert all(name in text for name in PACKAGES)


def test_the_real_registry_answers() -> None:
    facts = examine()
    named = {engine for known in FORMATS.values() for engine in known.engines}
    assert named <= {engine["name"] for engine in facts["engines"]}, "a format names an engine that does not exist"
    assert all((engine["reason"] is None) == engine["available"] for engine in facts["engines"])
