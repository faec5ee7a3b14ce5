"""The coordinator: process 0's background role for one save. Performs what `protocol.advance` decides.

Runs on one background thread of process 0. It never runs a collective and never waits without a bound.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from absl import logging
from msgspec.structs import replace

from orchestrator import failpoints, policy
from orchestrator.arrays import PendingWrite
from orchestrator.errors import Damaged, Fenced, OrchestratorError, RootChanged, StorageError
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.observe.events import HostLocalDiffers, emit
from orchestrator.policy import KeepPolicy
from orchestrator.rules import attempt as protocol
from orchestrator.rules import chunk_index, holders, journal, json_numbers, keys
from orchestrator.rules.attempt import AppendAbort, AppendCommit, Attempt, Finalize, Phase
from orchestrator.rules.attempt_id import AttemptId, receipt_process
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.fingerprints import fingerprints
from orchestrator.rules.records import (
    FORMAT,
    Extra,
    Failure,
    FileEntry,
    Head,
    Intent,
    Json,
    LiveStep,
    Manifest,
    Receipt,
    crc32c,
    file_entry,
)
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Exists
from orchestrator.texts import printable

QUICK_POLL_S = 0.002  # the first time; a save of small leaves takes a few of these
_SIGNAL_POLL_S = 0.01
_STORAGE_POLL_S = 1.0
_WARNED_MAX = 10_000  # leaves that hosts disagree about, remembered
RECEIPT_READS = 64  # at once
RECEIPT_BATCH = 16 * RECEIPT_READS


@dataclass(frozen=True)
class UserData:
    """What the user gave beside the state; `timestamp` in seconds since the epoch."""

    metrics: dict[str, float]
    extra: dict[str, Json]
    timestamp: float


Opened = tuple[FileEntry, ...]


def run_prefix(run: str) -> str:
    """Where the processes of this incarnation post signals."""
    return f"orchestrator/{run}/"


def signal_prefix(run: str, attempt: AttemptId) -> str:
    """Where the processes of this incarnation post signals about an attempt. `run` is random per incarnation."""
    return f"{run_prefix(run)}{attempt.step}/{attempt.name}/"


class Coordinator:
    """Decides one attempt after another for epoch `epoch`. One save at a time."""

    def __init__(
        self,
        catalog: Catalog,
        rendezvous: Rendezvous,
        *,
        epoch: int = 0,
        run: str,
        keep: KeepPolicy | None,
        quarantine_keep_s: float | None = None,
        host_local: str = "warn",
    ) -> None:
        self._catalog = catalog
        self._rendezvous = rendezvous
        self.epoch = epoch
        self._run = run
        self._keep, self._quarantine_keep_s = keep, quarantine_keep_s
        self._host_local, self._warned = host_local, set[str]()  # of the leaves that it has been said of
        self._lack_told = False
        self._previous = signal_prefix(run, AttemptId(-1, "none"))
        self._entry: LiveStep | None = None
        self._head: Begun[Head | None] | None = None  # read while the attempt is finalized
        self._mine: bytes | None = None  # this process's receipt, as the store has acknowledged it
        self._files: dict[str, FileEntry] = {}  # records of the attempt that is being decided, by path
        self.committed_bytes = 0  # of the last decided attempt
        self.stage_s = 0.0  # of its slowest process

    def open(self, intent: Intent, user: UserData) -> Opened:
        """Write the attempt's intent and the user's data. Raises if another writer already uses this attempt's name.

        Any thread, while this process writes its arrays. What it returns is for `decide`: it is not kept here, as a
        store may let go of the thread when the next attempt is under way.
        """
        self._tell_lack(intent.step, user.metrics)
        extra = Extra(
            format=FORMAT,
            write_id=self._catalog.stamp().write_id,
            step=intent.step,
            timestamp=user.timestamp,
            stored_metrics=json_numbers.stored_all(user.metrics),
            stored_extra={name: json_numbers.pack(value) for name, value in user.extra.items()},
        )

        def create_intent() -> FileEntry:
            failpoints.hit("intent.before")
            written = self._create(intent, keys.INTENT, encode(intent))
            failpoints.hit("intent.after")
            return written

        return tuple(overlap.together(create_intent, lambda: self._create(intent, keys.EXTRA, encode(extra))))

    def _tell_lack(self, step: int, metrics: dict[str, float]) -> None:
        """Once: that retention goes by a metric which a save does not have, such as a misspelt one."""
        if not self._lack_told and (lack := policy.lacking(self._keep, metrics)):
            self._lack_told = True
            logging.warning("step %d: %s", step, printable(lack))

    def decide(
        self,
        intent: Intent,
        user: UserData,
        pending: PendingWrite | None,
        opened: Opened,
        deadline_s: float,
        all_in: Callable[[], None] = lambda: None,
        mine: bytes | None = None,
    ) -> Attempt:
        """Collect receipts until all are in, one says NO or `deadline_s` has passed; commit or abort; announce.

        `pending`: this process's own write, None if it has failed. `opened`: what `open` has written. `all_in` is
        called when all are in and the commit begins. `mine`: this process's receipt, if the store has acknowledged it:
        it need not be read then.
        Returns the attempt in a terminal phase. Raises StorageError if the outcome could not be journalled: then the
        attempt is either not committed (and a later epoch collects it) or committed without anybody being told.
        """
        prefix = signal_prefix(self._run, intent.id)
        self._files, self._mine, self._head = {entry.path: entry for entry in opened}, mine, None
        try:
            attempt = Attempt(intent, own_must_agree=self._host_local == "error")
            state, effects = self._collect_receipts(attempt, deadline_s)
            # Whoever has not heard of the previous decision by now finds it in the journal.
            self._rendezvous.forget(self._previous)
            self._previous = prefix
            if state.phase is Phase.FINALIZING:
                all_in()
                self._compare_own(state)
            state = self._carry_out(state, effects, user, pending)
        except Exception as error:  # the others wait for a word; the caller gets the error itself
            reason = f"the outcome could not be journalled: {error}"
            self.announce(prefix, Phase.ABORTED, reason)
            raise
        self.announce(prefix, state.phase, describe(state))
        return state

    def _compare_own(self, state: Attempt) -> None:
        """Warn, once for each leaf, where processes have other values of their own than the one that is stored."""
        if self._host_local != "warn":
            return
        found = [one for one in holders.differences(state.intent, state.receipts) if one.leaf.name not in self._warned]
        if found and len(self._warned) < _WARNED_MAX:
            self._warned |= {one.leaf.name for one in found}
            text = "; ".join(holders.lines(found, state.receipts))
            emit(HostLocalDiffers(*state.intent.id, len(found), text))

    def _carry_out(
        self, state: Attempt, effects: tuple[protocol.Effect, ...], user: UserData, pending: PendingWrite | None
    ) -> Attempt:
        while effects:
            event = self._perform(effects[0], state, user, pending)
            if event is None:
                break
            state, effects = protocol.advance(state, event)
        return state

    def _collect_receipts(self, state: Attempt, deadline_s: float) -> tuple[Attempt, tuple[protocol.Effect, ...]]:
        intent = state.intent
        prefix = signal_prefix(self._run, intent.id) + "receipt/"
        started = time.monotonic()
        look_at = started + _STORAGE_POLL_S  # when storage is looked at next, signal or not
        effects: tuple[protocol.Effect, ...] = ()
        while not effects:
            now = time.monotonic()
            if now - started > deadline_s:
                return protocol.advance(state, protocol.DeadlinePassed(deadline_s, self._rendezvous.hosts))
            posted = self._rendezvous.poll(prefix)
            if now >= look_at:
                posted = self._stored(intent) | posted
                look_at = time.monotonic() + _STORAGE_POLL_S
            ready = [(index, posted[str(index)]) for index in state.missing if str(index) in posted]
            for receipts in self._read_receipts(intent, ready):
                state, effects = protocol.advance(state, protocol.ReceiptsRead(receipts))
                if effects:
                    break
            if not effects:
                time.sleep(min(_SIGNAL_POLL_S, QUICK_POLL_S + (now - started) / 10))
        return state, effects

    def _stored(self, intent: Intent) -> dict[str, str]:
        """The processes whose receipts are in storage, as their signals would say. One listing, however many."""
        prefix = intent.id.prefix + keys.RECEIPTS
        try:
            names = [entry.key for entry in self._catalog.storage.list(prefix)]
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s cannot be listed yet: %s", prefix, error)
            return {}
        return {str(process): "" for name in names if (process := receipt_process(name)) is not None}

    def _read_receipts(self, intent: Intent, ready: list[tuple[int, str]]) -> Iterator[tuple[Receipt, ...]]:
        """What can be read, in batches, many at once: an object store takes as long for each as for all."""
        if not ready:
            return
        with ThreadPoolExecutor(min(RECEIPT_READS, len(ready)), thread_name_prefix="receipts") as pool:
            for first in range(0, len(ready), RECEIPT_BATCH):
                batch = ready[first : first + RECEIPT_BATCH]
                read = pool.map(lambda each: self._read_receipt(intent, *each), batch)
                yield tuple(receipt for receipt in read if receipt)

    def _read_receipt(self, intent: Intent, process: int, posted: str) -> Receipt | None:
        """A receipt from storage, or, for a process that could not write one, its NO from the signal."""
        try:
            if posted.startswith("{"):
                named = {"step": intent.step, "attempt": intent.attempt, "process": process}
                return decode(posted.encode(), Receipt, f"signal of process {process}", **named)
            created = self._mine if process == self._rendezvous.process else None
            found = self._catalog.receipt(intent.id, process, created)
            if found is None:
                return None
            self._files[found[1].path] = found[1]
            return found[0]
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("receipt of process %d cannot be read yet: %s", process, error)
            return None
        except Damaged as error:
            host = self._rendezvous.hosts.get(process, "?")
            failure = Failure(process=process, host=host, phase="receipt", cause=str(error))
            return Receipt(
                format=FORMAT,
                write_id="",
                step=intent.step,
                attempt=intent.attempt,
                process=process,
                host=host,
                failure=failure,
            )

    def _perform(
        self, effect: protocol.Effect, state: Attempt, user: UserData, pending: PendingWrite | None
    ) -> protocol.Event | None:
        intent = state.intent
        try:
            match effect:
                case Finalize():
                    try:
                        failpoints.hit("finalize.before")
                        self._head = overlap.begin(self._catalog.head)  # it takes as long as what comes next
                        self._entry = self._finalize(state, user, pending)
                    except Exception as error:  # whatever it was: the attempt is aborted with it as the cause
                        failure = Failure(
                            process=self._rendezvous.process,
                            host=self._rendezvous.hosts[self._rendezvous.process],
                            phase="finalize",
                            cause=f"{type(error).__name__}: {error}",
                        )
                        return protocol.FinalizeFailed(failure)
                    return protocol.FinalizeDone()
                case AppendCommit():
                    assert self._entry is not None
                    failpoints.hit("commit.before")
                    self._catalog.append(
                        partial(
                            journal.commit,
                            epoch=self.epoch,
                            entry=self._entry,
                            keep=self._keep,
                            quarantine_keep_s=self._quarantine_keep_s,
                        ),
                        self._head,
                    )
                    failpoints.hit("commit.after")
                    self.committed_bytes = self._entry.bytes
                    return protocol.Appended()
                case AppendAbort():
                    rule = partial(
                        journal.abort,
                        epoch=self.epoch,
                        attempt=intent.id,
                        failures=state.failures,
                        reason=state.reason,
                    )
                    failpoints.hit("abort.before")
                    self._catalog.append(rule)
                    failpoints.hit("abort.after")
                    return protocol.Appended()
        except RootChanged:  # there is no head to ask any more
            raise
        except Fenced:
            head = self._catalog.require_head()
            return protocol.FencedOff(head.epoch, head.writer)
        return None

    def _finalize(self, state: Attempt, user: UserData, pending: PendingWrite | None) -> LiveStep:
        """Write the tree of all chunks and the manifest. Returns the journal's line for the attempt."""
        assert pending is not None  # its process's receipt is in
        intent, receipts = state.intent, [state.receipts[index] for index in sorted(state.receipts)]
        self.stage_s = max(receipt.seconds.get("stage", 0.0) for receipt in receipts)
        prefix = intent.id.prefix
        tree = {prefix + keys.STATE + file.path: file for file in pending.merge(chunk_index.entries(receipts))}
        failpoints.hit("finalize.merged")
        # Receipts may have been read before the directory that names them was durable: with ours all of them are.
        ours = prefix + keys.receipt_name(self._rendezvous.process)
        known = {**tree, ours: self._files[keys.receipt_name(self._rendezvous.process)]}
        sealed = [
            replace(entry, path=entry.path.removeprefix(prefix))
            for entry in self._catalog.storage.make_durable(known, known)
        ]
        promised = [entry for receipt in receipts for entry in receipt.files]
        manifest = Manifest(
            format=FORMAT,
            write_id=self._catalog.stamp().write_id,
            step=intent.step,
            attempt=intent.attempt,
            process_count=intent.process_count,
            files=tuple(sorted((*promised, *sealed[:-1], *self._files.values()), key=lambda entry: entry.path)),
            hosts=tuple(receipt.host for receipt in receipts),
            seconds=tuple(receipt.seconds for receipt in receipts),
            chunks=chunk_index.checksums(receipts),
            fingerprints=fingerprints(intent, state.receipts),
            built_on=self._catalog.durable_version,
        )
        body = encode(manifest)
        failpoints.hit("manifest.before")
        self._create(intent, keys.MANIFEST, body)
        failpoints.hit("manifest.after")
        return LiveStep(
            step=intent.step,
            attempt=intent.attempt,
            manifest_crc32c=crc32c(body),
            tree=intent.tree.fingerprint(),
            bytes=manifest.total_bytes + len(body),
            stored_metrics=json_numbers.stored_all(user.metrics),
            time=user.timestamp,
        )

    def _create(self, intent: Intent, name: str, body: bytes) -> FileEntry:
        """A record of the attempt, at `name` in it, created once and durable."""
        key = intent.id.key(name)
        if isinstance(self._catalog.storage.create(key, body), Exists):
            raise OrchestratorError(f"{self._catalog.url}/{key}: another writer uses this attempt; it is never reused")
        return file_entry(name, body)

    def announce(self, prefix: str, phase: Phase, reason: str) -> None:
        """Tell the other processes how an attempt ended, so that they need not look in the journal."""
        self._rendezvous.post(prefix + "decision/0", json.dumps({"phase": phase.name, "reason": reason}))


def describe(state: Attempt) -> str:
    """Why an attempt did not commit, naming processes and causes; '' if it did."""
    if state.phase is Phase.COMMITTED:
        return ""
    causes = [f"process {f.process} ({f.host}) in {f.phase}: {f.cause}" for f in state.failures]
    return "; ".join([state.reason, *causes])
