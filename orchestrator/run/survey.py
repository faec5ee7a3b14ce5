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
from orchestrator.rules.codec import AnyRecord
from orchestrator.rules.journal import Found
from orchestrator.rules.records import Head, Intent, Manifest
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Storage

_RACE_VERSIONS = 16  # a listing may miss so many of the newest entries while others are being created


class Stored(Protocol):
    """What is asked of a `catalog.Catalog`, which asks this module before it appends."""

    @property
    def storage(self) -> Storage: ...
    @property
    def url(self) -> str: ...
    @property
    def recipe(self) -> str: ...
    def head(self) -> Head | None: ...
    def entry(self, version: int) -> Head: ...
    def versions(self, start: int = 0) -> list[int]: ...
    def marked_version(self) -> int: ...
    def stored(self) -> dict[AttemptId, Found]: ...
    def record(self, attempt: AttemptId, name: str, kind: type[AnyRecord]) -> AnyRecord | None: ...


def look(catalog: Stored) -> tuple[Head | None, dict[AttemptId, Found]]:
    """The head, None in a new run, and every attempt in storage. Raises JournalLost naming what proves that entries are
    missing, Damaged and StorageError."""
    marking = overlap.begin(catalog.marked_version)
    stored, marker = catalog.stored(), marking.result()
    listing = overlap.begin(partial(catalog.versions, max(0, marker)))
    head = catalog.head()  # last: what was begun or marked has its entry by then
    reason = evidence.lost(head, stored, marker) or missing(catalog, head, marker, listing)
    if not reason:
        unknown = [attempt for attempt in stored if head and not journal.is_known(head, attempt)]
        stored |= {one: replace(stored[one], built_on=built_on(catalog, one, stored[one].whole)) for one in unknown}
        if evidence.lost(head, stored, marker):
            head = catalog.head()  # once more, after the records: a job that saves right now writes both
            reason = evidence.lost(head, stored, marker)
    if reason:
        there = f"the head is version {head.version} of epoch {head.epoch}" if head else "there is no journal"
        raise JournalLost(f"{catalog.url}: the journal has lost entries: {there}, but {reason}; {catalog.recipe}")
    return head, stored


def missing(catalog: Stored, head: Head | None, marker: int, early: Begun[list[int]] | None = None) -> str:
    """A hole among the newest entries; '' if there is none, or a `recovered` entry stands right above it. `early`: a
    listing of the entries from the marker on, which may have been begun before the head was read."""
    if head is None:
        return ""
    versions = early.result() if early else catalog.versions(max(0, marker))
    for first, last in reversed(evidence.holes(versions or [head.version])):
        if last - first < _RACE_VERSIONS and all(_exists(catalog, version) for version in range(first, last + 1)):
            continue
        if catalog.entry(last + 1).event.kind == "recovered":
            return ""
        return f"version {first} is missing" if first == last else f"versions {first} to {last} are missing"
    return ""


def _exists(catalog: Stored, version: int) -> bool:
    return catalog.storage.get(keys.journal_key(version)) is not None


def built_on(catalog: Stored, attempt: AttemptId, whole: bool) -> int:
    """The version of the head that an attempt builds on, by its own records; -1 if they do not tell. Raises
    StorageError: then nothing is known."""
    readers: list[Callable[[], Manifest | Intent | None]] = [lambda: catalog.record(attempt, keys.INTENT, Intent)]
    if whole:
        readers.insert(0, lambda: catalog.record(attempt, keys.MANIFEST, Manifest))
    for read in readers:
        try:
            if record := read():
                return record.built_on
        except (Damaged, Suspect, NewerFormat):
            continue
    return -1
