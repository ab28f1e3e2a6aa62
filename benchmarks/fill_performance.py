"""Puts the committed comparisons into docs/performance.md: all of benchmarks/results/*.json that `compare` wrote.

    python benchmarks/fill_performance.py            writes
    python benchmarks/fill_performance.py --check    writes nothing, exits with 1 when the page is out of date

What stands outside the markers is left as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from quantkit.reference.table import document, load
from quantkit.report.markdown import document_markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- comparisons -->", "<!-- /comparisons -->"
ORDER = ("gptq", "gptq_asymmetric", "awq", "nf4", "int8")


def comparisons() -> list[Path]:
    """The results files of `compare`, in the order of the page; other files in the folder are not its business."""
    found = [
        path
        for path in RESULTS.glob("*.json")
        if "rows" in (content := json.loads(path.read_text())) and "job" in content
    ]
    place = {name: index for index, name in enumerate(ORDER)}
    return sorted(found, key=lambda path: (place.get(path.stem, len(place)), path.stem))


def filled(page: str) -> str:
    """The page with the tables between its markers, headings one level down."""
    tables = [document_markdown(document(load(path))) for path in comparisons()]
    body = re.sub(r"^#", "##", "\n".join(tables), flags=re.MULTILINE).strip()
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{PAGE}: no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{body}\n{END}{after}"


def main() -> None:
    page = PAGE.read_text()
    wanted = filled(page)
    if "--check" in sys.argv[1:]:
        sys.exit(page != wanted and f"{PAGE.name} is out of date: python benchmarks/fill_performance.py")
    PAGE.write_text(wanted)


if __name__ == "__main__":
    main()
