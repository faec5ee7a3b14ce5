"""What a campaign's job says of itself, and how it ends."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from launch import contract as contracts


class Story:
    """Lines of JSON of one process in PATH.<index>. A kill loses none; `durable`: nor does the machine's end."""

    def __init__(
        self, path: str, index: int, restart: int, *, durable: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        # O_SYNC, not fsync: that one may be what a round makes fail.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_SYNC if durable else 0)
        self._file = os.open(f"{path}.{index}", flags, 0o666)
        self._index, self.restart, self._clock = index, restart, clock

    def say(self, event: str, **more: object) -> None:
        line = {"event": event, "process": self._index, "restart": self.restart, "time": self._clock(), **more}
        os.write(self._file, json.dumps(line).encode() + b"\n")


def leave(main: Callable[[], int]) -> NoReturn:
    """End the process with what `main` returns."""
    try:
        code = main()
    except Exception as error:  # JAX's own: a collective whose peer has died, for one
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    contracts.leave(code)
