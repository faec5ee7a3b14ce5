"""Tables for people, JSON for programs. Nothing here reads a run.

All that a command shows goes through here, and every text for people through `texts.printable`: what a run has stored
may not speak to the terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestrator.cli.layout import Hanging, Rows, indent_after, wrapped
from orchestrator.observe.bar import Bar, Unit
from orchestrator.texts import counted as counted
from orchestrator.texts import duration as duration
from orchestrator.texts import printable
from orchestrator.texts import size as size

_PIPE_WIDTH = 200  # a program reads it: nothing may be cut off
_AGES = ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"))


Shown = str | Text | Hanging | Rows | Table  # what people are shown of a result, one piece: a line or a table
Cell = str | Text  # of a table
Tone = Literal["bad", "warn", "good", "dim", "plain"]
_STYLES: dict[Tone, str] = {"bad": "bold red", "warn": "yellow", "good": "green", "dim": "dim", "plain": ""}
# Colour only repeats what a word says. These words have one, in whatever table they are.
_TONES: dict[str, Tone] = {
    **dict.fromkeys(("damage", "damaged", "quarantined", "bad", "frozen", "aborted", "unreadable", "lost"), "bad"),
    **dict.fromkeys(("warn", "warning", "slow", "late", "stuck"), "warn"),
    **dict.fromkeys(("ok", "good", "verified", "restored", "committed", "restorable", "healthy"), "good"),
}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the program with 1; `entry` knows what it means


def _console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for programs. Styles show on terminals only."""
    terminal = sys.stdout.isatty()  # rich itself leaves out colours, but not words, where NO_COLOR is set
    width = None if terminal else _PIPE_WIDTH
    return _Console(file=sys.stdout, width=width, force_terminal=terminal, highlight=False)


def screen() -> tuple[int, int] | None:
    """Columns and lines of the terminal that standard output is; None if it is none."""
    size = shutil.get_terminal_size()
    return (size.columns, size.lines) if sys.stdout.isatty() else None


def words(text: str, style: str = "") -> Text:
    """One line of text, whatever is in it."""
    return Text(printable(text), style=style)


def toned(text: str, tone: Tone | None = None) -> Text:
    """`text` in the colour of `tone`; None: of the word that it is, or begins with (`ok`, `BAD`, `quarantined: ...`).
    For lines and for cells of tables. Shows on terminals only."""
    if tone is None:
        tone = _TONES.get(text.lower()) or _TONES.get(text.lower().split(":")[0].split(" ")[0], "plain")
    return words(text, style=_STYLES[tone])


def write(pieces: Iterable[Shown]) -> None:
    """What people are to see, on standard output, each piece as soon as it is there."""
    for piece in pieces:
        # Soft: rich itself cuts no word of a sentence in two.
        _console().print(_drawn(piece), soft_wrap=not isinstance(piece, Table))


def follow(pages: Iterable[Iterable[Shown]]) -> None:
    """One page after another, each in the place of the one before, on a terminal."""
    with Live(console=_console(), auto_refresh=False) as live:
        for page in pages:
            live.update(Group(*map(_drawn, page)), refresh=True)


def _drawn(piece: Shown) -> Hanging | Rows | Table:
    if isinstance(piece, str):
        piece = words(piece)
    return Hanging.of(piece) if isinstance(piece, Text) else piece


def write_error(text: str) -> None:
    """What went wrong, for people, on standard error: one line, and one for each detail. A terminal gets as many as
    they take."""
    for line in printable(text, details=True).split("\n"):
        shown = [line]
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            shown = [part.plain for part in wrapped(Text(line), columns, indent_after(line))]
        print(*shown, sep="\n", file=sys.stderr)


def write_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(document(value))


def document(value: Any) -> str:
    """In ASCII: what is not to be seen is a JSON escape."""
    return json.dumps(value, indent=2, sort_keys=False)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Cell]], right: Sequence[str] = (), cut: bool = False
) -> Table:
    """A plain table; cells are text, or `toned` text. `right`: columns of numbers. `cut`: each
    row is one line, however narrow the screen."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        drawn.add_column(column, justify=justify, overflow="ellipsis" if cut else "fold", no_wrap=cut)
    for row in rows:
        drawn.add_row(*(words(cell) if isinstance(cell, str) else cell for cell in row))
    return drawn


def hanging(text: str, indent: int, tone: Tone = "plain") -> Hanging:
    """A sentence in the colour of `tone`, whose later lines, if it takes any, begin after `indent` blanks."""
    return Hanging(toned(text, tone), indent)


def rows(columns: Sequence[str], cells: Iterable[Sequence[Cell]], right: Sequence[str] = ()) -> Rows:
    """A table whose last column is text of any length, such as a reason."""
    return Rows(columns, [[words(cell) if isinstance(cell, str) else cell for cell in row] for row in cells], right)


def moment(seconds: float) -> str:
    """Seconds since 1970 as local time, to the second, with its zone: who reads it may be elsewhere."""
    local = time.localtime(seconds)
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', local)} {zone(local.tm_gmtoff)}"


def zone(offset_s: int) -> str:
    """0 -> `UTC`, 19800 -> `+05:30`."""
    minutes = abs(offset_s) // 60
    return "UTC" if offset_s == 0 else f"{'-' if offset_s < 0 else '+'}{minutes // 60:02d}:{minutes % 60:02d}"


def age(seconds: float) -> str:
    """0.25 -> `now`, 200 -> `3 min ago`, 90000 -> `1 d ago`: one unit, for tables."""
    if seconds < 1:
        return "now"
    return next(f"{seconds / unit_s:.0f} {unit} ago" for unit_s, unit in _AGES if seconds >= unit_s)


def rough(seconds: float) -> str:
    """0.25 -> `<1 s`, 3.68 -> `4 s`, 200 -> `3 min 20 s`: for a screen that changes every second."""
    return "<1 s" if seconds < 1 else f"{seconds:.0f} s" if seconds < 10 else duration(seconds)


def metrics(values: Mapping[str, float]) -> str:
    return " ".join(f"{name}={value:.5g}" for name, value in values.items())


def bar(about: str, total: int | None, unit: Unit = "items") -> Bar:
    """How far a work has come, on standard error where that is a terminal. A context: afterwards it is gone."""
    return Bar(about, total, unit, shown=sys.stderr is not None and sys.stderr.isatty())
