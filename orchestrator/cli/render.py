"""Tables for people, JSON for programs. Nothing here reads a run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 200  # a program reads it: nothing may be cut off


def _console(to: Any) -> Console:
    return Console(file=to, width=None if to.isatty() else _PIPE_WIDTH, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """A line for people, on standard output."""
    _console(sys.stdout).print(Text(text))


def give(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, sort_keys=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A plain table. `right`: columns of numbers. Styles show on terminals only."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, no_color=None
    )
    console.print(drawn)


def size(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def moment(seconds: float) -> str:
    """Seconds since 1970 as local time, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def number(value: float) -> str:
    return f"{value:.5g}"


class Bar:
    """Counts files done, on a terminal only."""

    def __init__(self, progress: Progress | None, about: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(about, total=total) if progress else None

    def step(self, key: str) -> None:
        if self._progress and self._task is not None:
            self._progress.advance(self._task)


def progress() -> AbstractContextManager[Progress | None]:
    """A progress display on standard error where that is a terminal."""
    if not sys.stderr.isatty():
        return nullcontext(None)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr), transient=True)
