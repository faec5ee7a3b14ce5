"""Holding steps in memory: what a save does when a tier is due, beside the saves to the store.

A held step is an attempt like any other, by the same participants and coordinator, in the memory tier of each process
instead of the run's root: process 0 enters it into its tier's log once all receipts are in, and the others into theirs.
No store request is made for it. Whatever fails here is a held step less: it kills neither training nor a save.

In this version each process must reach the tiers of all others as directories: those of one machine. Where they do not,
nothing is held, and that is said. Main thread, but for `_hear`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from absl import logging

from orchestrator.arrays import ArrayWriter, Flat
from orchestrator.errors import OrchestratorError, UsageError
from orchestrator.job import tier_rounds
from orchestrator.job.attempt_names import AttemptNames
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.opening import Opening
from orchestrator.job.participant import Participant, ParticipantFactory
from orchestrator.job.promotion import Source
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import agree, gather
from orchestrator.job.save_sequence import Given, SaveSequence
from orchestrator.job.schedule import SaveSchedule
from orchestrator.job.signals import Signals
from orchestrator.job.tier_rounds import Opened
from orchestrator.job.voter import GRACE_S
from orchestrator.observe.events import Event, SaveCommitted, SaveNotCommitted, StepHeld, StepNotHeld, emit
from orchestrator.options import Options
from orchestrator.policy import every, last
from orchestrator.rules import held
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory
from orchestrator.run.deletion import BackgroundDeletion
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.tier import OwnTier, free_left_over, untold
from orchestrator.storage import PosixStorage
from orchestrator.storage.joined import JoinedStorage
from orchestrator.storage.throttle import Throttle

_RECORDS_BYTES = 64 << 10  # room for the records of a step, beside a part of its arrays
_RECORDS_SHARE = 50  # one of so many bytes
_TIMEOUT_S = 120.0  # for a step: memory that takes longer is no quick way back


class Holding:
    """The held steps of one agent. tier: None: it holds none. store: the run's. writer: makes one for a process. names:
    of its attempts, here and in the store. Nothing is held before `opened`, nor where that finds a problem."""

    def __init__(
        self,
        tier: MemoryTier | None,
        store: JournalStore,
        rendezvous: Rendezvous,
        incarnation_id: str,
        opening: Opening,
        options: Options,
        writer: Callable[[Options, int], ArrayWriter],
        names: AttemptNames | None = None,
    ) -> None:
        self._tier, self._store, self._rendezvous = tier, store, rendezvous
        self._opening, self._options, self._names = opening, options, names or AttemptNames()
        self._writer = writer(options, rendezvous.process)  # its own, as a save may be in flight in the agent's
        self._throttle = Throttle(options.upload_bytes_per_s)
        self._carried = False  # whether this call of `save` has begun to hold the step that it saves, or said why not
        self._signals = Signals(rendezvous, f"{incarnation_id}-held")
        self._own: OwnTier | None = None
        self._saves: SaveSequence | None = None
        self._of_all: JournalStore | None = None  # the tiers of all processes, with the log of process 0's
        self._deletion: BackgroundDeletion | None = None
        self._epoch = 0

    # Opening: a collective.

    def opened(self, epoch: int) -> None:
        """The incarnation's epoch is open in the run's journal: open it in the tiers, too. A collective."""
        if self._tier is None:
            return
        timeout_s, me = self._options.rendezvous_timeout_s, self._rendezvous
        run = agree(me, tier_rounds.RUN, timeout_s, self._run)
        places = gather(me, tier_rounds.OPENED, self._open(self._tier, run, epoch), timeout_s)
        reached = gather(me, tier_rounds.REACHED, self._reach(places), timeout_s)
        if problem := self._problem(places, reached):
            logging.warning("no steps are held in memory, saves to the store go on: %s", problem)
            return
        self._begin(self._tier, epoch, places)

    def _run(self) -> str:
        """'' if the journal does not tell."""
        try:
            return tier_directory.identity(self._store) or ""
        except OrchestratorError as error:
            logging.warning("which run this is cannot be read: %s", error)
            return ""

    def _open(self, tier: MemoryTier, run: str, epoch: int) -> Opened:
        if not run:
            return Opened("", problem="the first entry of the run's journal cannot be read")
        path = ""
        try:
            path = tier_directory.of_process(tier.directory, run, self._rendezvous.process)
            self._own = OwnTier(path, self._store.writer, self._store)
            return Opened(path, *self._own.open_epoch(epoch, self._store.durable_version))
        except OrchestratorError as error:
            return Opened(path, problem=str(error))

    def _reach(self, places: Sequence[Opened]) -> str:
        """Why this process cannot read what another has just written to its tier; '' if it can."""
        if any(place.problem for place in places):
            return ""
        for process, place in enumerate(places):
            try:
                tier_directory.check_path(place.path)
                seen = JournalStore(PosixStorage(place.path), "reader").entry(place.version).write_id
                problem = "" if seen == place.write_id else "another one of that name is here"
            except OrchestratorError as error:
                problem = str(error)
            if problem:
                return f"cannot reach the tier of process {process} at {place.path}: {problem}"
        return ""

    def _problem(self, places: Sequence[Opened], reached: Sequence[str]) -> str:
        hosts = self._rendezvous.hosts
        for process, problem in enumerate([place.problem for place in places]):
            if problem:
                return f"process {process} ({hosts.get(process, '?')}): {problem}"
        for process, problem in enumerate(reached):
            if problem:
                more = "; in this version all processes must be on one machine"
                return f"process {process} ({hosts.get(process, '?')}) {problem}{more}"
        return ""

    def _begin(self, tier: MemoryTier, epoch: int, places: Sequence[Opened]) -> None:
        assert self._own is not None
        me, own = self._rendezvous, self._own
        tiers = [PosixStorage(place.path) for place in places]
        others = [tier for process, tier in enumerate(tiers) if process != me.process]
        storage = JoinedStorage(own.storage, others, log=tiers[0] if me.process else own.storage)
        self._of_all = store = JournalStore(storage, self._store.writer, run=self._store)
        store.durable_version = places[0].version
        self._policy, self._keep = every(tier.every), last(tier.keep)
        options = _options(self._options)
        participants = ParticipantFactory(
            store,
            self._writer,
            me,
            self._signals,
            Coordinator(store, me, self._signals, keep=self._keep, host_local="ignore") if me.process == 0 else None,
            options,
            epoch=epoch,
            names=self._names,
            tell=self._hear,
            admit=self._admit,
        )
        schedule = SaveSchedule(self._policy, me, options.rendezvous_timeout_s)
        self._epoch, self._deletion = epoch, BackgroundDeletion(own.log, untold, own.pinned)
        self._saves = SaveSequence(participants, schedule, self._opening, options)
        try:
            if me.process:
                own.follow(store)  # a crash may have come between its entry and ours
            self._deletion.start(epoch)  # what older incarnations have left unfinished
        except OrchestratorError as error:
            logging.warning("%s: what older starts have left there stays for now: %s", own.path, error)

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
        if self._saves is None or self._own is None or self._of_all is None:
            return None
        self._carried, own, attempt = True, self._own, save.id
        self._saves.note_outcome(raise_now=False)
        if (running := self._saves.in_flight) is not None:
            self._saves.skip(save.step, f"step {running} is not held yet; this process saves it directly")
            return None
        own.pinned.add(attempt)
        held: Participant | None = None
        try:
            held = self._saves.carry(save.step, save.user, flat, process_state)
        finally:
            if held is None or not held.staged:
                own.pinned.discard(attempt)
        if not held.staged:
            logging.warning("%s goes to the store directly: %s", save.label, held.problem)
            return None
        return Source(held, self._of_all, own.storage, self._throttle, partial(own.unpin, attempt))

    @contextlib.contextmanager
    def beside(self, step: int) -> Iterator[None]:
        """Within it `step` is saved, held, or both. Should that raise, the other processes, which may be about to hold
        it, are told that this one does not."""
        self._carried = False
        with self._names.one_call():
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):
                    if self._saves is not None and self.due(step) and not self._carried:
                        self._saves.skip(step, "this process takes no part in it, as its call of save has failed")
                raise

    def _admit(self, need: int) -> None:
        assert self._own is not None and self._deletion is not None and self._tier is not None
        self._deletion.wait(GRACE_S)  # it is freeing memory
        self._own.make_room(need + need // _RECORDS_SHARE + _RECORDS_BYTES, self._tier.bytes_max)

    def _hear(self, event: Event) -> None:
        """What becomes of a step, on the thread that saves it."""
        match event:
            case SaveCommitted():
                emit(self._entered(event))
            case SaveNotCommitted():
                emit(StepNotHeld(event.step, event.attempt, event.reason))
                self._give_up(event)

    def _entered(self, event: SaveCommitted) -> Event:
        """Process 0 has entered the step into its log: do so here, too, and free what is held no more."""
        assert self._own is not None and self._of_all is not None and self._deletion is not None
        try:
            if self._rendezvous.process:
                self._own.follow(self._of_all)
            else:
                held_now = {live.id for live in self._of_all.require_head().live}
                free_left_over(self._own.path, self._rendezvous.count, held_now)
            self._deletion.wait(GRACE_S)  # it reads the log, which is about to be cut
            self._own.forget_older_entries()
            self._deletion.start(self._epoch)
        except OrchestratorError as error:
            return StepNotHeld(event.step, event.attempt, f"process {self._rendezvous.process}: {error}")
        return StepHeld(event.step, event.attempt, event.elapsed_s, event.state_bytes)

    def _give_up(self, event: SaveNotCommitted) -> None:
        """Free what this process has written of a step that is not held, as far as it knows: should it be, after all,
        a restore finds this part missing and says so."""
        if event.attempt and self._own:
            self._own.delete(AttemptId(event.step, event.attempt))

    # Leaving.

    def settle(self) -> None:
        """Wait, bounded, for the step that is being held."""
        if self._saves:
            self._saves.settle()

    def close(self) -> None:
        """The job ends in order: free what the store has by now, or something newer."""
        self.settle()
        if self._saves is None or self._own is None or self._deletion is None:
            return
        try:
            run, own = self._store.head(), self._own.log.head()
            if run and own and (gone := held.superseded(run, own.live)):
                self._own.release(gone, "in the store")
            self._own.forget_older_entries()
        except OrchestratorError as error:
            logging.warning("%s: what is held there stays: %s", self._own.path, error)
        self._deletion.wait(GRACE_S)
        self._writer.close(GRACE_S)

    def finish(self) -> None:
        """The program fails or ends: what is held stays, for the next start. What is in flight has little time left."""
        if self._saves:
            self._saves.hurry()
        self.settle()
        if self._deletion:
            self._deletion.stop()
            self._deletion.wait(GRACE_S)
            self._writer.close(GRACE_S)


def _options(given: Options) -> Options:
    """Of the agent's, what holds for held steps: none of them raises, none makes training wait for its end."""
    timeout_s = min(given.save_timeout_s, _TIMEOUT_S)
    return replace(given, async_save=True, on_save_failure="warn", save_timeout_s=timeout_s)
