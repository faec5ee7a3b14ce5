"""Text that was stored or sent by somebody else, made fit for a terminal, a log line or an error. Pure.

A terminal obeys what it is shown: an escape sequence in a host's name sets its title or clears it, a carriage return
writes over what was said before, and a bidirectional override makes a name look like another. So no text for people
leaves the program but through `printable`: `cli.render` for the commands, `OrchestratorError.__str__` for exceptions,
`events.emit` for log lines.
"""

from __future__ import annotations

import unicodedata

# Control characters (C0, DEL, C1), format characters (bidirectional, zero-width, tags), lone surrogates, and the two
# separators at which some programs break lines.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_OUR_BREAK = "\n  "


def printable(text: str, *, details: bool = False) -> str:
    """`text` with every character that is not to be seen as a backslash escape. What has been through here comes out
    unchanged the second time.

    details: a line break that two blanks follow is ours, and stays: that is how errors list what is wrong.
    """
    if text.isprintable():  # nearly always
        return text
    if details:
        return _OUR_BREAK.join(map(printable, text.split(_OUR_BREAK)))
    return "".join(_escaped(char) if unicodedata.category(char) in _ESCAPED else char for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def counted(number: int, one: str, several: str = "") -> str:
    """1 -> `1 step`, 2 -> `2 steps`; `several` where that is not `one` and an s."""
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def size(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """0.25 -> `0.25 s`, 200 -> `3 min 20 s`, 90000 -> `1 d 1 h`."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest_s, "s")]
    first = next(index for index, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
