"""Restoring on all processes of a job: process 0 chooses a committed step, all match and read it, and agree on what to
make of what they have found.

Each process's part is a `ReadOutcome`, a value. It is reported to the others before anything is raised, so that all
take the same decision, and raise the same error, at the same point. The rounds are in `restore_rounds`. Main thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import msgspec
from absl import logging

from orchestrator import arrays, failpoints
from orchestrator.errors import (
    Damaged,
    NothingToRestore,
    OrchestratorError,
    StepRetired,
    Unavailable,
    UsageError,
)
from orchestrator.job import held_restore, restore_rounds
from orchestrator.job.read_step import (
    ArrayReads,
    DamagedSteps,
    ReadOptions,
    ReadPlan,
    Restored,
    candidates,
    listed,
    match_target,
)
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore_check import Proof
from orchestrator.job.restore_rounds import (
    WRONG_MAX,
    Chosen,
    NotRead,
    PeersFailed,
    Read,
    ReadFailure,
    ReadOutcome,
    Report,
    Ruling,
    result_of,
    wrong_leaves,
)
from orchestrator.job.rounds import Raised, Round, agree, as_error, gather
from orchestrator.observe import heartbeat
from orchestrator.observe.events import SteppedDown, StepRestored, emit
from orchestrator.rules import arguments, held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.held import Offer
from orchestrator.rules.records import Head, LiveStep
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import stored_arrays
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

Value = TypeVar("Value")
Opens = Callable[[str | None], None]

_RETIRED_MAX = 20  # times that retention may be quicker than a restore
_REASON_MAX = 1000  # characters of what the journal says of a quarantined step
_READ_AGAIN_MAX = 3  # of those, how many are read again from the store


@dataclass(frozen=True)
class RestoreOptions:
    """What all processes of a job ask for, the same on all. timeout_s: how long any process is waited for. step: this
    one, the newest good one if None. back: leave out that many of the newest, as a supervisor asks after a crash loop.
    strict: damage raises instead of stepping down. record: journal what is damaged, and what was restored. load_once:
    what several processes need is read by one of them. read: how it is read."""

    timeout_s: float
    step: int | None = None
    back: int = 0
    strict: bool = False
    record: bool = True
    load_once: bool = False
    read: ReadOptions = field(default_factory=ReadOptions)

    @property
    def steps_down(self) -> bool:
        """Whether a damaged step is passed over."""
        return self.step is None and not self.strict


def restore_together(
    store: JournalStore,
    rendezvous: Rendezvous,
    like: Any,
    options: RestoreOptions,
    opening: Opens | None = None,
    tier: MemoryTier | None = None,
) -> Restored | None:
    """The newest good step (or the one asked for) on every process of the job; None in a new run, which has never had
    one. Main thread.

    Process 0 chooses and broadcasts. If the step is proven to be damaged, all agree, process 0 quarantines it in the
    journal and the next newest is tried. A step that merely cannot be read is no reason for that: Unavailable is raised
    on all, and nothing is changed. A step that was asked for, and `strict`, never step down. `opening`
    (`Opening.by_restore`) opens the epoch, once a step and the target are known to fit on all processes, before
    anything is written to the journal or any array is read; or in a new run. `tier`: where newer steps may be held, and
    one that was asked for, if the journal does not have it.
    Raises Damaged, Unavailable, NothingToRestore, Mismatch, WaitTimeout naming who did not come.
    """
    share = (rendezvous.process, rendezvous.count)
    asked = replace(options, step=arguments.saved_step(options.step), read=replace(options.read, share=share))
    return _Restore(store, rendezvous, like, asked, opening).run(tier)


class Judgement(Protocol):
    """What the processes of a job make of a step, the same on all of them: a collective each. What they raise, all do.
    Of committed steps and of held ones: they differ in what follows from a step that cannot be read."""

    def value_of_all(self, stored: StoredStep, round_: Round[Report], outcome: ReadOutcome[Value]) -> Value | None:
        """What this process has read, if all processes have. None if another step is to be tried."""

    def proves(self, stored: StoredStep, proof: Proof) -> bool:
        """Whether what all have restored is what was saved, by its fingerprints."""

    def quarantine(self) -> None:
        """Journal what was found to be damaged."""


class _Restore:
    """One call of `restore_together`, on this process."""

    def __init__(
        self, store: JournalStore, rendezvous: Rendezvous, like: Any, options: RestoreOptions, opening: Opens | None
    ) -> None:
        self._store, self._rendezvous, self._like, self._options = store, rendezvous, like, options
        self._opening = opening
        self._judgement = _Judgement(store, rendezvous, options)
        self._in_tiers: Mapping[Offer, held_restore.Committed] = {}
        self._started_s = time.monotonic()

    def run(self, tier: MemoryTier | None) -> Restored | None:
        if tier and (restored := self._from_memory(tier)):
            return restored
        while True:
            decide = partial(_choose, self._store, self._options, self._judgement.damaged)
            chosen = agree(self._rendezvous, restore_rounds.CHOICE, self._options.timeout_s, decide)
            if chosen is None:
                self._open(None)
                return None
            failpoints.hit("restore.chosen")
            if restored := self._try(chosen):
                return restored

    def _from_memory(self, tier: MemoryTier) -> Restored | None:
        """The newest held step that is whole, or the one that was asked for; None if the journal is to choose."""
        choice = held_restore.find(tier, self._store, self._rendezvous, self._options.timeout_s, self._options.step)
        if choice is None:
            return None
        self._in_tiers = choice.committed
        if not choice.steps:
            return None
        if self._options.back:  # what is held is newer than all that the store has: it is left out first
            self._options = replace(self._options, back=self._options.back - 1)
            return None
        judgement = held_restore.HeldJudgement(self._rendezvous, self._options.timeout_s)
        restored = (self._take(stored, choice.tree, judgement) for stored in choice.steps)
        return next((one for one in restored if one), None)

    def _try(self, chosen: Chosen) -> Restored | None:
        """The step that process 0 has chosen; None if another is to be tried."""
        head = decode(chosen.head.encode(), Head, f"{self._store.url}: what process 0 has read")
        live = journal.find(head, chosen.step)
        assert live is not None  # process 0 found it in that very entry
        opened = self._in_tiers.get(held.offer(live))
        stored = opened(self._store, live) if opened else self._store.step(live)
        return self._take(stored, journal.tree_of(head), self._judgement)

    def _take(self, stored: StoredStep, tree: str | None, judgement: Judgement) -> Restored | None:
        """This step; None if another is to be tried. tree: of the run's newest step."""
        live = stored.live
        matched = result_of(partial(match_target, stored, self._like, self._options.read))
        plan = judgement.value_of_all(stored, restore_rounds.fits(live.step), matched)
        if plan is None:
            return None
        self._open(tree)
        judgement.quarantine()
        journalled = judgement is self._judgement and self._options.record and live.trust != "restored"
        record = self._rendezvous.process == 0 and journalled
        early = overlap.begin(self._store.head) if record else None  # it takes no longer than the arrays
        reads = ArrayReads(
            self._options.read.reader, lambda read_bytes: heartbeat.record("restoring", None), plan.requests
        )
        read = judgement.value_of_all(stored, restore_rounds.was_read(live.step), self._read(plan, reads))
        if read is None or (self._options.read.attest and not judgement.proves(stored, read[1])):
            judgement.quarantine()
            return None
        sources = reads.sources(stored)
        self._report(live, reads, sources)
        if record:
            _record_restored(self._store, live, early)
        return replace(read[0], sources=sources)

    def _open(self, tree: str | None) -> None:
        if self._opening:
            self._opening(tree)

    def _read(self, plan: ReadPlan, reads: ArrayReads) -> ReadOutcome[tuple[Restored, Proof]]:
        begun = result_of(plan.begin)
        if isinstance(begun, NotRead):
            return begun
        values: ReadOutcome[list[Any]]
        if self._options.load_once:
            values = _load_once(self._rendezvous, self._options.timeout_s, reads, plan)
        else:
            values = result_of(partial(reads.load, plan.stored, plan.requests))
        if not isinstance(values, Read):
            return values
        return result_of(partial(plan.finish, values.value, begun.value))

    def _report(self, live: LiveStep, reads: ArrayReads, sources: Mapping[str, int]) -> None:
        failpoints.hit("restore.after")
        heartbeat.record("restored", live.step, restored_step=live.step)
        elapsed_s = time.monotonic() - self._started_s
        source = " and ".join(sorted(sources, key=lambda kind: -sources[kind]))
        emit(StepRestored(live.step, live.attempt, elapsed_s, reads.read_bytes, reads.array_s, source))


