"""What a verification found, what it could not look at, and what it only noticed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import VerificationError


@dataclass
class Report:
    """findings: what is wrong, a line each: where, found, expected. skipped: what was not checked, and why. notes: what
    is no fault of the artifact. checked: {what: how many}."""

    artifact: str
    findings: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.findings

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else VerificationError.exit_code

    def find(self, *lines: str) -> None:
        self.findings += [line for line in lines if line not in self.findings]

    def skip(self, line: str) -> None:
        self.skipped.append(line)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def count(self, what: str, number: int = 1) -> None:
        self.checked[what] = self.checked.get(what, 0) + number

    def require(self) -> None:
        """Raises VerificationError with every finding."""
        if not self.passed:
            raise VerificationError("\n".join(self.findings), hint="make the artifact again, or fetch it again")

    def document(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "artifact": self.artifact,
            "passed": self.passed,
            "findings": self.findings,
            "not_checked": self.skipped,
            "notes": self.notes,
            "checked": self.checked,
        }

    def text(self) -> str:
        """The report for a terminal: findings first, the verdict last."""
        counted = ", ".join(f"{number} {what}" for what, number in self.checked.items()) or "nothing"
        lines = [f"wrong: {line}" for line in self.findings]
        lines += [f"note: {line}" for line in self.notes]
        lines += [f"not checked: {line}" for line in self.skipped]
        verdict = "passed" if self.passed else f"failed: {len(self.findings)} findings"
        return "\n".join([*lines, f"{self.artifact}: {verdict}; checked {counted}"])
