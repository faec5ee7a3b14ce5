"""A Ctrl-C that Python had to ignore comes again.

Python raises KeyboardInterrupt wherever the main thread happens to be. In a callback of the garbage collector (JAX has
one) or in a `__del__` nobody can raise it any further: Python prints "Exception ignored in ..." and the program goes
on, as if nobody had pressed anything.
"""

from __future__ import annotations

import _thread
import sys
import time

AGAIN_S = 0.05  # until the main thread is out of the callback


def install() -> None:
    """From now on. Idempotent; a hook that is there, or comes later and calls the one before it, stays in use."""
    if getattr(sys.unraisablehook, "interrupts_again", False):
        return
    before = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs, /) -> None:
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            before(ignored)
            return
        # Not by `threading`: whatever is interrupted may hold one of its locks.
        try:
            _thread.start_new_thread(_interrupt_again, ())
        except RuntimeError:  # no more threads: the program ends
            before(ignored)

    hook.interrupts_again = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook


def _interrupt_again() -> None:
    time.sleep(AGAIN_S)
    _thread.interrupt_main()  # as SIGINT would: nothing where that is ignored
