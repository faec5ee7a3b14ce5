"""What the kernel does on SIGTERM, asked and told through libc: handlers that C++ has installed, as JAX does, are
unknown to Python's `signal`.

Any thread may call these. The struct is that of glibc and musl on 64-bit Linux; elsewhere `action` is None, and nobody
changes anything.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


class SigAction(ctypes.Structure):
    """`struct sigaction`, see sigaction(2). A new one is the default action: it has no handler."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _DlInfo(ctypes.Structure):
    """`Dl_info`, see dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


_SA_RESETHAND = 0x80000000 - 2**32  # as a signed int
_READABLE = sys.platform.startswith("linux") and ctypes.sizeof(ctypes.c_void_p) == 8


def action() -> SigAction | None:
    """The action on SIGTERM; None where it cannot be told."""
    found = SigAction()
    if not _READABLE or ctypes.CDLL(None).sigaction(signal.SIGTERM, None, ctypes.byref(found)) != 0:
        return None
    return found


def set_action(chosen: SigAction) -> None:
    """Only where `action` is not None."""
    ctypes.CDLL(None).sigaction(signal.SIGTERM, ctypes.byref(chosen), None)


def reset_after_first() -> None:
    """Let the kernel put SIGTERM back to its default once the handler has run: a second one ends the process at once. A
    handler of Python's runs only when the main thread is back in the interpreter; SA_RESETHAND needs no thread. Where
    the kernel cannot be told, a second SIGTERM is as the first."""
    if (current := action()) and current.handler:
        current.flags |= _SA_RESETHAND
        set_action(current)


def is_jaxs(given: SigAction | None) -> bool:
    """Whether the handler's code is in one of jaxlib's libraries."""
    if given is None or (given.handler or 0) <= 1:
        return False
    found = _DlInfo()
    try:
        known = ctypes.CDLL(None).dladdr(ctypes.c_void_p(given.handler), ctypes.byref(found))
    except AttributeError:  # an older libc keeps it elsewhere
        return False
    return bool(known and found.file and "jaxlib" in os.fsdecode(found.file).split(os.sep))


def call_handler(given: SigAction, number: int) -> None:
    """Run the handler as the kernel would."""
    ctypes.CFUNCTYPE(None, ctypes.c_int)(given.handler)(number)
