"""Which processes sign one receipt together, and the bounds of it. Pure.

In a job of thousands of processes the store takes receipts more slowly than hosts write them: a bucket begins with a
thousand objects a second. So the processes of a group hand theirs to the group's first one, the *leader*, which stores
all of them as one object. Process 0 reads that object as it reads a receipt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

GROUPS_FROM = 2048  # processes: fewer are as quick alone (`benchmarks.simulate`)
GROUP_SIZE = 64
PART_BYTES_MAX = 4 << 20  # of a receipt that is handed over: 64 of them fit into a record
_POSTED_BYTES_MAX = 1 << 20  # of one message: a signal must be through within a second
_ALL_POSTED_BYTES_MAX = 256 << 20  # of all: the coordination service is in process 0's memory
_SIGN_S = 5.0  # how long a receipt waits at its leader for those of the others
_HAND_S = 10.0  # how long a process waits for its leader before it stores its receipt itself


@dataclass(frozen=True)
class Group:
    """members: in order; the first is the leader."""

    members: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.members[0]


@dataclass(frozen=True)
class Bounds:
    """sign_s: after so long a leader stores what it has. hand_s: after so long a member stores its receipt itself."""

    sign_s: float
    hand_s: float


def group_of(process: int, count: int, slices: Sequence[int] = (), size: int | None = None) -> Group | None:
    """The group of `process`, of `count`; None if it signs alone. slices: each process's slice, where they are known:
    a group is of one slice, so that a slice which is lost takes no other's receipts with it. size: instead of the
    usual one; 0: no groups. The same on all processes.

    Process 0 signs alone: it makes its receipt and the directory that names it durable before it commits.
    """
    if size is None:
        size = GROUP_SIZE if count >= GROUPS_FROM else 0
    if process == 0 or size < 2:
        return None
    own = slices[process] if slices else 0
    alike = [other for other in range(1, count) if not slices or slices[other] == own]
    first = alike.index(process) // size * size
    members = tuple(alike[first : first + size])
    return Group(members) if len(members) > 1 else None


def like(group: Group | None, process: int, count: int) -> int:
    """How many processes do in a save what this one does: leaders, for whom the commit waits, are few."""
    return count // len(group.members) if group and process == group.leader else count


def bounds(save_timeout_s: float) -> Bounds:
    """A dead leader must not have its members counted as silent: they store their receipts well before the deadline."""
    return Bounds(min(_SIGN_S, save_timeout_s / 8), min(_HAND_S, save_timeout_s / 4))


def posted_bytes_max(count: int) -> int:
    """How large a message with a receipt may be, in a job of `count` processes."""
    return min(_POSTED_BYTES_MAX, _ALL_POSTED_BYTES_MAX // count)
