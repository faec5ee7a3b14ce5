"""A process, named so that whoever is on the same machine can ask the kernel about it later. Linux; elsewhere nothing
is known of any.

The name holds the boot and the process namespace, in which alone a number means anything, and when the process started:
numbers are used again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from typing import Literal

State = Literal["", "here", "stopped", "ended"]
_PID = re.compile("[1-9][0-9]{0,8}")  # Linux has none above 4,194,304


def name_of(pid: int) -> str:
    """BOOT/NAMESPACE/PID/STARTED; '' where the kernel does not say."""
    found = _stat(pid)
    return f"{_place()}/{pid}/{found[1]}" if _place() and found else ""


def state_of(name: str) -> State:
    """What this machine's kernel says of the process: '' if it is another machine's, or the kernel does not say.
    `stopped`: by a signal, or by a debugger. `ended`: there is no such process any more."""
    place, _, rest = name.rpartition("/")[0].rpartition("/")
    started = name.rpartition("/")[2]
    if not place or place != _place() or not _PID.fullmatch(rest):
        return ""
    pid = int(rest)
    found = _stat(pid)
    if found is None:
        return "" if _is_there(pid) else "ended"  # /proc may be hidden from other users
    letter, began = found
    if began != started or letter in "ZX":
        return "ended"
    return "stopped" if letter in "Tt" else "here"


def started(pid: int) -> float | None:
    """When it was started, in seconds of the clock CLOCK_BOOTTIME."""
    found = _stat(pid)
    return int(found[1]) / os.sysconf("SC_CLK_TCK") if found else None


def _stat(pid: int) -> tuple[str, str] | None:
    """(its state's letter, when it was started)."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        words = file.read().rpartition(b")")[2].split()
        return words[0].decode(), words[19].decode()
    return None


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@functools.cache
def _place() -> str:
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()[:13]}/{os.readlink('/proc/self/ns/pid').strip('pid:[]')}"
    return ""
