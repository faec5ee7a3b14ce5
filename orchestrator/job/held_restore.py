"""Coming back from memory: the held steps that a restore may choose over the newest committed one.

All processes take the same steps in the same order: process 0 reads the journal, each says where tiers are on its
machine, then what it can have of what they hold; `held.candidates` decides. What cannot be taken is named and left out,
and the next source is tried: an older held step, then the store. Nothing here is journalled, and nothing of a tier is
called damage of the run. Main thread; `find` is a collective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from absl import logging

from orchestrator.errors import OrchestratorError
from orchestrator.job import restore_rounds, tier_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore_check import Proof
from orchestrator.job.restore_rounds import NotRead, Read, ReadFailure, ReadOutcome, Ruling
from orchestrator.job.rounds import Raised, Round, agree, as_error, gather
from orchestrator.job.tier_rounds import Journalled, OfferedStep
from orchestrator.observe.events import HeldStepDropped, emit
from orchestrator.rules import held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer, Standing
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory
from orchestrator.run.held_steps import HeldSteps
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep

Value = TypeVar("Value")

_FAULT_CHARS = 500


@dataclass(frozen=True)
class HeldChoice:
    """steps: to try, newest first. tree: as `Opening.by_restore` takes it."""

    steps: tuple[StoredStep, ...]
    tree: str | None


def find(tier: MemoryTier, store: JournalStore, rendezvous: Rendezvous, timeout_s: float) -> HeldChoice | None:
    """What the memory tiers have that is newer than what a restore would take from the store. None in a new run. A
    collective. Raises what the journal's reading raises, on all; WaitTimeout."""
    journalled = agree(rendezvous, tier_rounds.JOURNALLED, timeout_s, lambda: _journalled(store))
    if journalled is None:
        return None
    try:
        here = tuple(tier_directory.processes(tier.directory, journalled.run))
    except OrchestratorError as error:
        logging.warning("no held steps on this machine: %s", error)
        here = ()
    paths = gather(rendezvous, tier_rounds.PATHS, here, timeout_s)
    own = tier_directory.of_process(tier.directory, journalled.run, rendezvous.process)
    steps = HeldSteps(own, [path for each in paths for path in each])
    standing = _standing(journalled)
    mine = [_message(offer, "") for offer in steps.offers()]
    for problem in steps.unreadable:
        logging.warning("a memory tier is left out: %s", problem)
    mine += [
        _message(offer, steps.faults[offer.id][:_FAULT_CHARS]) for offer in steps.listed if offer.id in steps.faults
    ]
    offers = gather(rendezvous, tier_rounds.OFFERS, tuple(mine), timeout_s)
    chosen = held.candidates(standing, [[_offer(one) for one in each if not one.fault] for each in offers])
    best = held.rank(chosen[0].id) if chosen else (-1, -1, -1)
    for attempt, reason in _faults(offers, rendezvous.hosts).items():
        if standing.admits(attempt) and held.rank(attempt) > best:  # nobody would have asked for the others
            emit(HeldStepDropped(*attempt, reason))
    return HeldChoice(tuple(steps.step(offer) for offer in chosen), journalled.tree)


def _journalled(store: JournalStore) -> Journalled | None:
    """None in a new run, and where the journal does not tell which run this is: its steps can be restored all the
    same. Raises what its reading raises."""
    head = store.head()
    if head is None:
        return None
    try:
        run = tier_directory.identity(store)
    except OrchestratorError as error:
        logging.warning("no held step is looked for: %s", error)
        run = None
    if run is None:
        return None
    known = held.standing(head)
    newest = None if known.newest is None else (known.newest.step, known.newest.name)
    barred = tuple((bad.step, bad.name) for bad in known.barred)
    return Journalled(run, head.epoch, journal.tree_of(head), newest, barred)


def _standing(message: Journalled) -> Standing:
    newest = AttemptId(*message.newest) if message.newest else None
    return Standing(message.epoch, newest, tuple(AttemptId(*bad) for bad in message.barred))


def _message(offer: Offer, fault: str) -> OfferedStep:
    return OfferedStep(offer.step, offer.attempt, offer.manifest_crc32c, fault)


def _offer(message: OfferedStep) -> Offer:
    return Offer(message.step, message.attempt, message.manifest_crc32c)


def _faults(offers: Sequence[Sequence[OfferedStep]], hosts: Mapping[int, str]) -> dict[AttemptId, str]:
    """Of steps that some process cannot have: why, by the first of those; or that it has never heard of it."""
    found: dict[AttemptId, str] = {}
    every_step = {_offer(one).id for each in offers for one in each}
    for process, each in enumerate(offers):
        who = f"process {process} ({hosts.get(process, '?')})"
        known = {_offer(one).id for one in each}
        for one in each:
            if one.fault:
                found.setdefault(_offer(one).id, f"{who}: {one.fault}")
        for attempt in every_step - known:
            found.setdefault(attempt, f"{who}: no tier that it can reach holds it")
    return found


class HeldJudgement:
    """What the processes of a job find out about held steps, the same on all of them: a step that one cannot read is
    left out, whatever the reason, and nothing is journalled. Each method is a collective."""

    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        self._rendezvous, self._timeout_s = rendezvous, timeout_s

    def value_of_all(
        self, stored: StoredStep, round_: Round[restore_rounds.Report], outcome: ReadOutcome[Value]
    ) -> Value | None:
        """As `restore`'s own. Raises, on all, only what no other source would help against."""
        reports = restore_rounds.reports_of_all(self._rendezvous, round_, outcome, self._timeout_s)
        ruling, process = restore_rounds.rule_on(reports)
        if ruling is Ruling.DONE:
            assert isinstance(outcome, Read)  # its report is among them
            return outcome.value
        failure = reports[process]
        if ruling is Ruling.FAULT and isinstance(failure, ReadFailure):
            if isinstance(outcome, NotRead) and process == self._rendezvous.process:
                raise outcome.error
            raise as_error(process, Raised(failure.kind, failure.text))
        text = failure.text if isinstance(failure, ReadFailure) else "the processes ask for different arrays"
        self._drop(stored, f"process {process} ({self._rendezvous.hosts.get(process, '?')}): {text}")
        return None

    def proves(self, stored: StoredStep, proof: Proof) -> bool:
        wrong = restore_rounds.wrong_leaves(self._rendezvous, proof, stored.live.step, self._timeout_s)
        if wrong:
            self._drop(stored, f"fingerprints are not those of the save: {wrong[0][1]}")
        return not wrong

    def quarantine(self) -> None:
        """Held steps are no matter of the journal."""

    def _drop(self, stored: StoredStep, reason: str) -> None:
        emit(HeldStepDropped(stored.live.step, stored.live.attempt, reason))
