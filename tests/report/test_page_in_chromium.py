"""The page in a real browser: it sorts, fits a phone, follows the colour scheme, prints, and fetches nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, find_chromium
from quantkit import report
from report.results_samples import measured, row
from report.test_page import demo

pytestmark = pytest.mark.chromium

LABELS = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0].textContent)"
COLUMN = "[...document.querySelector('thead').rows[0].cells].findIndex(cell => cell.textContent.startsWith({name!r}))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    small = row("SMALL", replaced={"artifact": measured("artifact", 9e6, "bytes")})
    given = demo().model_copy(update={"rows": [*demo().rows, small]})
    (folder / "results.json").write_text(given.model_dump_json())
    report.rebuild([folder / "results.json"], folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with Browser(program, tmp_path_factory.mktemp("profile")) as started:
        yield started


def test_a_click_sorts_up_then_down_then_as_it_was(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    before = browser.run(LABELS)
    place = browser.run(COLUMN.format(name="decode"))
    head = f"document.querySelector('thead').rows[0].cells[{place}]"
    seen = []
    for _ in range(3):
        browser.run(f"{head}.querySelector('button').click()")
        seen.append((browser.run(f"{head}.getAttribute('aria-sort')"), browser.run(LABELS)))
    # GPTQ has no speed: it stays last whichever way
    assert [state for state, _ in seen] == ["ascending", "descending", "none"]
    assert seen[0][1][0] == "FP16" and seen[0][1][-1].startswith("GPTQ")
    assert seen[1][1][-1].startswith("GPTQ") and seen[1][1][-2] == "FP16"
    assert seen[2][1] == before


def test_the_keyboard_sorts_by_number_and_not_by_letter(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    for _ in range(20):
        browser.press("Tab")
        if str(browser.run("document.activeElement.textContent")).startswith("artifact"):
            break
    browser.press("Enter", "\r")
    # 9 MB before 110 and 270
    assert browser.run(LABELS)[0] == "SMALL" and browser.run(LABELS)[-1] == "FP16"
    assert browser.run("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"


@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width, dark=dark)
    browser.run("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert browser.run("document.documentElement.scrollWidth") <= width
    frames = "[...document.querySelectorAll('.frame')].map(f => [f.scrollWidth - f.clientWidth, f.tabIndex])"
    assert all(hidden <= 0 or tab == 0 for hidden, tab in browser.run(frames)), "a frame that scrolls takes the focus"


def luminance(colour: str) -> float:
    """Relative luminance of an rgb() colour, as WCAG 2 defines it."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, 1280, dark=dark)
    ground = luminance(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert (ground < 0.05) == dark
    for selector in ("body", ".reading", ".unit", "sup a", ".gone"):
        text = luminance(browser.run(f"getComputedStyle(document.querySelector({selector!r})).color"))
        lighter, darker = max(text, ground), min(text, ground)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, selector


def test_figures_of_a_column_end_at_one_place(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    place = browser.run(COLUMN.format(name="perplexity"))
    script = (
        f"[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[{place}])"
        ".map(cell => {const range = document.createRange(); range.selectNode(cell.firstChild.firstChild"
        " ?? cell.firstChild); return Math.round(range.getBoundingClientRect().right)})"
    )
    assert len(set(browser.run(script))) == 1


def test_it_prints_with_everything_open(browser: Browser, page: Path) -> None:
    browser.open(page, 1280)
    assert browser.run("document.querySelectorAll('details[open]').length") == 0
    browser.run(
        "window.unfolded = []; addEventListener('beforeprint', () => unfolded.push("
        "document.querySelectorAll('details:not([open])').length))"
    )
    assert browser.print().startswith(b"%PDF-")
    assert browser.run("unfolded") == [0]
    assert browser.run("document.querySelectorAll('details[open]').length") == 0


def test_no_errors_and_no_requests(browser: Browser, page: Path) -> None:
    browser.events.clear()
    browser.open(page, 1280)
    browser.run("document.querySelectorAll('button').forEach(button => button.click())")
    kinds = {event["method"]: json.dumps(event["params"])[:300] for event in browser.events}
    assert not {"Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled"} & kinds.keys(), kinds
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked == [page.absolute().as_uri()]


def test_the_policy_of_the_page_lets_nothing_out(browser: Browser, page: Path) -> None:
    """Were a request slipped in, the browser itself would refuse it."""
    browser.open(page, 1280)
    assert browser.run("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')") == "refused"
    messages = [json.dumps(event["params"]) for event in browser.events if event["method"] == "Log.entryAdded"]
    assert any("Content Security Policy" in message for message in messages)
