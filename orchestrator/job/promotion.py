"""A step that is due for the store and for memory is staged once: each process writes its part to its tier, and brings
it to the store from there, in the background.

It is an attempt like any other, of the same name in both places, with the same records; only where a process's part
comes from differs, so that some processes may bring theirs from their tiers and others write theirs straight to the
store: those that have no room in memory. Nobody has to know what another does. The journal alone says what is saved.

Uploads come one after the other, each with a thread of its own, in the order in which they were begun. What a store
that is down does not take is tried again (`persistence`), and given up for a newer step. Meanwhile the part stays in
the tier: it is pinned there.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial

from msgspec.structs import replace

from orchestrator import failpoints
from orchestrator.arrays import WriteStopped
from orchestrator.errors import SaveFailed, StorageError
from orchestrator.job import finalize
from orchestrator.job.contribution import Contribution
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.finalize import OwnPart
from orchestrator.job.outcome import Outcome
from orchestrator.job.participant import Participant
from orchestrator.job.persistence import PATIENCE_S, GivenUp, Persistence
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.uploading import Upholding
from orchestrator.job.voter import SaveContext
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.attempt import Attempt
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import Cause, FileEntry, LiveStep, Manifest, Receipt, file_entry
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, Storage
from orchestrator.storage.throttle import Throttle
from orchestrator.storage.upload import Unreadable, upload

_THREADS = 8  # files on their way at once
_POLL_S = 0.2
_HELD_S = 300.0  # for a part to be written to memory, or not: beyond every bound of a held step


@dataclass(frozen=True)
class Source:
    """Where a process's part of a step is. held: the attempt in memory. tier: this process's, without copies.
    throttle: how fast it may go. let_go: the part is needed no more."""

    held: Participant
    tier: PosixStorage
    throttle: Throttle
    let_go: Callable[[], None]

    @contextlib.contextmanager
    def used_by(self, one: Participant) -> Iterator[None]:
        """Within it `one` begins, which lets the part go in the end."""
        try:
            yield
        finally:
            if not one.begun:
                self.let_go()


class HeldPart(Contribution):
    """A part that is in this process's tier already, on its way to the store."""

    def __init__(
        self, store: JournalStore, rendezvous: Rendezvous, attempt: AttemptId, source: Source, persistence: Persistence
    ) -> None:
        super().__init__(store, rendezvous, attempt, None)
        self._source, self._persistence = source, persistence
        self._sent_bytes, self._lock, self._stop = 0, threading.Lock(), threading.Event()

    @property
    def written_bytes(self) -> int:
        return self._sent_bytes

    @property
    def signed(self) -> bytes:
        return self._source.held.part.signed

    @property
    def receipt(self) -> Receipt:
        return self._source.held.part.receipt

    def write(self, timeout_s: float, given_up: Callable[[], bool]) -> None:
        """Bring the files that the receipt promises to the store, several at a time."""
        known = [replace(entry, path=self._attempt.key(entry.path)) for entry in self.receipt.files]
        if not known:
            return
        with ThreadPoolExecutor(min(_THREADS, len(known)), thread_name_prefix="upload") as pool:
            sending = [pool.submit(self._send, entry) for entry in known]
            try:
                self._watch(sending, given_up)
            finally:
                self._stop.set()  # whoever is left
                for future in sending:
                    future.cancel()

    def _watch(self, sending: Sequence[Future[None]], given_up: Callable[[], bool]) -> None:
        while True:
            done, left = wait(sending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            if not left:
                return
            if given_up():
                raise WriteStopped
            self._persistence.check()

    def _send(self, known: FileEntry) -> None:
        where = f"{self._store.url}/{known.path}"
        self._persistence.persist(where, partial(self._send_once, known))

    def _send_once(self, known: FileEntry) -> None:
        sent = 0

        def passing(count: int) -> None:
            nonlocal sent
            self._source.throttle.take(count, self._check)
            sent += count
            self._count(count)

        failpoints.hit("upload.file")
        try:
            upload(self._source.tier, self._store.storage, known, passing)
        except BaseException:
            self._count(-sent)
            raise

    def _check(self) -> None:
        if self._stop.is_set():
            raise GivenUp("another file of this process has not reached the store")
        self._persistence.check()

    def _count(self, sent: int) -> None:
        with self._lock:
            self._sent_bytes += sent

    def make_durable(self, here: Storage | None = None) -> None:
        failpoints.hit("upload.seal")
        known = {(key := self._attempt.key(entry.path)): replace(entry, path=key) for entry in self.receipt.files}
        durable = self._persistence.persist(self._where, lambda: self._store.storage.make_durable(known, known))
        for entry in durable:
            there = known[entry.path]
            if (entry.bytes, entry.crc32c) != (there.bytes, there.crc32c):
                raise StorageError(
                    f"{self._store.url}/{entry.path}: {entry.bytes} bytes with crc32c {entry.crc32c} arrived, "
                    f"{there.bytes} with {there.crc32c} were sent; it is not used"
                )

    def store_receipt(self) -> bytes:
        return self._persistence.persist(self._where, super().store_receipt)

    def abort_vote(self, phase: str, cause: BaseException, kind: Cause = Cause.REJECTED) -> Receipt:
        kind = Cause.HUNG if isinstance(cause, GivenUp) else kind
        return super().abort_vote(phase, cause, Cause.MEMORY if isinstance(cause, Unreadable) else kind)

    def release(self) -> None:
        super().release()
        self._source.let_go()

    @property
    def _where(self) -> str:
        return f"{self._store.url}/{self._attempt.prefix}"


class Upload(Participant):
    """This process in one save whose part it has written to its tier. before: the uploads that end first."""

    def __init__(
        self, context: SaveContext, save: Participant, source: Source, before: Sequence[Participant] = ()
    ) -> None:
        super().__init__(context, save.id, save.user, None)
        self.started_s, self._before = save.started_s, list(before)
        self._source = source
        from_s = save.started_s + context.options.save_timeout_s / 2
        self._upholding = Upholding(context.signals, save.id, context.rendezvous.count, from_s)
        self.persistence = Persistence(context.options.save_timeout_s, going_on=self._upholding.say)
        self._own = HeldPart(context.store, context.rendezvous, save.id, source, self.persistence)
        self._intent = source.held.intent
        self._pending = source.held.part.pending if self._intent else None  # to make the tree with
        self._whole: _Whole | None = None
        source.held.abandoned = self._abandoned

    @property
    def timeout_s(self) -> float:
        return PATIENCE_S

    @property
    def takes_long(self) -> bool:
        return True

    def give_up(self, reason: str) -> None:
        self.persistence.end(reason)

    def go_on(self) -> None:
        """In the background. Main thread."""
        self._report("staging")
        self._go_on()

    def hurry(self) -> None:
        """There is little time left."""
        self._source.throttle.lift()

    def _abandoned(self) -> bool:
        return bool(self.persistence.over) or self._another_aborts()

    # In the background.

    def _save(self) -> None:
        try:
            self._wait_for_turn()
        except Exception as error:
            self.fail("wait", error)
        super()._save()
        self._pending = self._whole = None

    def _wait_for_turn(self) -> None:
        """Until the uploads before have ended and this process's part is in its tier."""
        while self._before:
            self.persistence.check()
            self._before[0].join(_POLL_S)
            if not self._before[0].running:
                self._before.pop(0)
        self.persistence.begin()
        held, until = self._source.held, time.monotonic() + _HELD_S
        while not held.part_over.wait(_POLL_S):
            self.persistence.check()
            if time.monotonic() > until:
                raise Unreadable(f"{held.label}: this process's part was not written to memory in {_HELD_S:g} s")
        if not held.part_whole:
            raise Unreadable(f"this process's part could not be written to memory: {held.problem or held.error}")

    def _open(self, coordinator: Coordinator) -> tuple[FileEntry, ...]:
        """Process 0: the records that the attempt was opened with in memory."""
        return () if self._problem else tuple(map(self._copied_record, (keys.INTENT, keys.EXTRA)))

    def _copied_record(self, name: str) -> FileEntry:
        key = self.id.key(name)
        body = self._source.tier.get(key)
        if body is None:
            raise Unreadable(f"{self._source.tier.url}/{key}: is missing")
        failpoints.hit("upload.record")
        self.persistence.persist(key, partial(self._create, name, body))
        return file_entry(name, body)

    def _create(self, name: str, body: bytes) -> None:
        assert self._intent is not None
        finalize.create(self._shared.store, self._intent, name, body)

    def _decide(self, coordinator: Coordinator, own: OwnPart) -> Outcome:
        finalizing = partial(self._finalize, own)
        own = OwnPart(own.intent, own.user, None, own.opened, own.receipt, finalizing, self._persist)
        return coordinator.decide(own, self._left_s, partial(self._report, "committing"), self._is_over)

    def _not_saved(self, reason: str) -> SaveFailed:
        over = self.persistence.over  # in a store that is down nothing else can be journalled
        return super()._not_saved(f"{over}; {reason}" if over and over not in reason else reason)

    def _is_over(self) -> bool:
        over = bool(self.persistence.over)
        if not over:
            self._upholding.say()  # process 0: it waits for others
        return over

    def _persist(self, call: Callable[[], None]) -> None:
        self.persistence.persist(f"{self._shared.store.url}/{self.id.prefix}", call)

    def _finalize(self, own: OwnPart, state: Attempt, receipt_files: Mapping[str, FileEntry]) -> LiveStep:
        """Process 0: as `finalize.finalize`, of what is in its tier. Made again, it does the same."""
        if self._whole is None:
            self._whole = self._made_whole(own, state, receipt_files)
        failpoints.hit("upload.tree")
        store, prefix, tree = self._shared.store, self.id.prefix, {}
        for entry in self._whole.tree:
            known = tree[prefix + entry.path] = replace(entry, path=prefix + entry.path)
            upload(self._source.tier, store.storage, known, lambda count: self.persistence.check())
        finalize.made_durable(store, state, tree, receipt_files)
        finalize.store_manifest(store, state.intent, self._whole.body)
        failpoints.hit("upload.finalized")
        return finalize.line_of(state.intent, own.user, self._whole.manifest, self._whole.body)

    def _made_whole(self, own: OwnPart, state: Attempt, receipt_files: Mapping[str, FileEntry]) -> _Whole:
        """If the step is held, the manifest that it has there, so that both are one; it may not be, or its receipts may
        have been stored in other groups."""
        self._source.held.join(_HELD_S)
        body, key = self._source.tier.get(self.id.manifest_key), self.id.manifest_key
        if body is None:
            assert self._pending is not None
            receipts = [state.receipts[index] for index in sorted(state.receipts)]
            merged = self._pending.merge(chunk_index.entries(receipts))
            tree = [replace(file, path=keys.STATE + file.path) for file in merged]
        else:
            manifest = decode(body, Manifest, f"{self._source.tier.url}/{key}", step=self.step, attempt=self.id.name)
            received = {entry.path for receipt in state.receipts.values() for entry in receipt.files}
            of_state = [entry for entry in manifest.files if entry.path.startswith(keys.STATE)]
            tree = [entry for entry in of_state if entry.path not in received]
            signed = {entry.path: entry for entry in manifest.files if entry.path.startswith(keys.RECEIPTS)}
            if signed == dict(receipt_files):
                return _Whole(manifest, body, tree)
        more = (*tree, *own.opened, *receipt_files.values())
        made = finalize.manifest_of(self._shared.store, state, more)
        return _Whole(made, encode(made), tree)


@dataclass(frozen=True)
class _Whole:
    """What makes one of all parts. body: the manifest as it is stored. tree: the files that name all chunks, by path in
    the attempt; they are in process 0's tier."""

    manifest: Manifest
    body: bytes
    tree: Sequence[FileEntry]
