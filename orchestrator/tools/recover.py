"""A run whose journal is lost, cut short or damaged: what is whole, and the entry that it can go on from.

`plan` only reads. `write` creates one entry, `recovered`, on request only: no job may be using the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.errors import Damaged, NewerFormat, OrchestratorError, Suspect, UsageError
from orchestrator.rules import evidence, journal
from orchestrator.rules import keys as layout
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.evidence import Choice, Whole
from orchestrator.rules.records import Head, LiveStep, Manifest, crc32c
from orchestrator.run import checked_reads, survey
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage.port import Reads


@dataclass
class Plan:
    """What is left of a run. head: the highest entry that can be read. unreadable: keys of entries that cannot be, with
    the reason. lost: what proves that entries are missing, '' if nothing does. whole: attempts by their manifests, with
    what is missing of each ('' if nothing is). choice: what a `recovered` entry would have. version, epoch: of it."""

    head: Head | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    lost: str = ""
    whole: dict[AttemptId, tuple[LiveStep | None, str]] = field(default_factory=dict)
    choice: Choice = field(default_factory=lambda: Choice((), (), ()))
    version: int = 0
    epoch: int = 1

    @property
    def needed(self) -> bool:
        """Whether the journal cannot go on as it is. An unreadable entry below the head is history."""
        newest = self.head.version if self.head else -1
        return bool(self.lost) or any((layout.journal_version(key) or 0) > newest for key in self.unreadable)


def plan(catalog: JournalStore, on_attempt: Callable[[AttemptId], None] = lambda attempt: None) -> Plan:
    """Look at every entry of the journal and every attempt in storage. Raises StorageError: what cannot be read must
    not be taken for lost."""
    found = Plan()
    stored, marker = dict(sorted(survey.attempts(catalog.storage).items())), catalog.marked_version()
    wholes: list[Whole] = []
    named: dict[AttemptId, int] = {}
    for attempt, one in stored.items():
        on_attempt(attempt)
        whole, problem = _look(catalog.storage, attempt) if one.whole else (None, "no manifest: it was never finished")
        named[attempt] = whole.built_on if whole else survey.built_on(catalog, attempt, False)
        found.whole[attempt] = (whole.entry if whole else None, problem)
        if whole and not problem:
            wholes.append(whole)
    versions = catalog.versions()  # last: whatever a record or marker names has its entry by then
    ended = _entries(catalog, versions, found)
    built = {key: journal.StoredAttempt(one.whole, named[key]) for key, one in stored.items()}
    found.lost = evidence.lost(found.head, built, marker)
    if not found.needed:
        found.lost = survey.missing(catalog, found.head, marker)
    found.choice = evidence.choose(found.head, wholes, ended)
    found.version = evidence.above(found.head, versions, [marker, *named.values()])
    epochs = [attempt.epoch for attempt in stored]
    found.epoch = max([found.head.epoch if found.head else 0, *epochs]) + 1
    return found


def _entries(catalog: JournalStore, versions: list[int], found: Plan) -> set[AttemptId]:
    """Read every entry; returns the attempts that any of them calls retired, aborted or quarantined."""
    ended: set[AttemptId] = set()
    for version in versions:
        try:
            found.head = catalog.entry(version)
        except (Damaged, Suspect) as error:
            found.unreadable[layout.journal_key(version)] = str(error)
            continue
        ended |= {gone.id for gone in found.head.retired}
        ended |= {live.id for live in found.head.quarantined}
    return ended


def _look(storage: Reads, attempt: AttemptId) -> tuple[Whole | None, str]:
    """An attempt as the journal would have it, by its manifest, and what is missing of it. Its records are read and
    compared, of the arrays' files only the sizes: `verify` reads those."""
    try:
        body = storage.get(attempt.manifest_key)
        manifest = checked_reads.record(storage, attempt.manifest_key, Manifest)
        if body is None or manifest is None:
            return None, "no manifest: it was never finished"
        if manifest.id != attempt:
            return None, f"its manifest is {manifest.id.label}'s"
        entry = LiveStep(
            step=attempt.step,
            attempt=attempt.name,
            manifest_crc32c=crc32c(body),
            tree="",
            bytes=manifest.total_bytes + len(body),
            stored_metrics={},
            time=0.0,
        )
    except (Damaged, Suspect, NewerFormat) as error:
        return None, str(error)
    try:
        # No journal lists it, so it cannot have been retired either.
        stored = StoredStep(storage, entry, check_live=lambda live: None)
        stored.check_sizes()
        intent, extra = stored.intent, stored.extra
        for process in range(manifest.process_count):
            stored.file(layout.receipt_name(process))
    except (Damaged, Suspect, NewerFormat) as error:
        return Whole(entry, manifest.built_on), str(error)
    known = LiveStep(
        step=attempt.step,
        attempt=attempt.name,
        manifest_crc32c=entry.manifest_crc32c,
        tree=intent.tree.fingerprint(),
        bytes=entry.bytes,
        stored_metrics=extra.stored_metrics,
        time=extra.timestamp,
    )
    return Whole(journal.carried(known, None), max(manifest.built_on, intent.built_on)), ""


def write(catalog: JournalStore, found: Plan) -> Head:
    """Create the `recovered` entry that `found` describes. Raises UsageError where there is nothing to recover,
    StorageError, and OrchestratorError if somebody writes to the run meanwhile."""
    if not found.needed and not found.choice.added:
        raise UsageError(f"{catalog.url}: nothing to recover: the journal knows every whole attempt")
    if found.version > layout.VERSION_MAX:
        keys = ", ".join(found.unreadable) or layout.journal_key(layout.VERSION_MAX)
        raise Damaged(f"{catalog.url}: no version comes after {keys}; no job has written that: move it out of the run")
    head = evidence.recovered(
        found.head,
        catalog.stamp(),
        version=found.version,
        epoch=found.epoch,
        live=found.choice.live,
        reason=found.lost or "; ".join(found.unreadable) or "attempts that were never committed",
    )
    if not catalog.put(head):
        raise OrchestratorError(f"{catalog.url}: version {head.version} was written meanwhile; stop the job first")
    return head
