"""Looking at a run whole, before anything is written to it or deleted: the head, every attempt in storage, and whether
they prove that the journal has lost entries.

Costs one listing of all attempts and one of the journal's last 500 entries; records are read only of attempts that the
head does not know, which crashes leave. Reads only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from orchestrator.errors import Damaged, JournalLost, NewerFormat, Suspect
from orchestrator.rules import evidence, journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import StoredAttempt
from orchestrator.rules.records import Head, Intent, Manifest
from orchestrator.run.checked_reads import record
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Reads, Storage

_RACE_VERSIONS = 16  # a listing may miss so many of the newest entries while others are being created


class Journal(Protocol):
    """What is asked of a `JournalStore`, which asks this module before it appends."""

    @property
    def storage(self) -> Storage: ...
    @property
    def url(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    @property
    def run(self) -> object | None: ...
    def head(self) -> Head | None: ...
    def entry(self, version: int) -> Head: ...
    def versions(self, start: int = 0) -> list[int]: ...
    def marked_version(self) -> int: ...


def attempts(storage: Reads) -> dict[AttemptId, StoredAttempt]:
    """Every attempt that has data in the store, committed or not, by one listing. `built_on` is not read."""
    found: dict[AttemptId, StoredAttempt] = {}
    for entry in storage.list(keys.STEPS):
        if parts := AttemptId.in_key(entry.key):
            attempt, name = parts
            before = found.get(attempt, StoredAttempt())
            whole = before.whole or name == keys.MANIFEST
            found[attempt] = StoredAttempt(whole=whole, bytes=before.bytes + entry.bytes)
    return found


def look(store: Journal) -> tuple[Head | None, dict[AttemptId, StoredAttempt]]:
    """The head, None in a new run, and every attempt in storage. Raises JournalLost naming what proves that entries are
    missing, Damaged and StorageError."""
    marking = overlap.begin(store.marked_version)
    stored, marker = attempts(store.storage), marking.result()
    listing = overlap.begin(partial(store.versions, max(0, marker)))
    head = store.head()  # last: what was begun or marked has its entry by then
    reason = evidence.lost(head, stored, marker) or missing(store, head, marker, listing)
    if not reason and store.run is None:  # else they build on versions of that one's journal
        unknown = [attempt for attempt in stored if head and not journal.is_known(head, attempt)]
        stored |= {one: replace(stored[one], built_on=built_on(store, one, stored[one].whole)) for one in unknown}
        if evidence.lost(head, stored, marker):
            head = store.head()  # once more, after the records: a job that saves right now writes both
            reason = evidence.lost(head, stored, marker)
    if reason:
        there = f"the head is version {head.version} of epoch {head.epoch}" if head else "there is no journal"
        raise JournalLost(f"{store.url}: the journal has lost entries: {there}, but {reason}; {store.recipe}")
    return head, stored


def missing(store: Journal, head: Head | None, marker: int, early: Begun[list[int]] | None = None) -> str:
    """A hole among the newest entries; '' if there is none, or a `recovered` entry stands right above it. `early`: a
    listing of the entries from the marker on, which may have been begun before the head was read."""
    if head is None:
        return ""
    versions = early.result() if early else store.versions(max(0, marker))
    for first, last in reversed(evidence.holes(versions or [head.version])):
        if last - first < _RACE_VERSIONS and all(_exists(store, version) for version in range(first, last + 1)):
            continue
        if store.entry(last + 1).event.kind == "recovered":
            return ""
        return f"version {first} is missing" if first == last else f"versions {first} to {last} are missing"
    return ""


def _exists(store: Journal, version: int) -> bool:
    return store.storage.get(keys.journal_key(version)) is not None


def built_on(store: Journal, attempt: AttemptId, whole: bool) -> int:
    """The version of the head that an attempt builds on, by its own records; -1 if they do not tell. Raises
    StorageError: then nothing is known."""
    readers: list[Callable[[], Manifest | Intent | None]] = [lambda: record(store.storage, attempt.intent_key, Intent)]
    if whole:
        readers.insert(0, lambda: record(store.storage, attempt.manifest_key, Manifest))
    for read in readers:
        try:
            if found := read():
                return found.built_on
        except (Damaged, Suspect, NewerFormat):
            continue
    return -1
