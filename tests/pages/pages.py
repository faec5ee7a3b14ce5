"""The pages' fenced blocks, and running their commands.

python -m tests.pages.pages PAGE    runs the page's `sh` blocks in a fresh directory, and prints how long each took
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_TIMEOUT_S = 180


@dataclass(frozen=True)
class Block:
    """`line`: how many lines of the page come before its source."""

    language: str
    source: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(found[2], textwrap.dedent(found[3]), text.count("\n", 0, found.start(3)))
        for found in FENCE.finditer(text)
    ]


def commands(text: str) -> list[str]:
    """Every command of the page's `sh` blocks, in order; a backslash at a line's end joins it with the next."""
    sources = (block.source.replace("\\\n", " ") for block in blocks(text) if block.language == "sh")
    return [" ".join(line.split()) for source in sources for line in source.splitlines() if line.strip()]


def run(command: str, directory: Path) -> tuple[float, str]:
    """(seconds, output) of one command. Raises AssertionError with its output if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=directory,
        env=environ,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    took_s = time.monotonic() - started
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return took_s, done.stdout


def main(page: str) -> None:
    print("| command | seconds |\n|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        total_s = 0.0
        for command in commands(Path(page).read_text()):
            took_s, _ = run(command, Path(directory))
            total_s += took_s
            print(f"| `{command}` | {took_s:.1f} |", flush=True)
        print(f"| together | {total_s:.1f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
