"""Ends a launcher's process groups if the launcher itself dies without a word (SIGKILL, out of memory).

Run as a script of its own, in a session of its own, with a pipe from the launcher on standard input: a line `+PGID`
takes a group into its care, `-PGID` lets it go, end of file means that the launcher is gone. May import nothing of the
package: it is started with `-I -S` and must be up in milliseconds.
"""

import contextlib
import os
import signal
import sys


def _guard() -> None:
    groups: set[int] = set()
    for line in sys.stdin.buffer:
        group = int(line[1:])
        (groups.add if line[:1] == b"+" else groups.discard)(group)
    for group in groups:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself in the meantime
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    # Whatever ends the launcher must not end its warden first.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    _guard()
