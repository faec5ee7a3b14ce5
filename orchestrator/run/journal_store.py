"""The journal as it is stored: reading its entries, and the one loop that appends to it.

Opening and reading change nothing; a read-only credential is enough. Methods may be called from any thread.
"""

from __future__ import annotations

import random
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial

from absl import logging

from orchestrator.errors import (
    Damaged,
    Fenced,
    JournalLost,
    NotARun,
    NothingToRestore,
    StepNotFound,
    StepRetired,
    StorageError,
)
from orchestrator.observe.events import Retried, emit
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.journal import FencedBy, Next, Rejected, Stamp, StoredAttempt
from orchestrator.rules.records import Head, LiveStep
from orchestrator.run import not_a_run, survey
from orchestrator.run.checked_reads import journal_entry
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Created, Storage

EARLY_S = 5.0  # a head that was read longer ago is read again before anything is built on it
_CONFLICTS_MAX = 100
_CONFLICT_PAUSE_S = 0.01
_MARKED_EVERY = 500  # versions; half a page of a listing in an object store


class JournalStore:
    """One run in one store. `writer` is how this process signs its journal entries."""

    def __init__(
        self,
        storage: Storage,
        writer: str,
        clock: Callable[[], float] = time.time,
        ids: Callable[[], str] | None = None,
        *,
        run: JournalStore | None = None,
    ) -> None:
        """run: where the attempts go that are made here first: a tier's do, and what they build on is its journal."""
        self.storage: Storage = storage
        self.writer, self.run = writer, run
        self._clock = clock
        self._ids = ids or (lambda: uuid.uuid4().hex)
        self._known_version = -1  # where to start listing: versions only grow
        self._looked = False  # whether the run was looked at whole, which comes before any append
        self._durable = (-1, "")  # version and `write_id` of the highest that is known to survive a power loss

    @property
    def url(self) -> str:
        return self.storage.url

    @property
    def durable_version(self) -> int:
        """The highest that this object knows to survive a power loss."""
        return self._durable[0]

    def note_durable(self, version: int, write_id: str = "") -> None:
        if version > self._durable[0]:
            self._durable = (version, write_id)

    @property
    def built_on(self) -> int:
        """What the records of an attempt that is made now build on."""
        return self.built_on_entry[0]

    @property
    def built_on_entry(self) -> tuple[int, str]:
        """Its version, and its `write_id` where this process has seen the entry."""
        return (self.run or self)._durable

    def stamp(self) -> Stamp:
        return Stamp(self.writer, self._clock(), self._ids())

    # Journal.

    def head(self) -> Head | None:
        """The highest journal entry; None in a new run: nothing says that there has ever been an entry. Raises
        JournalLost if something does, or if an entry that was read before is gone; Damaged if the highest entry cannot
        be trusted."""
        known = self._known_version
        likely = overlap.begin(partial(self.entry, known)) if known >= 0 else None  # mostly it is the newest still
        start = known if known >= 0 else self.marked_version()
        versions = self._versions(max(start, 0)) or (self._versions(0) if start > 0 else [])
        if not versions and self._known_version < 0:
            remains = self._remains()
            if not remains:
                return None
            versions = self._versions(0)  # again: somebody may have opened the run meanwhile
            if not versions:
                raise JournalLost(f"{self.url}: there is no journal, but {remains}; {self.recipe}")
        newest = max(versions, default=-1)
        if newest < self._known_version:
            if self.storage.get(keys.journal_key(self._known_version)) is None:
                text = f"entry {self._known_version} was there and is gone; the newest is {newest}"
                raise JournalLost(f"{self.url}: the journal has lost entries: {text}; {self.recipe}")
            newest = self._known_version  # a listing that is behind
        self._known_version = max(self._known_version, newest)
        try:
            return likely.result() if likely and newest == known else self.entry(newest)
        except Damaged as error:
            raise type(error)(f"{error}; it is the journal's newest entry; {self.recipe}") from error

    @property
    def recipe(self) -> str:
        """What to do about a journal that cannot be trusted."""
        where = shlex.quote(self.url)
        return (
            f"nothing was changed; `orchestrator doctor {where}` and `orchestrator recover {where}` say what is whole"
        )

    def _remains(self) -> str:
        """What is there of a run that has no journal; '' if nothing is. Stops at the first."""
        for entry in self.storage.list(keys.STEPS):
            if found := AttemptId.in_key(entry.key):
                return f"attempts are, such as {found[0].label}"
        marked = self.marked_version()
        return f"{keys.JOURNAL_INDEX} names version {marked}" if marked >= 0 else ""

    def require_head(self) -> Head:
        """As `head`. Raises NotARun in a new run."""
        head = self.head()
        if head is None:
            raise NotARun(not_a_run.explanation(self.storage, self.url))
        return head

    def durable_head(self) -> Head:
        """As `require_head`, and the entry survives power loss. On POSIX an entry can be read a moment before its
        writer has synced its name: nothing may be reported as saved, and nothing deleted, because of one that could
        still vanish. Raises StorageError, NotARun."""
        head = self.require_head()
        self.storage.make_durable([keys.journal_key(head.version)])
        self.note_durable(head.version, head.write_id)
        return head

    def entry(self, version: int) -> Head:
        """One journal entry. Raises Damaged if it is missing, edited or in the wrong place."""
        return journal_entry(self.storage, keys.journal_key(version), version)

    def entries(self) -> Iterator[Head]:
        """All journal entries, oldest first."""
        return (self.entry(version) for version in self.versions())

    def versions(self, start: int = 0) -> list[int]:
        """The versions from `start` on that have an object in the journal, ascending."""
        return sorted(self._versions(start))

    def _versions(self, start: int) -> list[int]:
        found = self.storage.list(keys.JOURNAL, keys.journal_key(start))
        return [version for entry in found if (version := keys.journal_version(entry.key)) is not None]

    def marked_version(self) -> int:
        """A version that the journal has reached, from its newest marker; -1 if it has none (yet)."""
        found = self.storage.list(keys.JOURNAL_INDEX)
        return next((version for entry in found if (version := keys.indexed_version(entry.key)) is not None), -1)

    def _mark(self, version: int) -> None:
        """Spare later readers the listing of old entries. A hint: without it they list more, and find the same."""
        try:
            self.storage.create(keys.index_key(version), b"")
        except StorageError as error:
            logging.warning("%s: journal version %d could not be marked: %s", self.url, version, error)

    def append(
        self, rule: Callable[[Head | None, Stamp], Next], early: Begun[Head | None] | None = None
    ) -> Head | None:
        """Apply a journal rule: read the head, compute the next, create it; if somebody was first, do it again.

        `early`: a reading of the head that was begun a moment ago. The first try may build on it, as if this process
        had paused before it creates; what else the rule says is asked again of a head read now (decision 18).
        Returns the head that holds the change (the current one where the rule found nothing to do). Raises Fenced if
        a newer epoch has been opened, what the rule rejects with, JournalLost if there was a journal and it is not
        (whole), and StorageError after 100 lost races.
        """
        if not self._looked:
            self.look()
        for tries in range(1, _CONFLICTS_MAX + 1):
            following = self._built_on(rule, early) if tries == 1 else None
            head = None if following else self.head()
            match following or rule(head, self.stamp()):
                case None:
                    return head
                case FencedBy(epoch, writer):
                    raise Fenced(f"{self.url}: fenced by epoch {epoch}, opened by {writer}; this process must stop")
                case Rejected(error):
                    raise error
                case Head() as made:
                    if self.put(made):
                        return made
            wait_s = random.uniform(0, _CONFLICT_PAUSE_S)
            emit(Retried("journal", tries, wait_s=wait_s))
            time.sleep(wait_s)
        raise StorageError(f"{self.url}: lost {_CONFLICTS_MAX} races for the next journal version; too many writers")

    def _built_on(self, rule: Callable[[Head | None, Stamp], Next], early: Begun[Head | None] | None) -> Head | None:
        """The next head, made of an early reading; None if that is too old or has failed, or if `rule` makes none."""
        if early is None:
            return None
        try:
            head = early.result(EARLY_S)
        except Exception:  # read again, and then raised
            return None
        outcome = rule(head, self.stamp()) if early.age_s <= EARLY_S else None
        return outcome if isinstance(outcome, Head) else None

    def look(self) -> tuple[Head | None, dict[AttemptId, StoredAttempt]]:
        """The head and every attempt in storage (`survey.look`). Raises JournalLost."""
        found = survey.look(self)
        self._looked = True
        return found

    def put(self, following: Head) -> bool:
        """Create an entry if its version is not taken. It is durable then."""
        if following.version > keys.VERSION_MAX:
            key = keys.journal_key(keys.VERSION_MAX)
            raise Damaged(f"{self.url}/{key}: no version comes after it; no job has written it: move it out of the run")
        if not isinstance(self.storage.create(keys.journal_key(following.version), encode(following)), Created):
            return False
        self.note_durable(following.version, following.write_id)
        self._known_version = max(self._known_version, following.version)
        if following.version % _MARKED_EVERY == 0:
            self._mark(following.version)
        return True

    # Steps.

    def step(self, live: LiveStep) -> StoredStep:
        """A step of the journal, opened for reading. Reads nothing yet."""
        return StoredStep(self.storage, live, self.check_live)

    def newest(self, head: Head) -> LiveStep | None:
        """The restorable step committed last; None in a new run, where no step was ever committed. Raises
        NothingToRestore where there are steps and all are quarantined: that must not be taken for a new run."""
        found = journal.newest(head)
        where = shlex.quote(self.url)
        if found is None and head.live:
            raise NothingToRestore(
                f"{self.url}: all {len(head.live)} steps are quarantined (newest: step {head.live[-1].step}); "
                f"`orchestrator log {where}` says why, `orchestrator verify --all {where}` and `orchestrator release "
                f"{where} --step=N` bring back what is good; to begin again at step 0, use another root"
            )
        return found

    def find(self, step: int | None) -> LiveStep | None:
        """The `newest` step, or the given one. Raises NothingToRestore, StepNotFound."""
        head = self.head()
        if step is None:
            return self.newest(head) if head else None
        return self.found(head, step)

    def found(self, head: Head | None, step: int) -> LiveStep:
        """This step of `head`. Raises StepNotFound."""
        found = journal.find(head, step) if head else None
        if found is None or not found.restorable:
            have = ", ".join(str(live.step) for live in (head.live if head else ()) if live.restorable) or "none"
            why = self._quarantined(found) if found else "is not in this run"
            raise StepNotFound(f"{self.url}: step {step} {why}; restorable steps: {have}")
        return found

    def _quarantined(self, live: LiveStep) -> str:
        why = f" ({live.quarantine.reason})" if live.quarantine and live.quarantine.reason else ""
        command = f"orchestrator release {shlex.quote(self.url)} --step={live.step}"
        return f"is quarantined{why}; `{command}` makes it restorable again"

    def check_live(self, live: LiveStep) -> None:
        """The attempt is still live: whatever is wrong with what is stored of it is no matter of retention. Raises
        StepRetired."""
        head = self.require_head()
        if not journal.is_live(head, live.id):
            newest = journal.newest(head)
            now = f"the newest is step {newest.step}" if newest else "none is restorable"
            raise StepRetired(f"{self.url} {live.id.label}: was retired while it was read; {now}")
