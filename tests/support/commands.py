"""The command line, called in this process."""

from __future__ import annotations

from orchestrator.cli.main import main


def orchestrator(*words: object) -> int:
    """Run `orchestrator WORD...` and return its exit code."""
    return main(["orchestrator", *map(str, words)])
