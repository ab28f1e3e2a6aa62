"""How a command ends: the result on stdout, or one message on stderr and the exit code that scripts rely on."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from quantkit.errors import DataError, QuantkitError, UsageError
from quantkit.quiet import debugging

INTERRUPTED = 130
BUG = 1


def show(document: Any, text: str | Callable[[], None], *, as_json: bool) -> None:
    """Print the one JSON document, or the text; a text that prints itself is called."""
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    elif isinstance(text, str):
        print(text)
    else:
        text()
    sys.stdout.flush()


def report_failure(error: BaseException, *, as_json: bool) -> int:
    """Say what went wrong on stderr, and on stdout as {"error": ...} for --json. Returns the exit code."""
    if isinstance(error, BrokenPipeError):
        # whoever read the output has enough; a second failure at interpreter exit would say so again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else BUG
    if type(error).__name__ == "NoArgsIsHelpError":  # no command was given: the answer is the help
        print(error, file=sys.stderr)
        return UsageError.exit_code
    known = _known(error)
    if debugging() and not isinstance(known, UsageError):
        traceback.print_exception(error)
    if isinstance(known, int):
        kind, message, hint, code = "Interrupted", "interrupted", None, known
    elif known is None:
        kind, code = type(error).__name__, BUG
        message = f"a bug in quantkit: {kind}: {error}"
        hint = "QUANTKIT_DEBUG=1 shows the traceback; please report it with the command that led here"
    else:
        kind, message, hint, code = type(known).__name__, known.message, known.hint, known.exit_code
    print(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), file=sys.stderr)
    if as_json:
        failure = {"kind": kind, "message": message, "hint": hint, "exit_code": code}
        print(json.dumps({"error": failure}, indent=2, ensure_ascii=False), flush=True)
    return code


def _known(error: BaseException) -> QuantkitError | int | None:
    """The error a user can act on, the exit code of an interruption, or None for a bug."""
    if isinstance(error, QuantkitError):
        return error
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt) or name == "Abort":
        return INTERRUPTED
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # how typer says that the usage is wrong
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "quantkit"
        return UsageError(error.format_message(), hint=f"`{command} --help` shows what it takes")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or "the disk"
        return DataError(f"{where}: no space left on the device", hint="free some space or give --out on another disk")
    return None
