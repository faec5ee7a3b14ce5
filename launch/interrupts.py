"""The signals by which people and systems stop a launcher, as something a selector can wait for."""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Collection
from types import FrameType

OPERATOR_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# `timeout` signals its child and then its child's group: one wish, and a second one would kill.
SAME_MOMENT_S = 0.02


class OperatorSignals:
    """Turns signals into bytes on `receiver`; puts the old handlers back afterwards. Main thread.

    A signal that was ignored when we started stays ignored, here and in the hosts: that is how `nohup` protects from
    SIGHUP, and a shell's background jobs from Ctrl-C. `ignored` says which.
    """

    def __enter__(self) -> OperatorSignals:
        self.receiver, self._sender = socket.socketpair()
        self.receiver.setblocking(False)
        self._sender.setblocking(False)
        self._children = False
        self._old_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self.ignored = frozenset(number for number in OPERATOR_SIGNALS if signal.getsignal(number) == signal.SIG_IGN)
        taken: Collection[signal.Signals] = {*OPERATOR_SIGNALS, signal.SIGCHLD} - self.ignored
        self._old = {number: signal.signal(number, self._nothing) for number in taken}
        return self

    @staticmethod
    def _nothing(_signum: int, _frame: FrameType | None) -> None:
        """The byte in the wakeup socket is all that is expected."""

    def received(self) -> list[int]:
        """The operator's signals since the last call, each one once."""
        found = self._read()
        if found:
            time.sleep(SAME_MOMENT_S)
            found += self._read()
        return list(dict.fromkeys(found))

    def child_ended(self) -> bool:
        """True once after a SIGCHLD."""
        ended, self._children = self._children, False
        return ended

    def _read(self) -> list[int]:
        try:
            numbers = self.receiver.recv(4096)
        except BlockingIOError:
            return []
        self._children = self._children or signal.SIGCHLD in numbers
        return [number for number in numbers if number in OPERATOR_SIGNALS]

    def wait(self, timeout_s: float) -> int | None:
        """Wait for an operator's signal and return it; None if none came."""
        end = time.monotonic() + timeout_s
        while True:
            if found := self.received():
                return found[0]
            left_s = end - time.monotonic()
            if left_s <= 0:
                return None
            select.select([self.receiver], [], [], left_s)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self.receiver.close()
        self._sender.close()
