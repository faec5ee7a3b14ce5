"""Making one whole of what all processes wrote, on process 0: the tree of all chunks, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from orchestrator import failpoints
from orchestrator.arrays import PendingWrite
from orchestrator.errors import OrchestratorError
from orchestrator.rules import chunk_index, json_numbers, keys
from orchestrator.rules.attempt import Attempt
from orchestrator.rules.codec import encode
from orchestrator.rules.fingerprints import fingerprints
from orchestrator.rules.records import FORMAT, FileEntry, Intent, Json, LiveStep, Manifest, crc32c, file_entry
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage.port import Exists


@dataclass(frozen=True)
class UserData:
    """What the user gave beside the state; `timestamp` in seconds since the epoch."""

    metrics: dict[str, float]
    extra: dict[str, Json]
    timestamp: float


@dataclass(frozen=True)
class OwnPart:
    """Process 0's own part in the attempt that it decides. pending: its write, None if it has failed. opened: the
    records that it opened the attempt with. receipt: its receipt, if the store has acknowledged it."""

    intent: Intent
    user: UserData
    pending: PendingWrite | None = None
    opened: tuple[FileEntry, ...] = ()
    receipt: bytes | None = None


def finalize(store: JournalStore, own: OwnPart, state: Attempt, receipt_files: Mapping[str, FileEntry]) -> LiveStep:
    """Write the tree of all chunks and the manifest, durable. Returns the journal's line for the attempt. Call it once
    all receipts are in; `receipt_files` are theirs, by path in the attempt. Raises whatever goes wrong."""
    assert own.pending is not None  # its process's receipt is in
    intent, receipts = state.intent, [state.receipts[index] for index in sorted(state.receipts)]
    prefix = intent.id.prefix
    tree = {prefix + keys.STATE + file.path: file for file in own.pending.merge(chunk_index.entries(receipts))}
    failpoints.hit("finalize.merged")
    # Receipts may have been read before the directory that names them was durable: with process 0's all of them are.
    own_receipt = keys.receipt_name(0)
    known = {**tree, prefix + own_receipt: receipt_files[own_receipt]}
    durable = [
        replace(entry, path=entry.path.removeprefix(prefix)) for entry in store.storage.make_durable(known, known)
    ]
    received = [entry for receipt in receipts for entry in receipt.files]
    files = (*received, *durable[:-1], *own.opened, *receipt_files.values())
    manifest = Manifest(
        format=FORMAT,
        write_id=store.stamp().write_id,
        step=intent.step,
        attempt=intent.attempt,
        process_count=intent.process_count,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        hosts=tuple(receipt.host for receipt in receipts),
        seconds=tuple(receipt.seconds for receipt in receipts),
        chunks=chunk_index.checksums(receipts),
        fingerprints=fingerprints(intent, state.receipts),
        built_on=store.durable_version,
    )
    body = encode(manifest)
    failpoints.hit("manifest.before")
    create(store, intent, keys.MANIFEST, body)
    failpoints.hit("manifest.after")
    return LiveStep(
        step=intent.step,
        attempt=intent.attempt,
        manifest_crc32c=crc32c(body),
        tree=intent.tree.fingerprint(),
        bytes=manifest.total_bytes + len(body),
        stored_metrics=json_numbers.stored_all(own.user.metrics),
        time=own.user.timestamp,
    )


def create(store: JournalStore, intent: Intent, name: str, body: bytes) -> FileEntry:
    """A record of the attempt, at `name` in it, created once and durable. Raises OrchestratorError if another writer
    uses this attempt's name."""
    key = intent.id.key(name)
    if isinstance(store.storage.create(key, body), Exists):
        raise OrchestratorError(f"{store.url}/{key}: another writer uses this attempt; it is never reused")
    return file_entry(name, body)
