"""What a launcher leaves out of its hosts' output: what says nothing, or says the same once more. Their logs have all.

Gloo prints a line for each process that has found all others. And a Ctrl-C, passed to every host, makes each of those
that are not joined yet print a traceback of wherever it was: of these people are shown the first one whole, and of each
other its last line. No traceback of anything else is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# Written in pieces: of two devices of one process they may come between each other, on one line.
_GLOO = re.compile(
    r"(\[Gloo\] Rank |\d+| is connected to | peer ranks\. |Expected number of connected peer ranks is : )+"
)
_CONNECTED, _PEERS = re.compile(r"is connected to (\d+) "), re.compile(r"peer ranks is : (\d+)")
_BEGINS = "Traceback (most recent call last):"
_LINKS = ("During handling of the above exception", "The above exception was the direct cause")
_ERROR = re.compile(r"[\w.]*(Error|Exception)\b.*")  # as extensions print one, without a traceback
_HELD_MAX = 2000  # lines of one traceback


def _all_connected(line: str) -> bool:
    return bool(_GLOO.fullmatch(line)) and len({*_CONNECTED.findall(line), *_PEERS.findall(line)}) == 1


@dataclass
class _Host:
    """held: the lines of a traceback that has not ended. chained: whether the one before came of a Ctrl-C, and what
    follows may still come of it. linked: Python has said that the next one does."""

    held: list[str] = field(default_factory=list)
    chained: bool = False
    linked: bool = False


class Noise:
    """Of all hosts of a job. interrupted: Ctrl-C was passed to them."""

    def __init__(self) -> None:
        self.interrupted = False
        self._shown = False  # a traceback, since then
        self._hosts: dict[str, _Host] = {}

    def without(self, host: str, line: str) -> list[str]:
        """What is to be shown now that `host` has said `line`; of a traceback nothing until it has ended."""
        if _all_connected(line):
            return []
        if not self.interrupted:
            return [line]
        known = self._hosts.setdefault(host, _Host())
        if known.held:
            known.held.append(line)
            if line[:1] in ("", " ") and len(known.held) < _HELD_MAX:
                return []
            return self._ended(known, line)
        if line == _BEGINS:
            known.chained, known.linked = known.chained and known.linked, False
            known.held.append(line)
            return []
        if known.chained and (not line or line.startswith(_LINKS)):
            known.linked |= bool(line)
            return []
        known.chained = known.chained and _ERROR.fullmatch(line) is not None
        return [line]

    def _ended(self, known: _Host, last: str) -> list[str]:
        lines, known.held = known.held, []
        known.chained = known.chained or last.split(":")[0] == "KeyboardInterrupt"
        if known.chained and self._shown:
            return [last]
        self._shown = True
        return lines

    def rest(self, host: str) -> list[str]:
        """What `host` has not finished to say, and never will."""
        known = self._hosts.pop(host, _Host())
        return known.held
