"""Making one whole of what all processes wrote, on process 0: the tree of all chunks, and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    records that it opened the attempt with. receipt: its receipt, if the store has acknowledged it. finalize: instead
    of the function of that name, from the receipts that are in and their files. persist: makes a call that may be made
    again, until it succeeds or there is no more use in it."""

    intent: Intent
    user: UserData
    pending: PendingWrite | None = None
    opened: tuple[FileEntry, ...] = ()
    receipt: bytes | None = None
    finalize: Callable[[Attempt, Mapping[str, FileEntry]], LiveStep] | None = None
    persist: Callable[[Callable[[], None]], None] = lambda call: call()


def finalize(store: JournalStore, own: OwnPart, state: Attempt, receipt_files: Mapping[str, FileEntry]) -> LiveStep:
    """Write the tree of all chunks and the manifest, durable. Returns the journal's line for the attempt. Call it once
    all receipts are in; `receipt_files` are theirs, by path in the attempt. Raises whatever goes wrong."""
    if own.finalize:
        return own.finalize(state, receipt_files)
    assert own.pending is not None  # its process's receipt is in
    receipts = [state.receipts[index] for index in sorted(state.receipts)]
    merged = own.pending.merge(chunk_index.entries(receipts))
    failpoints.hit("finalize.merged")
    known = {state.intent.id.prefix + keys.STATE + file.path: file for file in merged}
    tree = made_durable(store, state, known, receipt_files)
    manifest = manifest_of(store, state, (*tree, *own.opened, *receipt_files.values()))
    body = encode(manifest)
    store_manifest(store, state.intent, body)
    return line_of(state.intent, own.user, manifest, body)


def made_durable(
    store: JournalStore, state: Attempt, tree: Mapping[str, FileEntry], receipt_files: Mapping[str, FileEntry]
) -> Sequence[FileEntry]:
    """`tree`, by key, is in the store: make it durable. Returns it by path in the attempt."""
    prefix, own_receipt = state.intent.id.prefix, keys.receipt_name(0)
    # Receipts may have been read before the directory that names them was durable: with process 0's all of them are.
    known = {**tree, prefix + own_receipt: receipt_files[own_receipt]}
    durable = store.storage.make_durable(known, known)
    return [replace(entry, path=entry.path.removeprefix(prefix)) for entry in durable[:-1]]


def manifest_of(store: JournalStore, state: Attempt, more: Sequence[FileEntry]) -> Manifest:
    """The manifest, of what the receipts promise and of `more` files."""
    intent, receipts = state.intent, [state.receipts[index] for index in sorted(state.receipts)]
    files = (*(entry for receipt in receipts for entry in receipt.files), *more)
    built_on, built_on_id = store.built_on_entry
    return Manifest(
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
        built_on=built_on,
        built_on_id=built_on_id,
    )


def store_manifest(store: JournalStore, intent: Intent, body: bytes) -> None:
    failpoints.hit("manifest.before")
    create(store, intent, keys.MANIFEST, body)
    failpoints.hit("manifest.after")


def line_of(intent: Intent, user: UserData, manifest: Manifest, body: bytes) -> LiveStep:
    """What the journal says of the attempt. body: its manifest as it is stored."""
    return LiveStep(
        step=intent.step,
        attempt=intent.attempt,
        manifest_crc32c=crc32c(body),
        tree=intent.tree.fingerprint(),
        bytes=manifest.total_bytes + len(body),
        stored_metrics=json_numbers.stored_all(user.metrics),
        time=user.timestamp,
    )


def create(store: JournalStore, intent: Intent, name: str, body: bytes) -> FileEntry:
    """A record of the attempt, at `name` in it, created once and durable. Raises OrchestratorError if another writer
    uses this attempt's name."""
    key = intent.id.key(name)
    if isinstance(store.storage.create(key, body), Exists):
        raise OrchestratorError(f"{store.url}/{key}: another writer uses this attempt; it is never reused")
    return file_entry(name, body)
