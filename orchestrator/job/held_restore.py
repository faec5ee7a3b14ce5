"""Coming back from memory: the held steps that a restore may choose over the newest committed one.

All processes take the same steps in the same order: process 0 reads the journal, each host says what it has
(`held_offers`), and `held.candidates` decides. What cannot be taken is named and left out,
and the next source is tried: an older held step, then the store. Nothing here is journalled, and nothing of a tier is
called damage of the run. Main thread; `find` is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from absl import logging

from orchestrator.errors import OrchestratorError
from orchestrator.job import restore_rounds, tier_hosts, tier_rounds
from orchestrator.job.held_offers import Found, HeldOffers
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.restore_check import Proof
from orchestrator.job.restore_rounds import NotRead, Read, ReadFailure, ReadOutcome, Ruling
from orchestrator.job.rounds import Raised, Round, agree, as_error
from orchestrator.job.tier_rounds import Journalled, KnownStep
from orchestrator.observe.events import HeldStepDropped, emit
from orchestrator.rules import held, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer, Standing
from orchestrator.rules.records import LiveStep
from orchestrator.rules.restore_sources import STORE
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import held_steps, tier_directory
from orchestrator.run.held_steps import HeldSteps, Placed
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import local_path
from orchestrator.storage.sources import Source

Value = TypeVar("Value")

_LIKELY = 3  # committed steps that a restore may come to: the newest, and those that it may step down to


@dataclass(frozen=True)
class HeldChoice:
    """steps: to try, newest first. tree: as `Opening.by_restore` takes it. committed: steps of the journal that are in
    tiers, too, in part or whole: they are read from there first."""

    steps: tuple[StoredStep, ...]
    tree: str | None
    committed: Mapping[Offer, Committed]


Committed = Callable[[JournalStore, LiveStep], StoredStep]


def find(
    tier: MemoryTier, store: JournalStore, rendezvous: Rendezvous, timeout_s: float, step: int | None = None
) -> HeldChoice | None:
    """What the memory tiers of all hosts have that is newer than what a restore would take from the store; or `step`,
    where the journal has none of that number. None in a new run. A collective. Raises what the journal's reading
    raises, on all; WaitTimeout."""
    journalled = agree(rendezvous, tier_rounds.JOURNALLED, timeout_s, lambda: _journalled(store, step))
    if journalled is None:
        return None
    hosts = tier_hosts.meet(tier, rendezvous, journalled.run, timeout_s)
    here = _here(tier, journalled.run, rendezvous.process)
    for problem in here.unreadable:
        logging.warning("a memory tier is left out: %s", problem)
    standing = _standing(journalled)
    in_store = {one.step for one in journalled.committed}

    def wanted(attempt: AttemptId) -> bool:
        if step is None:
            return standing.admits(attempt)
        return attempt.step == step and step not in in_store and standing.knows(attempt)

    in_bucket = "" if local_path(store.url) is not None else store.url
    saved = Source(STORE, store.storage, in_bucket)
    offers = HeldOffers(hosts, here, saved, rendezvous, timeout_s)
    found = offers.find(journalled.committed, wanted)
    whole = [offer for offer, one in found.items() if one.is_whole and wanted(offer.id)]
    chosen = held.candidates(standing, [whole]) if step is None else held.asked_for(standing, whole, step)
    chosen = _of_this_run(store, rendezvous, timeout_s, offers, [found[offer] for offer in chosen])
    best = held.rank(chosen[0].id) if chosen else (-1, -1, -1)
    for offer, one in found.items():
        if wanted(offer.id) and not one.is_whole and held.rank(offer.id) > best:  # nobody would ask for the others
            emit(HeldStepDropped(*offer.id, offers.why(one)))
    committed = [offer for offer, one in found.items() if not wanted(offer.id) and any(one.parts.values())]
    return HeldChoice(
        tuple(here.placed(found[offer].live, offers.placed(found[offer])) for offer in chosen),
        journalled.tree,
        {offer: _committed(here, offers.placed(found[offer]), saved) for offer in committed},
    )


def _of_this_run(
    store: JournalStore, rendezvous: Rendezvous, timeout_s: float, offers: HeldOffers, whole: Sequence[Found]
) -> list[Offer]:
    """Those that the run itself holds; the others are named. A collective. Raises StorageError, on all: a step is not
    left out because the journal cannot be read."""

    def look() -> tuple[str, ...]:
        return tuple(problem(one) for one in whole)

    def problem(one: Found) -> str:
        try:
            manifest = offers.manifest(one)
        except OrchestratorError as error:
            return str(error)
        return held_steps.not_of_this_journal(store, manifest)

    if not whole:
        return []
    problems = agree(rendezvous, tier_rounds.OF_THIS_RUN, timeout_s, look)
    for one, text in zip(whole, problems, strict=True):
        if text:
            emit(HeldStepDropped(*one.live.id, text))
    return [held.offer(one.live) for one, text in zip(whole, problems, strict=True) if not text]


def _here(tier: MemoryTier, run: str, process: int) -> HeldSteps:
    own = tier_directory.of_process(tier.directory, run, process)
    try:
        return held_steps.on_this_host(own, tier_directory.processes(tier.directory, run))
    except OrchestratorError as error:
        return HeldSteps(own, {}, [str(error)])


def _committed(here: HeldSteps, placed: Placed, saved: Source) -> Committed:
    def opened(store: JournalStore, live: LiveStep) -> StoredStep:
        return here.placed(live, placed, saved, store.check_live)

    return opened


def _journalled(store: JournalStore, step: int | None) -> Journalled | None:
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
    good = [live for live in head.live if live.restorable]
    likely = good[-_LIKELY:] if step is None else [live for live in head.live if live.step == step]
    committed = tuple(KnownStep(*live.id, live.manifest_crc32c, live.bytes, live.time) for live in likely)
    return Journalled(run, head.epoch, journal.tree_of(head), newest, barred, committed)


def _standing(message: Journalled) -> Standing:
    newest = AttemptId(*message.newest) if message.newest else None
    return Standing(message.epoch, newest, tuple(AttemptId(*bad) for bad in message.barred))


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
