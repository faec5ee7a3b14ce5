"""Deleting the data of attempts that can never be restored any more. Resumable: what a crash leaves is found again.

Rule 5 of the on-disk contract: only retired or aborted attempts, and uncommitted ones of an epoch below the head's.
All three are final (an attempt's name is never used again), so even a collector with an old head deletes nothing live.
A journal that has lost entries knows nothing of what they committed: then nothing is deleted at all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from absl import logging

from orchestrator import failpoints
from orchestrator.errors import Fenced, OrchestratorError, StorageError, UnsafeKey
from orchestrator.observe.events import AttemptsDeleted, Event, emit
from orchestrator.rules import journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.keys import MANIFEST
from orchestrator.rules.records import RetiredAttempt
from orchestrator.run import orbax_views
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import local_path
from orchestrator.storage.port import DeletesMany, Storage
from orchestrator.texts import printable


@dataclass
class Collection:
    """What was (or, in a dry run, would be) deleted. `failed`: one line per file that could not be."""

    attempts: list[RetiredAttempt] = field(default_factory=list)
    bytes: int = 0
    files: int = 0
    failed: list[str] = field(default_factory=list)


def collect(
    store: JournalStore,
    *,
    epoch: int | None = None,
    dry_run: bool = False,
    on_file: Callable[[str], None] | None = None,
    orphans: bool = True,
    tell: Callable[[Event], None] = emit,
) -> Collection:
    """Delete what may be deleted and journal it as `collected`. A file that cannot be deleted is counted, not fatal.

    `epoch`: collect for this incarnation; if a newer one has taken over, Fenced is raised and nothing deleted.
    `orphans`: also look through storage for leftovers of older epochs (one listing of all steps). `tell`: is given the
    event. Raises JournalLost if what is there proves that the journal has lost entries.
    """
    failpoints.hit("collect.before")
    found = store.look()[1] if orphans else {}
    head = store.require_head() if dry_run else store.durable_head()
    if epoch is not None and head.epoch > epoch:
        raise Fenced(f"{store.url}: epoch {epoch} is fenced by epoch {head.epoch} ({head.writer}); nothing deleted")
    if not dry_run and (root := local_path(store.url)) is not None:
        _prune_views(Path(root), store)
    result = Collection()
    done: list[AttemptId] = []
    for gone in journal.collectable(head, found):
        # It was listed before the head was read: it may have been finished before the head's epoch was opened.
        unfinished = gone.reason == "orphan" and not found[gone.id].whole
        if unfinished and store.storage.get(gone.id.manifest_key) is not None:
            continue
        result.attempts.append(gone)
        if _delete(store, gone, result, dry_run, on_file):
            done.append(gone.id)
    if done and not dry_run:
        failpoints.hit("collect.deleted")
        store.append(partial(journal.collected, attempts=done))
        failpoints.hit("collect.after")
        tell(AttemptsDeleted(len(done), result.bytes, len(result.failed)))
    return result


def _prune_views(root: Path, store: JournalStore) -> None:
    """Their links would keep the data of attempts that are to be deleted."""
    try:
        orbax_views.prune(root, store.head)
    except (OSError, OrchestratorError) as error:
        logging.warning("%s: directories of steps that are gone are left: %s", root, error)


def _delete(
    store: JournalStore,
    gone: RetiredAttempt,
    result: Collection,
    dry_run: bool,
    on_file: Callable[[str], None] | None,
) -> bool:
    """Delete one attempt's files; True if all are gone. The manifest goes first: without it nothing is readable.

    What is no object of a run goes with it if it is a plain file, whatever its name. A link and a special file stay,
    and with them the attempt's line in the journal: they are somebody's, who is told so each time.
    """
    prefix = gone.id.prefix
    try:
        sizes = {entry.key: entry.bytes for entry in store.storage.list(prefix)}
    except StorageError as unreadable:  # the others can still be deleted
        result.failed.append(str(unreadable))
        return False
    first = [key for key in sizes if key.endswith(MANIFEST)]
    rest = [key for key in sizes if not key.endswith(MANIFEST)]
    failures = len(result.failed)
    for key, error in chain(_deleted(store.storage, first, dry_run), _deleted(store.storage, rest, dry_run)):
        if on_file:
            on_file(key)
        if error is None:
            result.bytes += sizes[key]
            result.files += 1
        else:
            result.failed.append(str(error))
    return len(result.failed) == failures


def _deleted(storage: Storage, keys: Sequence[str], dry_run: bool) -> Iterator[tuple[str, StorageError | None]]:
    """Each key once it is deleted, with the error if it could not be."""
    if dry_run:
        yield from ((key, None) for key in keys)
    elif isinstance(storage, DeletesMany):
        failpoints.hit("collect.file")
        yield from storage.delete_many(keys)
    else:
        for key in keys:
            failpoints.hit("collect.file")
            error: StorageError | None = None
            try:
                storage.delete(key)
            except (StorageError, UnsafeKey) as failed:
                error = StorageError(str(failed))
            yield key, error


class BackgroundDeletion:
    """Deletes in the background, for one incarnation, without anybody waiting for it; once at a time. Any thread.
    `tell`: as of `collect`."""

    def __init__(self, store: JournalStore, tell: Callable[[Event], None] = emit) -> None:
        self._store, self._tell = store, tell
        self._thread: threading.Thread | None = None
        self._swept = self._stopped = False

    def start(self, epoch: int | None) -> None:
        """Begin, for the incarnation of `epoch`, unless it is under way or stopped. What fails is logged, and done the
        next time."""
        if self._stopped or (self._thread and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=partial(self._run, epoch), name="collect", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Begin no more: the program ends. The next incarnation deletes what this one leaves."""
        self._stopped = True

    def wait(self, timeout_s: float) -> None:
        """Until what is under way is done, or `timeout_s` has passed."""
        if self._thread:
            self._thread.join(timeout_s)

    def _run(self, epoch: int | None) -> None:
        try:
            # Leftovers of older epochs need a listing of all steps: once per incarnation is enough.
            result = collect(self._store, epoch=epoch, orphans=not self._swept, tell=self._tell)
            self._swept = True
            for line in result.failed:
                logging.warning("collect: %s", printable(line))
        except (OrchestratorError, RuntimeError) as error:  # RuntimeError: no more threads, the program ends
            logging.warning("collect: %s; tried again after the next save", error)
