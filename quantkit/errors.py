"""The errors a user can cause, each with the exit code that scripts may rely on.

Exit codes: 0 done, 2 usage or recipe, 3 model or data, 4 a missing engine or dependency, 5 a gate failed,
6 verification failed, 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

from collections.abc import Iterable


class QuantkitError(Exception):
    """A problem the user can act on: what is wrong and where, and a hint on how to mend it.

    The message says where, what was found and what was expected. `hint` says what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def render(self) -> str:
        """The text for a terminal: the message, then the hint on a line of its own."""
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class UsageError(QuantkitError):
    """The command line or the place named for output cannot be used."""

    exit_code = 2


class RecipeError(QuantkitError):
    """A recipe, suite or setting is wrong; all problems of one file are reported at once."""

    exit_code = 2

    @classmethod
    def from_problems(cls, problems: Iterable[str], hint: str | None = None) -> RecipeError:
        return cls("\n".join(problems), hint=hint)


class ModelError(QuantkitError):
    """A model, tokenizer or tensor is missing, damaged or of a kind that is not supported."""

    exit_code = 3


class DataError(QuantkitError):
    """A calibration set, an evaluation text or the disk cannot provide what the run needs."""

    exit_code = 3


class HubError(QuantkitError):
    """The hub refused what was asked of it, or cannot be reached."""

    exit_code = 3


class MissingDependencyError(QuantkitError):
    """An engine or an optional package is not installed, or cannot run on this machine."""

    exit_code = 4


class GateError(QuantkitError):
    """A measured figure is outside the bar that was set for it."""

    exit_code = 5


class Interrupted(QuantkitError):
    """Someone outside ended the run; the message says what was kept."""

    exit_code = 130


class VerificationError(QuantkitError):
    """An artifact is not what its manifest says it is."""

    exit_code = 6