def _load_once(rendezvous: Rendezvous, timeout_s: float, reads: ArrayReads, plan: ReadPlan) -> ReadOutcome[list[Any]]:
    """The values of `plan.requests`, in order: what several processes need is read by one of them and exchanged.

    An exchange begins only when all have read their part. Whoever has failed reports so in the very round in which the
    others meet before the exchange. Raises WaitTimeout."""
    values: list[Any] = [None] * len(plan.requests)
    groups = arrays.exchange_groups(plan.requests)
    alone = sorted(set(range(len(values))).difference(*(group.positions for group in groups)))
    slabs = [request for group in groups for request in group.slab_requests]
    reads.expected = [*slabs, *(plan.requests[place] for place in alone)]
    for group in groups:
        parts = result_of(partial(reads.load, plan.stored, group.slab_requests))
        if isinstance(parts, NotRead):
            return parts
        mine = restore_rounds.Exchange(group.signature)
        reports = gather(rendezvous, restore_rounds.was_read(plan.stored.live.step), mine, timeout_s)
        if any(theirs != mine for theirs in reports):
            return PeersFailed(reports)
        exchanged = result_of(partial(group.exchanged, parts.value))
        if isinstance(exchanged, NotRead):
            return exchanged
        _put(values, group.positions, exchanged.value)
    rest = result_of(partial(reads.load, plan.stored, [plan.requests[place] for place in alone]))
    if isinstance(rest, NotRead):
        return rest
    _put(values, alone, rest.value)
    return Read(values)


