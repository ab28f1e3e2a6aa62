"""Takes the pictures of the report's page in docs/pictures/, in a headless Chromium: python docs/page_pictures.py"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "reports" / "table-smollm2" / "report.html"
PICTURES = {"report-desk-light.png": (1300, False), "report-phone-dark.png": (390, True)}
"""Width of the window in px, and whether the system is dark."""
TOP = 1180

sys.path.insert(0, str(ROOT / "tests"))


def main() -> int:
    from browser import Browser, find_chromium

    program = find_chromium()
    if program is None:
        print("no Chromium on the path: the pictures stay as they are", file=sys.stderr)
        return 1
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, Browser(program, Path(profile)) as browser:
        for name, (width, dark) in PICTURES.items():
            browser.open(PAGE, width, dark=dark)
            browser.picture(folder / name, TOP)
    return 0


if __name__ == "__main__":
    sys.exit(main())
