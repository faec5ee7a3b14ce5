"""A host's output, cut into lines for people. Pure.

A program that redraws a line (a progress bar) ends what it has drawn with a carriage return, or begins with one, and
may not write a line break for hours. Of such redraws the newest is shown, at most one a second.
"""

from __future__ import annotations

LONGEST_LINE_BYTES = 64 * 1024
REDRAW_S = 1.0


class Lines:
    """One stream of output. `feed` it what was read and ask `due` several times a second; both return lines to show."""

    def __init__(self) -> None:
        self._partial = b""  # the line that has not ended; of its redraws only the newest
        self._shown: bytes | None = None  # what of it has been shown
        self._shown_s = float("-inf")

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes; an overlong one is cut instead of growing without end."""
        *complete, partial = (self._partial + chunk).split(b"\n")
        shown = []
        for line in complete:
            text = _newest(line)
            if text != self._shown:
                shown.append(text)
            self._shown = None
        if b"\r" in partial:
            text, tail = _newest(partial), partial.rpartition(b"\r")[2]
            partial = b"\r" + tail if tail else text + b"\r"
        if len(partial) > LONGEST_LINE_BYTES:
            shown.append(_newest(partial))
            partial = b""
        self._partial = partial
        return shown

    def due(self, now_s: float) -> list[bytes]:
        """The newest redraw, if it is time for one. `now_s`: a monotonic clock."""
        if b"\r" not in self._partial or now_s < self._shown_s + REDRAW_S:
            return []
        text = _newest(self._partial)
        if text in (self._shown, b""):
            return []
        self._shown, self._shown_s = text, now_s
        return [text]

    def end(self) -> list[bytes]:
        """What the stream ended with, without a line break."""
        text, self._partial = _newest(self._partial), b""
        return [text] if text not in (self._shown, b"") else []


def _newest(line: bytes) -> bytes:
    """What a terminal would show of a line with carriage returns in it."""
    return next((text for text in reversed(line.split(b"\r")) if text), b"")