def _put(values: list[Any], places: list[int], found: list[Any]) -> None:
    for place, value in zip(places, found, strict=True):
        values[place] = value


class _Judgement:
    """What the processes of a job find out about steps, the same on all of them. damaged: attempts that are proven to
    be so, and how. Each method is a collective."""

    def __init__(self, store: JournalStore, rendezvous: Rendezvous, options: RestoreOptions) -> None:
        self._store, self._rendezvous, self._options = store, rendezvous, options
        self.damaged: dict[AttemptId, str] = {}
        self._not_journalled: list[LiveStep] = []
        self._retired = 0

    def value_of_all(self, stored: StoredStep, round_: Round[Report], outcome: ReadOutcome[Value]) -> Value | None:
        """What this process has read, if all processes have. None if another step is to be tried: this one is damaged,
        or retired since. Raises, on all, where no other step would help."""
        reports = restore_rounds.reports_of_all(self._rendezvous, round_, outcome, self._options.timeout_s)
        ruling, process = restore_rounds.rule_on(reports)
        match ruling, reports[process]:
            case Ruling.DONE, _:
                assert isinstance(outcome, Read)  # its report is among them
                return outcome.value
            case Ruling.FAULT, ReadFailure() as failure:
                own = reports[self._rendezvous.process]
                if isinstance(outcome, NotRead) and restore_rounds.ruling(own) is Ruling.FAULT:
                    raise outcome.error
                raise as_error(process, Raised(failure.kind, failure.text))
            case Ruling.RETIRED, ReadFailure() as failure:
                self._choose_again(process, failure)
            case Ruling.UNREADABLE, ReadFailure() as failure:
                line = self._line(process, failure)
                raise Unavailable(f"{stored.where} cannot be read now, and nothing was changed for it: {line}")
            case Ruling.DAMAGED, ReadFailure() as failure:
                self._confirm(stored, process, failure)
            case _:
                text = "load_once: the processes ask for different arrays; `like` must be the same on all of them"
                raise UsageError(text)
        return None

    def proves(self, stored: StoredStep, proof: Proof) -> bool:
        """Whether what all processes have restored is what was saved, by its fingerprints. False: it is damaged. Raises
        Unavailable on all if what is stored has the right ones."""
        timeout_s, step = self._options.timeout_s, stored.live.step
        wrong = wrong_leaves(self._rendezvous, proof, step, timeout_s)
        if not wrong:
            return True
        judge = partial(_damage_in_store, self._store.step(stored.live), wrong)
        self._pass(stored.live, agree(self._rendezvous, restore_rounds.stored_fingerprints(step), timeout_s, judge))
        return False

    def quarantine(self) -> None:
        """Journal what was found to be damaged."""
        while self._not_journalled and self._options.record:
            live = self._not_journalled.pop(0)
            reason = self.damaged[live.id][:_REASON_MAX]
            rule = partial(journal.quarantine, attempt=live.id, reason=reason)
            agree(
                self._rendezvous,
                restore_rounds.QUARANTINE,
                self._options.timeout_s,
                partial(_append, self._store, rule),
            )

    def _choose_again(self, process: int, failure: ReadFailure) -> None:
        self._retired += 1
        if not self._options.steps_down or self._retired > _RETIRED_MAX:
            raise StepRetired(self._line(process, failure))

    def _confirm(self, stored: StoredStep, process: int, failure: ReadFailure) -> None:
        """A process has proof of damage. What process 0 journals it has seen itself: a host with a bad cache or bad
        memory may prove anything."""
        line = self._line(process, failure)
        sees = partial(_is_damaged, self._store.step(stored.live), failure) if process else lambda: True
        if not agree(self._rendezvous, restore_rounds.damage(stored.live.step), self._options.timeout_s, sees):
            raise Unavailable(f"{stored.where}: {line}; process 0 finds it as it was saved: look at that host")
        self._pass(stored.live, line)

    def _pass(self, live: LiveStep, reason: str) -> None:
        """Go on without this step, which is damaged."""
        if not self._options.steps_down:
            raise Damaged(f"{self._store.url} {live.id.label} cannot be restored: {reason}")
        emit(SteppedDown(live.step, live.attempt, reason))
        self.damaged[live.id] = reason
        self._not_journalled.append(live)

    def _line(self, process: int, failure: ReadFailure) -> str:
        return f"process {process} ({self._rendezvous.hosts.get(process, '?')}): {failure.text}"


