"""How text is laid out on a terminal: sentences are cut at blanks, rows of tables never. Elsewhere each is one line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

_BENEATH = 4  # blanks before a text for which a row has no room


def wrapped(line: Text, width: int, indent: int) -> list[Text]:
    """`line` in as many lines as it takes. It is cut at blanks only: a path or a command that is copied stays whole."""
    if cell_len(line.plain) <= width:
        return [line]
    room = max(width, indent + 20)
    parts = textwrap.wrap(
        line.plain, room, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return [Text(part, style=line.style) for part in parts]


def indent_after(line: str) -> int:
    """Of the lines that go on with `line`: a little more than its own."""
    return len(line) - len(line.lstrip(" ")) + 2


@dataclass(frozen=True)
class Hanging:
    """A sentence; if it takes several lines, all but the first begin after `indent` blanks."""

    line: Text
    indent: int

    @classmethod
    def of(cls, line: Text) -> Hanging:
        return cls(line, indent_after(line.plain))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        yield from wrapped(self.line, options.max_width, self.indent) if console.is_terminal else [self.line]


@dataclass(frozen=True)
class Rows:
    """A table whose last column is text of any length: where it does not fit beside its row, it is beneath it."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Text]]
    right: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = options.max_width if console.is_terminal else None
        fixed = len(self.columns) - 1
        lines = [[Text(name, style="bold") for name in self.columns], *self.rows]
        widths = [max(cell_len(line[index].plain) for line in lines) for index in range(fixed)]
        for line in lines:
            row = Text()
            for index, cell in enumerate(line[:fixed]):
                row.append_text(self._padded(cell, widths[index], self.columns[index])).append("  ")
            text = line[fixed]
            if width is None or cell_len(row.plain) + cell_len(text.plain) <= width:
                row.append_text(text)
                text = Text()
            row.rstrip()
            yield row
            if text:
                indented = Text(" " * _BENEATH + text.plain, style=text.style)
                yield from wrapped(indented, width or 0, _BENEATH)

    def _padded(self, cell: Text, width: int, column: str) -> Text:
        blanks = Text(" " * (width - cell_len(cell.plain)))
        return Text.assemble(blanks, cell) if column in self.right else Text.assemble(cell, blanks)


def fitted(parts: Iterable[str], width: int) -> Iterator[str]:
    """Clauses of one sentence in as few lines of `width` as hold them; each clause stays whole while it fits."""
    line = ""
    for part in parts:
        if line and len(line) + 2 + len(part) > width:
            yield f"{line};"
            line = f"  {part}"
        else:
            line = f"{line}; {part}" if line else part
    yield line
