"""What the processes of a job tell each other about their ends: the keys and the encoding, and nobody else knows them.

Best effort, any thread, without JAX: the board itself is the coordination service's key-value store (`rendezvous`).
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Protocol

_FAILED, _ACKNOWLEDGED, _LEAVING, _GONE = (
    f"orchestrator/{what}/" for what in ("failed", "acknowledged", "leaving", "gone")
)


class Board(Protocol):
    """`post` and `poll` are best effort, take a second at most and never raise. `connected`: False once JAX has left
    the job. `skip_exit_barrier`: JAX's exit handler waits for nobody."""

    process: int
    count: int

    @property
    def connected(self) -> bool: ...

    def post(self, key: str, value: str) -> None: ...

    def poll(self, prefix: str) -> dict[str, str]: ...

    def skip_exit_barrier(self) -> None: ...


@dataclass(frozen=True)
class ProcessFailure:
    """What ended `process`, on `host`. `signum`: it is to end by that signal, as Python does after a Ctrl-C."""

    process: int
    host: str
    text: str
    code: int
    signum: int = 0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> ProcessFailure:
        """Raises ValueError, TypeError or KeyError for what is none."""
        body = json.loads(text)
        return cls(int(body["process"]), str(body["host"]), str(body["text"]), int(body["code"]), int(body["signum"]))


class FailureBoard:
    """The board as this process writes and reads it."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self.process, self.count = board.process, board.count
        self.others = frozenset(range(board.count)) - {board.process}

    @property
    def connected(self) -> bool:
        return self._board.connected

    def skip_exit_barrier(self) -> None:
        self._board.skip_exit_barrier()

    def report(self, failure: ProcessFailure) -> None:
        """This process has failed."""
        self._board.post(f"{_FAILED}{failure.process}", failure.encode())

    def first_failure(self) -> ProcessFailure | None:
        """Of the other processes' failures that have been reported, one: that of the lowest key."""
        for _, text in sorted(self._board.poll(_FAILED).items()):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                failure = ProcessFailure.decode(text)
                if failure.process != self.process:
                    return failure
        return None

    def acknowledge(self) -> None:
        """This process knows of a failure and ends with it."""
        self._board.post(f"{_ACKNOWLEDGED}{self.process}", "")

    def leave(self) -> None:
        """This process's program has ended, and waits for the others to get there."""
        self._board.post(f"{_LEAVING}{self.process}", "")

    def go(self) -> None:
        """This process's last sign: it ends now, and needs the board no more."""
        self._board.post(f"{_GONE}{self.process}", "")

    def leaving(self) -> set[int]:
        return self._processes(_LEAVING)

    def gone(self) -> set[int]:
        return self._processes(_GONE)

    def ending(self) -> set[int]:
        """Processes that have shown that they are on their way to their end."""
        return self._processes(_ACKNOWLEDGED) | self._processes(_LEAVING) | self._processes(_FAILED)

    def _processes(self, prefix: str) -> set[int]:
        return {int(name) for name in self._board.poll(prefix) if name.isdecimal()}
