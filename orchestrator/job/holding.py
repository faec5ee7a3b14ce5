"""Holding steps in memory: what a save does when a tier is due, beside the saves to the store.

A held step is an attempt like any other, by the same participants and coordinator, in the memory tier of each process
instead of the run's root, with its copies on other hosts (`storage/copied`): process 0 enters it into its tier's log
once all receipts are in, and the others into theirs. No store request is made for it. Whatever fails here is a held
step less: it kills neither training nor a save. Main thread, but for `_hear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from absl import logging

from orchestrator.arrays import ArrayWriter, Flat
from orchestrator.errors import OrchestratorError, StorageError, UsageError
from orchestrator.job import tier_hosts
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.opening import Opening
from orchestrator.job.participant import Participant, ParticipantFactory
from orchestrator.job.promotion import Source
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.save_sequence import Given, SaveSequence
from orchestrator.job.schedule import SaveSchedule
from orchestrator.job.signals import Signals
from orchestrator.job.tier_entered import ENTERED_S, Entered
from orchestrator.job.tier_opening import OpenTiers, open_tiers
from orchestrator.job.voter import GRACE_S
from orchestrator.observe.events import Event, SaveCommitted, SaveNotCommitted, StepHeld, StepNotHeld, emit
from orchestrator.options import Options
from orchestrator.policy import every, last
from orchestrator.rules import held
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.throttle import Throttle

_RECORDS_BYTES = 64 << 10  # room for the records of a step, beside a part of its arrays
_RECORDS_SHARE = 50  # one of so many bytes
_TIMEOUT_S = 120.0  # for a step: memory that takes longer is no quick way back


class Holding:
    """The held steps of one agent. tier: None: it holds none. store: the run's. writer: makes one for a process.
    beside: what begins its saves to the store. Nothing is held before `opened`, nor where that finds a problem."""

    def __init__(
        self,
        tier: MemoryTier | None,
        store: JournalStore,
        rendezvous: Rendezvous,
        incarnation_id: str,
        opening: Opening,
        options: Options,
        writer: Callable[[Options, int], ArrayWriter],
        beside: ParticipantFactory,
    ) -> None:
        self._tier, self._store, self._rendezvous = tier, store, rendezvous
        self._opening, self._options, self._beside = opening, options, beside
        self._writer = writer(options, rendezvous.process)  # its own, as a save may be in flight in the agent's
        self._throttle = Throttle(options.upload_bytes_per_s)
        self._carried = False  # whether this call of `save` has begun to hold the step that it saves, or said why not
        self._signals = Signals(rendezvous, f"{incarnation_id}-held")
        self._others = Entered(rendezvous, f"{incarnation_id}-held")
        self._tiers: OpenTiers | None = None
        self._saves: SaveSequence | None = None
        self._freeing: Begun[None] = overlap.known(None, 0.0)

    # Opening: a collective.

    def opened(self, epoch: int) -> None:
        """The incarnation's epoch is open in the run's journal: open it in the tiers, too. A collective."""
        if self._tier is None:
            return
        me, timeout_s = self._rendezvous, self._options.rendezvous_timeout_s
        tiers = self._tiers = open_tiers(self._tier, self._store, me, epoch, timeout_s)
        if tiers is None:
            return
        self._policy = every(self._tier.every)
        keep = last(self._tier.keep)
        options = _options(self._options)
        participants = ParticipantFactory(
            tiers.of_all,
            self._writer,
            me,
            self._signals,
            None if me.process else Coordinator(tiers.of_all, me, self._signals, keep=keep, host_local="ignore"),
            options,
            epoch=epoch,
            beside=self._beside,
            tell=self._hear,
            admit=self._admit,
        )
        schedule = SaveSchedule(self._policy, me, options.rendezvous_timeout_s)
        self._saves = SaveSequence(participants, schedule, self._opening, options)
        try:
            tiers.follow()  # a crash may have come between process 0's entry and ours
        except OrchestratorError as error:
            logging.warning("%s: process 0's log cannot be followed yet: %s", tiers.own.path, error)
        self._freeing = overlap.begin(tiers.keeper.free)

    # Holding.

    def due(self, step: int) -> bool:
        """The same on all processes. No collective."""
        return self._saves is not None and self._policy.due(step, None)

    def hold(self, step: int, state: Any, given: Given, *, preempted: bool = False) -> None:
        """Begin to hold `step`, if it is due and hosts are not being preempted: then it is saved. Not if the one before
        is not held yet, on any process: training does not wait for memory. Raises UsageError for what no save takes;
        whatever else fails is an event. Whether it has begun is each process's own matter, so it is not told."""
        if self._saves is None or preempted or self._carried or not self.due(step):
            return
        try:
            if (running := self._saves.in_flight) is not None:
                self._saves.skip(step, f"step {running} is not held yet; a larger `every` leaves more time")
            else:
                self._saves.save(step, state, given)
        except UsageError:
            raise
        except Exception as error:  # the others have been told
            self._hear(SaveNotCommitted(step, "", f"{type(error).__name__}: {error}", Cause.FAILED))

    def carry(self, save: Participant, flat: Flat, process_state: bytes | None) -> Source | None:
        """Begin to hold the state of `save`, which is on its way to the store: it is staged here, and uploaded from
        here. None if this process cannot: then it saves it directly, whatever the others do, and it is not held."""
        if self._saves is None or self._tiers is None:
            return None
        self._carried, own, attempt = True, self._tiers.own, save.id
        self._saves.note_outcome(raise_now=False)
        if (running := self._saves.in_flight) is not None:
            self._saves.skip(save.step, f"step {running} is not held yet; this process saves it directly")
            return None
        own.pinned.add(attempt)
        held: Participant | None = None
        try:
            held = self._saves.carry(save.step, save.user, flat, process_state, own.storage)
        finally:
            if held is None or not held.staged:  # nothing of it is going to be written here
                own.pinned.discard(attempt)
                self._tiers.keeper.settled(attempt)
        if not held.staged:
            logging.warning("%s goes to the store directly: %s", save.label, held.problem)
            return None
        return Source(held, own.storage, self._throttle, partial(self._tiers.keeper.unpin, attempt))

    @contextlib.contextmanager
    def beside(self, step: int) -> Iterator[None]:
        """Within it `step` is saved, held, or both. Should that raise, the other processes, which may be about to hold
        it, are told that this one does not."""
        self._carried = False
        with self._beside.names.one_call():
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):
                    if self._saves is not None and self.due(step) and not self._carried:
                        self._saves.skip(step, "this process takes no part in it, as its call of save has failed")
                raise

    def _admit(self, attempt: AttemptId, need: int) -> None:
        assert self._tiers is not None
        self._freeing.wait(GRACE_S)
        self._tiers.hosts.look_after_server()
        need += need // _RECORDS_SHARE + _RECORDS_BYTES
        self._tiers.keeper.make_room(attempt, need, int(need * self._tiers.incoming))

    def _hear(self, event: Event) -> None:
        """What becomes of a step, on the thread that saves it."""
        if isinstance(event, SaveCommitted | SaveNotCommitted) and self._tiers:
            self._tiers.keeper.settled(AttemptId(event.step, event.attempt))
        match event:
            case SaveCommitted():
                emit(self._entered(event))
            case SaveNotCommitted():
                emit(StepNotHeld(event.step, event.attempt, event.reason))
                self._give_up(event)

    def _entered(self, event: SaveCommitted) -> Event:
        """Process 0 has entered the step into its log: do so here, too, and free what is held no more."""
        assert self._tiers is not None
        tiers, attempt = self._tiers, AttemptId(event.step, event.attempt)
        sent_bytes = tiers.storage.sent_bytes(attempt)
        try:
            tiers.keeper.decided(attempt, self._tiers.follow())
            self._free()
            self._check_entered(attempt)
        except OrchestratorError as error:
            return StepNotHeld(event.step, event.attempt, f"process {self._rendezvous.process}: {error}")
        copies = len(tiers.hosts.targets(self._rendezvous.process))
        return StepHeld(event.step, event.attempt, event.elapsed_s, event.state_bytes, copies, sent_bytes)

    def _check_entered(self, attempt: AttemptId) -> None:
        """Process 0, with its log, may be lost: the step is held once the hosts that have the copies of process 0's
        part have it in their logs, too. So whatever loss leaves that part leaves a log that lists the step. Raises
        StorageError."""
        assert self._tiers is not None
        hosts = self._tiers.hosts
        if self._rendezvous.process:
            if hosts.first_here:
                self._others.say(attempt)
        elif missing := self._others.missing(attempt, [hosts.hosts[one].processes[0] for one in hosts.targets(0)]):
            who = ", ".join(f"process {process} ({hosts.names[process]})" for process in missing)
            raise StorageError(f"{who} has not entered it into its log within {ENTERED_S:g} s")

    def _free(self) -> None:
        """In the background; but the log is cut first, which nobody reads meanwhile."""
        assert self._tiers is not None
        self._freeing.wait(GRACE_S)
        self._tiers.own.forget_older_entries()
        self._freeing = overlap.begin(self._tiers.keeper.free)

    def _give_up(self, event: SaveNotCommitted) -> None:
        """Free what is here of a step that is not held. Where process 0's log cannot say that it is not, it stays."""
        if not (event.attempt and self._tiers):
            return
        attempt = AttemptId(event.step, event.attempt)
        self._tiers.storage.sent_bytes(attempt)
        try:
            self._tiers.keeper.decided(attempt, self._tiers.follow())
        except OrchestratorError as error:
            logging.warning("%s: stays in memory for now: %s", attempt.label, error)
            return
        self._freeing.wait(GRACE_S)
        self._tiers.keeper.free()

    # Leaving.

    def settle(self) -> None:
        """Wait, bounded, for the step that is being held."""
        if self._saves:
            self._saves.settle()

    def close(self) -> None:
        """The job ends in order: free what the store has by now, or something newer."""
        self.settle()
        if self._tiers is None:
            return
        self._freeing.wait(GRACE_S)
        own = self._tiers.own
        try:
            run = self._store.head()
            if run and (gone := held.superseded(run, own.live())):
                self._tiers.keeper.release(gone, "in the store")
            own.forget_older_entries()
        except OrchestratorError as error:
            logging.warning("%s: what is held there stays: %s", own.path, error)
        self._writer.close(GRACE_S)

    def finish(self) -> None:
        """The program fails or ends: what is held stays, for the next start. What is in flight has little time left."""
        if self._saves:
            self._saves.hurry()
        self.settle()
        if self._tiers:
            self._freeing.wait(GRACE_S)
            self._writer.close(GRACE_S)

    def leave(self) -> None:
        """All processes have ended what they do here, or this one waits for no other: end its host's server."""
        tier_hosts.left(self._rendezvous)


def _options(given: Options) -> Options:
    """Of the agent's, what holds for held steps: none of them raises, none makes training wait for its end."""
    timeout_s = min(given.save_timeout_s, _TIMEOUT_S)
    return replace(given, async_save=True, on_save_failure="warn", save_timeout_s=timeout_s)