# On process 0.


def _choose(store: JournalStore, options: RestoreOptions, damaged: DamagedSteps) -> Chosen | None:
    """What to restore; None in a new run. Raises NothingToRestore, StepNotFound."""
    head = store.head()
    if options.step is not None:
        return _chosen(head, store.found(head, options.step))
    if head is None:
        return None
    good = candidates(head, damaged)
    if len(good) > options.back:
        return _chosen(head, good[-1 - options.back])
    if damaged:
        store.look()  # what is damaged may be a newer entry's to judge: the journal itself may have lost its tail
        raise NothingToRestore(f"{store.url}: nothing to restore, and nothing was changed" + listed(damaged))
    if store.newest(head) or options.back:
        raise NothingToRestore(
            f"{store.url}: asked to leave out the newest {options.back} of {len(good)} restorable steps"
        )
    return None


def _chosen(head: Head | None, live: LiveStep) -> Chosen:
    assert head is not None  # `live` is in it
    kept = tuple(one for one in head.live if one is live or one is journal.newest(head))
    return Chosen(live.step, encode(msgspec.structs.replace(head, live=kept, retired=(), aside=())).decode())


def _is_damaged(stored: StoredStep, failure: ReadFailure) -> bool:
    try:
        stored.judge(failure.files, failure.chunks)
    except Damaged:
        return True
    return False


def _damage_in_store(stored: StoredStep, wrong: Sequence[tuple[str, str]]) -> str:
    """In what way the first of the leaves that are `wrong` are stored otherwise than they were saved. Raises
    Unavailable if they are not."""
    text = "; ".join(line for _, line in wrong[:WRONG_MAX])
    try:
        stored_arrays.judge_fingerprints(stored, [name for name, _ in wrong[:_READ_AGAIN_MAX]], text)
    except Damaged as damage:
        return str(damage)


def _append(store: JournalStore, rule: Callable[[Head | None, journal.Stamp], journal.Next]) -> None:
    store.append(rule)


def _record_restored(store: JournalStore, live: LiveStep, early: Begun[Head | None] | None) -> None:
    """Journal that a run has come up on this attempt: retention keeps the newest of those. Not worth failing for, but
    done before the restore returns: the next save's retention must know of it."""
    try:
        store.append(partial(journal.trusted, attempt=live.id, trust="restored"), early)
    except OrchestratorError as error:
        logging.warning("%s: could not be journalled as restored: %s", live.id.label, error)
