"""What of a host's memory is freed, and when: by `held.to_free`, and before a step for which there is no room.

Freed is never what may still be the newest whole step somewhere: see that rule. Each process frees in its own part, the
first one of a host also in what lies beside.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from absl import logging

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.rules import held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head, LiveStep
from orchestrator.run import prefetched, tier_directory
from orchestrator.run.tier import Beside, OwnTier


class Keeper:
    """What of this host's memory is freed, and when. own: this process's. beside: all else on the host, for its first
    process; None on the others. epoch: of this incarnation. listed: what all logs said is held when it was opened.
    decides: whether this is process 0, whose log it is."""

    def __init__(
        self, own: OwnTier, beside: Beside | None, epoch: int, listed: Collection[AttemptId], *, decides: bool = False
    ) -> None:
        self.own, self._beside, self._epoch, self._decides = own, beside, epoch, decides
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
            listed = self._listed | {one.id for one in self.own.live()}
            gone = held.to_free(self._found(), listed, epoch=self._epoch, decided=self._decided, for_room=for_room)
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

    def make_room(self, need: int, incoming: int, bytes_max: int | None) -> None:
        """Before this process writes `need` bytes, and `incoming` bytes of copies come: release older steps, as far as
        it takes. bytes_max: of this process's own. Raises StorageError saying what is needed and what there is; then
        nothing was released. Raises Fenced."""
        if self._shortage(need, incoming, bytes_max) != 0:
            self.free(for_room=True)
        count = self._shortage(need, incoming, bytes_max)
        if count is None:
            raise StorageError(self._no_room(need, incoming, bytes_max))
        if count:
            self.release([live.id for live in self._releasable()[:count]], "room")

    def _releasable(self) -> list[LiveStep]:
        """Oldest first; the last of them stays."""
        return [live for live in self.own.live() if live.id not in self.own.pinned]

    def _shortage(self, need: int, incoming: int, bytes_max: int | None) -> int | None:
        """How many of the oldest steps must go; None if that is not enough."""
        older, own = self._releasable(), self.own.attempts()
        found = self._found()
        counts = [
            held.to_release(
                [found.get(live.id, 0) for live in older],
                need + incoming,
                tier_directory.free_bytes(self.own.path),
            )
        ]
        if bytes_max is not None:
            counts.append(held.to_release([own.get(live.id, 0) for live in older], need, bytes_max - sum(own.values())))
        known = [count for count in counts if count is not None]
        return max(known) if len(known) == len(counts) else None

    def _no_room(self, need: int, incoming: int, bytes_max: int | None) -> str:
        used, free = sum(self.own.attempts().values()), tier_directory.free_bytes(self.own.path)
        room = free if bytes_max is None else min(free, bytes_max - used)
        limit = "" if bytes_max is None else f" of the {bytes_max} of bytes_max"
        copies = f", and {incoming} for the copies that come to this host" if incoming else ""
        others = tier_directory.other_runs(self.own.path)
        more = f"; other runs hold steps in {', '.join(others[:3])}: remove those that are over" if others else ""
        return (
            f"{self.own.path}: no room in memory: this process needs {need} bytes for a held step{copies}, and there "
            f"are {max(0, room)}{limit} beside the {used} that it holds (the newest step stays); free on the file "
            f"system and in memory: {free} bytes{more}. Give the tier more room (docker: --shm-size; Kubernetes: "
            "an emptyDir in memory), or hold it on a local disk: oc.memory(directory=...)"
        )
