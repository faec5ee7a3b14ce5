"""What of a host's memory is freed, and when: by `held.to_free`, and before a step for which there is no room.

Freed is never what may still be the newest whole step somewhere: see that rule. Each process frees in its own part, the
first one of a host also in what lies beside.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence

from absl import logging

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.rules import held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head, LiveStep
from orchestrator.run import prefetched, tier_directory
from orchestrator.run.tier import Beside, OwnTier
from orchestrator.run.tier_room import NoRoom, Reservation, Room, Seen


class Keeper:
    """What of this host's memory is freed, and when. own: this process's. beside: all else on the host, for its first
    process; None on the others. epoch: of this incarnation. listed: what all logs said is held when it was opened.
    decides: whether this is process 0, whose log it is. host: what people call it. processes: how many hold here."""

    def __init__(
        self,
        own: OwnTier,
        beside: Beside | None,
        epoch: int,
        listed: Collection[AttemptId],
        *,
        decides: bool = False,
        host: str = "this host",
        processes: int = 1,
    ) -> None:
        self.own, self._beside, self._epoch, self._decides = own, beside, epoch, decides
        self._host, self._processes = host, processes
        self.room = Room(os.path.dirname(own.path))
        self._reserved: dict[AttemptId, Reservation] = {}
        self._ended: set[AttemptId] = set()
        self._listed = frozenset(listed)
        self._decided: set[AttemptId] = set()

    def decided(self, attempt: AttemptId, log: Head) -> None:
        """An attempt of this incarnation has ended here, and this is process 0's log since. Whether process 0 has ended
        it, too, may not be in it yet: then it is taken for over when a later one is, as there is one at a time."""
        is_over = journal.is_live(log, attempt) or journal.is_retired(log, attempt) or self._decides
        self._ended.add(attempt)
        if is_over:
            self._decided |= self._ended
            self._ended = set()
        now = {one.id for one in log.live} | {one.id for one in self.own.live()}
        if any(one.epoch == self._epoch for one in now):
            self._listed = frozenset(now)
        found = self._found()
        self._decided = {one for one in self._decided if one in found or one == attempt}

    def _found(self) -> dict[AttemptId, int]:
        found = self.own.attempts()
        for attempt, size in (self._beside.attempts() if self._beside else {}).items():
            found[attempt] = found.get(attempt, 0) + size
        return found

    def free(self, *, for_room: bool = False) -> None:
        """What nobody can come back on any more; also what was fetched for this incarnation's restore, once it has held
        a step: then all have restored. Never raises."""
        try:
            # First what has ended, and then the log: a step that another thread enters meanwhile is in the log before
            # it counts as ended. The other way about it would be ended and not held.
            decided = frozenset(self._decided)
            listed = self._listed | {one.id for one in self.own.live()}
            gone = held.to_free(self._found(), listed, epoch=self._epoch, decided=decided, for_room=for_room)
        except OrchestratorError as error:
            logging.warning("%s: what is not held any more stays for now: %s", self.own.path, error)
            return
        self._drop(gone)
        if self._beside and (for_room or any(one.epoch == self._epoch for one in listed)):
            prefetched.forget(prefetched.beside(self.own.path))

    def unpin(self, attempt: AttemptId) -> None:
        """It is needed for the store no more: free it, if it has ended and is not held either. Never raises."""
        self.own.pinned.discard(attempt)
        self.free()

    def _drop(self, gone: Sequence[AttemptId]) -> None:
        self.own.free(gone)
        if self._beside and gone:
            self._beside.free(gone)

    def release(self, attempts: Collection[AttemptId], reason: str) -> None:
        """Hold these steps no more, and free what is here of them, copies too. Raises Fenced, StorageError."""
        self.own.release(attempts, reason)
        if self._beside:
            self._beside.free(sorted(attempts))

    def make_room(self, attempt: AttemptId, need: int, incoming: int) -> None:
        """Before this process writes `need` bytes of an attempt, and `incoming` bytes of copies come: release older
        steps, as far as it takes, and reserve it until `settled`. Raises StorageError saying what is needed and what
        there is: mostly nothing was released then. Raises Fenced."""
        count = self._shortage(attempt, need, incoming)
        if count != 0:
            self.free(for_room=True)
            count = self._shortage(attempt, need, incoming)
        if count is None:
            raise StorageError(self._no_room(self.room.look(), need, incoming))
        if count:
            self.release([live.id for live in self._releasable()[:count]], "room")
        try:
            reserved = self.room.reserve(need, tier_directory.process_of(self.own.path), attempt)
        except NoRoom as error:
            raise StorageError(self._no_room(error.seen, need, incoming)) from error
        self._reserved[attempt] = reserved

    def settled(self, attempt: AttemptId) -> None:
        """This process writes no more of it. Never raises."""
        if reserved := self._reserved.pop(attempt, None):
            reserved.end()

    def _releasable(self) -> list[LiveStep]:
        """Oldest first; the last of them stays."""
        return [live for live in self.own.live() if live.id not in self.own.pinned]

    def _shortage(self, attempt: AttemptId, need: int, incoming: int) -> int | None:
        """How many of the oldest steps must go; None if that is not enough for this process. The other ones of the host
        will need as much, and each frees its own parts alone: so all go by what the whole host will need."""
        older, found, seen = self._releasable(), self._found(), self.room.look()
        enough = held.to_release([found.get(live.id, 0) for live in older], need + incoming, seen.room)
        if enough is None:
            return None
        of_all = max(need + incoming, (need + incoming) * self._processes - seen.of(attempt))
        enough_for_all = held.to_release([seen.of(live.id) for live in older], of_all, seen.room)
        return max(enough, max(0, len(older) - 1) if enough_for_all is None else enough_for_all)

    def _no_room(self, seen: Seen, need: int, incoming: int) -> str:
        copies = f", and {incoming} for the copies that come to this host" if incoming else ""
        others = tier_directory.other_runs(self.own.path)
        more = f"; other runs hold steps in {', '.join(others[:3])}: remove those that are over" if others else ""
        limit = "" if seen.limit is None else "raise bytes_max, which is for all that this run holds on a host, or "
        return (
            f"{self.own.path}: no room in memory on {self._host}: this process needs {need} bytes for a held step"
            f"{copies}, and there are {seen} (the newest step stays); free on the file system and in memory: "
            f"{seen.free} bytes{more}. Hold fewer steps (keep), {limit}give the tier more room (docker: --shm-size; "
            "Kubernetes: an emptyDir in memory), or hold it on a local disk: oc.memory(directory=...)"
        )
