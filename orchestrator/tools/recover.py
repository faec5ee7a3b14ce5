"""A run whose journal is lost, cut short or damaged: what is whole, and the entry that it can go on from.

`plan` only reads. `write` creates one entry, `recovered`, on request only: no job may be using the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace

from msgspec import structs

from orchestrator.errors import Damaged, NewerFormat, OrchestratorError, Suspect, UsageError
from orchestrator.rules import evidence, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.evidence import Choice, Whole
from orchestrator.rules.records import Head, LiveStep, Manifest, crc32c
from orchestrator.run import checked_reads, survey
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage.port import Reads


@dataclass(frozen=True)
class InspectedAttempt:
    """An attempt in storage. entry: as the journal would have it, None without a manifest that can be read. problem:
    what is missing of it, '' if nothing is. built_on: the version of the head that it builds on, -1 if its records do
    not tell."""

    entry: LiveStep | None
    problem: str
    built_on: int = -1


@dataclass(frozen=True)
class RecoveryPlan:
    """What is left of a run. head: the highest entry that can be read. unreadable: keys of entries that cannot be, with
    the reason. lost: what proves that entries are missing, '' if nothing does. choice: what a `recovered` entry would
    have. version, epoch: of it."""

    head: Head | None
    unreadable: Mapping[str, str]
    lost: str
    attempts: Mapping[AttemptId, InspectedAttempt]
    choice: Choice
    version: int
    epoch: int

    @property
    def required(self) -> bool:
        """Whether the journal cannot go on as it is."""
        return bool(self.lost) or _is_cut(self.head, self.unreadable)


@dataclass(frozen=True)
class _Journal:
    """What can be read of a journal. versions: of all entries that are there. ended: the attempts that any entry calls
    retired, aborted or quarantined."""

    head: Head | None
    versions: Sequence[int]
    unreadable: Mapping[str, str]
    ended: Set[AttemptId]


def plan(store: JournalStore, on_attempt: Callable[[AttemptId], None] = lambda attempt: None) -> RecoveryPlan:
    """Read every entry of the journal and the records of every attempt in storage. Raises StorageError: what cannot be
    read must not be taken for lost."""
    stored, marker = dict(sorted(survey.attempts(store.storage).items())), store.marked_version()
    attempts = _inspect_all(store, stored, on_attempt)
    journalled = _read_journal(store)  # last: whatever a record or marker names has its entry by then
    head = journalled.head
    built = {attempt: journal.StoredAttempt(one.whole, attempts[attempt].built_on) for attempt, one in stored.items()}
    lost = evidence.lost(head, built, marker)
    if not lost and not _is_cut(head, journalled.unreadable):
        lost = survey.missing(store, head, marker)
    whole = [Whole(one.entry, one.built_on) for one in attempts.values() if one.entry and not one.problem]
    named = [marker, *(one.built_on for one in attempts.values())]
    return RecoveryPlan(
        head=head,
        unreadable=journalled.unreadable,
        lost=lost,
        attempts=attempts,
        choice=evidence.choose(head, whole, journalled.ended),
        version=evidence.above(head, journalled.versions, named),
        epoch=max([head.epoch if head else 0, *(attempt.epoch for attempt in stored)]) + 1,
    )


def _is_cut(head: Head | None, unreadable: Mapping[str, str]) -> bool:
    """Whether entries above the head are there and cannot be read. One below it is history."""
    newest = head.version if head else -1
    return any((keys.journal_version(key) or 0) > newest for key in unreadable)


def _read_journal(store: JournalStore) -> _Journal:
    head: Head | None = None
    versions = store.versions()
    unreadable: dict[str, str] = {}
    ended: set[AttemptId] = set()
    for version in versions:
        try:
            head = store.entry(version)
        except (Damaged, Suspect) as error:
            unreadable[keys.journal_key(version)] = str(error)
            continue
        ended |= {gone.id for gone in head.retired} | {live.id for live in head.quarantined}
    return _Journal(head, versions, unreadable, ended)


def _inspect_all(
    store: JournalStore, stored: Mapping[AttemptId, journal.StoredAttempt], on_attempt: Callable[[AttemptId], None]
) -> dict[AttemptId, InspectedAttempt]:
    attempts: dict[AttemptId, InspectedAttempt] = {}
    for attempt, one in stored.items():
        on_attempt(attempt)
        found = _inspect(store.storage, attempt) if one.whole else _UNFINISHED
        if found.entry is None:
            found = replace(found, built_on=survey.built_on(store, attempt, False))
        attempts[attempt] = found
    return attempts


_UNFINISHED = InspectedAttempt(None, "no manifest: it was never finished")


def _inspect(storage: Reads, attempt: AttemptId) -> InspectedAttempt:
    """An attempt that has a manifest. Its records are read and compared, of the arrays' files only the sizes: `verify`
    reads those."""
    try:
        body = storage.get(attempt.manifest_key)
        manifest = checked_reads.record(storage, attempt.manifest_key, Manifest)
    except (Damaged, Suspect, NewerFormat) as error:
        return InspectedAttempt(None, str(error))
    if body is None or manifest is None:
        return _UNFINISHED
    if manifest.id != attempt:
        return InspectedAttempt(None, f"its manifest is {manifest.id.label}'s")
    entry = LiveStep(
        step=attempt.step,
        attempt=attempt.name,
        manifest_crc32c=crc32c(body),
        tree="",
        bytes=manifest.total_bytes + len(body),
        stored_metrics={},
        time=0.0,
    )
    try:
        # No journal lists it, so it cannot have been retired either.
        stored = StoredStep(storage, entry, check_live=lambda live: None)
        stored.check_sizes()
        intent, extra = stored.intent, stored.extra
        stored.check_files(keys.RECEIPTS, (0, 1))
    except (Damaged, Suspect, NewerFormat) as error:
        return InspectedAttempt(entry, str(error), manifest.built_on)
    known = structs.replace(
        entry, tree=intent.tree.fingerprint(), stored_metrics=extra.stored_metrics, time=extra.timestamp
    )
    return InspectedAttempt(journal.carried(known, None), "", max(manifest.built_on, intent.built_on))


def write(store: JournalStore, found: RecoveryPlan) -> Head:
    """Create the `recovered` entry that `found` describes. Raises UsageError where there is nothing to recover,
    StorageError, and OrchestratorError if somebody writes to the run meanwhile."""
    if not found.required and not found.choice.added:
        raise UsageError(f"{store.url}: nothing to recover: the journal knows every whole attempt")
    if found.version > keys.VERSION_MAX:
        highest = ", ".join(found.unreadable) or keys.journal_key(keys.VERSION_MAX)
        raise Damaged(f"{store.url}: no version comes after {highest}; no job has written that: move it out of the run")
    head = evidence.recovered(
        found.head,
        store.stamp(),
        version=found.version,
        epoch=found.epoch,
        live=found.choice.live,
        reason=found.lost or "; ".join(found.unreadable) or "attempts that were never committed",
    )
    if not store.put(head):
        raise OrchestratorError(f"{store.url}: version {head.version} was written meanwhile; stop the job first")
    return head
