"""Which exit code an error ends a process with, and how the error is described to the other processes."""

from __future__ import annotations

import signal

from orchestrator.errors import EXIT_FAILED, OrchestratorError

TEXT_CHARS_MAX = 1000


def exit_code(error: BaseException) -> int:
    """What a process that `error` ends should leave with; 0 if it is no failure."""
    match error:
        case OrchestratorError():
            return error.exit_code
        case KeyboardInterrupt():
            return 128 + signal.SIGINT
        case SystemExit(code=None):
            return 0
        case SystemExit(code=int() as code):
            return code & 0xFF
    return EXIT_FAILED


def describe(error: BaseException) -> str:
    """Its type and its words, at most about TEXT_CHARS_MAX characters of them. Never raises."""
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r:.{TEXT_CHARS_MAX}})"
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # of an exception of the program's
        text = ""
    return f"{name}: {text}"[:TEXT_CHARS_MAX] if text else name
