"""`python -m orchestrator`, and the installed command `orchestrator`.

What `orchestrator launch` starts has the process to itself: its signals, its exceptions, its exit code. And a health
probe, `orchestrator launch health`, waits for none of the other commands' imports.
"""

from __future__ import annotations

import signal
import sys

from orchestrator.cli import launching


def entry() -> None:
    """The console script."""
    if sys.argv[1:2] == [launching.NAME]:
        sys.exit(launching.run(sys.argv[2:]))
    try:
        from orchestrator.cli.main import entry as command_line
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    command_line()


if __name__ == "__main__":
    entry()
