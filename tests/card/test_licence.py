"""A licence is what the source says it is: its card, or a text that is one word for word; else it is not known."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from quantkit.card.licence import licence_of, recognize

MIT = """MIT License

Copyright (c) 2024 Some One and contributors

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def apache() -> str:
    """The text as a package of the environment carries it."""
    packages = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(packages.glob("transformers-*.dist-info/licenses/LICENSE")):
        return path.read_text()
    for path in sorted(packages.glob("*.dist-info/licenses/LICENSE*")):
        text = path.read_text(errors="replace")
        if "Version 2.0, January 2004" in text and len(text) < 12_000:
            return text
    pytest.skip("no installed package carries the text of Apache-2.0")


def test_a_text_is_recognized_word_for_word() -> None:
    assert recognize(MIT) == "mit"
    assert recognize(MIT.replace("\n", "\r\n  ").upper()) == "mit"
    assert recognize(apache()[apache().index("Apache License") :]) == "apache-2.0"


@pytest.mark.parametrize(
    "text",
    [
        MIT.replace("sell copies", "give copies"),
        MIT.replace("MIT License", "Modified MIT License"),
        MIT + "\nOur only modification: products with over 100 million users display our name.\n",
        "This model is for research. It is not under the MIT License.",
        "",
    ],
)
def test_a_text_with_another_word_is_another_licence(text: str) -> None:
    assert recognize(text) is None


def test_apache_with_a_clause_on_top_is_not_apache() -> None:
    clause = (
        "Commons Clause License Condition v1.0. The Software is provided under the License below, except to sell.\n"
    )
    assert recognize(clause + apache()) is None
    assert recognize(apache() + "\n" + clause) is None


def test_the_card_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "LICENSE"
    file.write_text(MIT)
    found = licence_of({"license": "apache-2.0", "tags": ["x"]}, [file], "acme/tiny")
    assert found.fields == {"license": "apache-2.0"}
    assert found.said == "apache-2.0, as the source itself says. `LICENSE` of the source is copied along."


def test_a_named_licence_keeps_its_name_and_a_link_that_leads_somewhere(tmp_path: Path) -> None:
    card = {"license": "other", "license_name": "tiny-community", "license_link": "LICENSE"}
    complete = {**card, "license_link": "https://huggingface.co/acme/tiny/blob/main/LICENSE"}
    assert licence_of(card, [], "acme/tiny").fields == complete
    assert "other (tiny-community), as the source" in licence_of(card, [], "acme/tiny").said
    assert licence_of(card, [], None).fields == {"license": "other", "license_name": "tiny-community"}
    file = tmp_path / "LICENSE"
    file.write_text("terms")
    assert licence_of(card, [file], None).fields == card


def test_without_a_card_the_file_counts(tmp_path: Path) -> None:
    file, notice = tmp_path / "LICENSE", tmp_path / "NOTICE"
    file.write_text(MIT)
    notice.write_text("attribution")
    assert licence_of({}, [file, notice], None).fields == {"license": "mit"}
    file.write_text("terms of our own")
    found = licence_of({}, [file, notice], None)
    assert found.fields == {"license": "other", "license_link": "LICENSE"}
    assert "`LICENSE`, `NOTICE` of the source are copied along" in found.said


@pytest.mark.parametrize("card", [{}, {"license": None}, {"license": 7}, {"license": []}])
def test_nothing_is_invented(card: dict[str, object], tmp_path: Path) -> None:
    notice = tmp_path / "NOTICE"
    notice.write_text(MIT)
    found = licence_of(card, [notice], "acme/tiny")
    assert found.fields == {} and found.said.startswith("Not known: the source names no licence")
