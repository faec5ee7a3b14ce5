"""What is stored, as frozen typed records. `codec` makes bytes of them and back, `validate` says what may be in them.

Pure: no I/O, no clock; ids and times are passed in.
"""

from __future__ import annotations

import zlib
from enum import StrEnum
from typing import Annotated, Any

import crc32c as crc32c_library
import msgspec

from orchestrator.rules import json_numbers
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.kept import kept

FORMAT = 1
SMALL_FILE_BYTES = 4 << 20

STORED_KINDS = frozenset({"array", "key", "numpy", "numpy_scalar"})

Json = Any  # a value that JSON can hold; checked by the codec, not by the type checker


class Record(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Base of all stored records: immutable, keyword-only, unknown fields ignored. Nothing in them refers back to them,
    so the garbage collector need not look at the tens of thousands that a large state has."""


class _OfAttempt:
    """A record that belongs to one attempt, or that stands for it."""

    __slots__ = ()
    step: int
    attempt: str

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.step, self.attempt)


class Box(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A half-open region of an array's global index space: `start <= index < stop` per dimension."""

    start: tuple[int, ...]
    stop: tuple[int, ...]


def number_class(dtype: str) -> str:
    """`int`, `float`, `bool` or `complex`, of a dtype's name."""
    if dtype.startswith(("int", "uint")):
        return "int"
    return dtype if dtype == "bool" else "complex" if dtype.startswith("complex") else "float"


class ExternalArray(Record, frozen=True):
    """How another writer (Orbax, before the run was adopted) stored an array.

    item: its directory below `state/` ('': `state/` itself). driver: TensorStore's (`zarr` or `zarr3`). ocdbt: whether
    the item is an OCDBT store; else each array has a directory. name: the array's key prefix in it.
    """

    item: str
    driver: str
    ocdbt: bool
    name: str


class LeafSpec(Record, frozen=True, omit_defaults=True):
    """One leaf of the saved tree.

    kind: `array` (jax.Array), `key` (typed PRNG key array), `numpy`, `numpy_scalar`, or a value kept here:
    `int`, `float`, `complex`, `bool`, `str`, `bytes`, `none`, `empty`.
    shape, dtype: as the user sees them (for `key`: the shape of the key array, dtype `key<impl>`).
    stored_shape, stored_dtype: as the file holds them, where that differs. `value`: the text of a value kept here.
    chunk: shape of the stored chunks, each raw elements and their CRC-32C; None: as the array's own metadata says.
    external: where the array is, if it was not written by us.
    """

    path: tuple[str, ...]
    kind: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    stored_shape: tuple[int, ...] | None = None
    stored_dtype: str = ""
    sharding: str = ""
    value: str = ""
    chunk: tuple[int, ...] | None = None
    external: ExternalArray | None = msgspec.field(default=None, name="foreign")  # as it has been stored since format 1

    @property
    def name(self) -> str:
        """Orbax's name of the leaf, which is also its key prefix in the store."""
        return ".".join(self.path)

    @property
    def kind_stored(self) -> bool:
        """Whether it is an array of some kind, rather than a value kept here."""
        return self.kind in STORED_KINDS

    @property
    def number(self) -> str:
        """The class of number of a Python number or an array without dimensions (`int`, `float`, ...), '' of others.

        The two stand for each other: frameworks start with `step = 0` and make it an array in the first jitted step.
        """
        if self.kind in ("int", "float", "bool", "complex"):
            return self.kind
        return number_class(self.dtype) if self.kind_stored and self.kind != "key" and self.shape == () else ""

    @property
    def in_store(self) -> bool:
        """Whether Orbax's files hold the leaf; the others are wholly described here."""
        return self.kind in STORED_KINDS and 0 not in self.shape  # asked a dozen times for each leaf of a restore

    @property
    def file_shape(self) -> tuple[int, ...]:
        return self.shape if self.stored_shape is None else self.stored_shape

    @property
    def label(self) -> str:
        return "/".join(self.path) or "(root)"


class TreeSpec(Record, frozen=True):
    leaves: tuple[LeafSpec, ...]

    def fingerprint(self) -> str:
        """Identity of the tree for `OtherJob`: paths, kinds, shapes and dtypes, not values or shardings. Of what holds
        data: an empty container is None to Orbax."""
        return _fingerprint(self.leaves)


@kept
def _fingerprint(leaves: tuple[LeafSpec, ...]) -> str:
    shape_of = [
        (leaf.path, "number", (), leaf.number) if leaf.number else (leaf.path, leaf.kind, leaf.shape, leaf.dtype)
        for leaf in leaves
        if leaf.kind not in ("none", "empty")
    ]
    return crc32c(msgspec.json.encode(sorted(shape_of)))


class FileEntry(Record, frozen=True, omit_defaults=True):
    """One durable file: `path` relative to the attempt, size, CRC-32C in hex.

    crc32: the CRC-32 of IEEE 802.3, of files up to SMALL_FILE_BYTES where somebody had the bytes at hand. A file of an
    OCDBT store consists of parts that each end with their CRC-32C, and of all such files the CRC-32C is one number: it
    takes another polynomial to tell two of them apart. Larger ones hold chunks, whose own CRCs are in the manifest.
    """

    path: str
    bytes: int
    crc32c: str
    crc32: str = ""


class Held(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """So many leaves in a row, and the processes on whose devices they are: half-open ranges of their numbers. None:
    each process has its own, and process 0's is stored, in chunks of `chunk` (None: as an array of the host is cut)."""

    leaves: int
    by: tuple[tuple[int, int], ...] | None = None
    chunk: tuple[int, ...] | None = None


class Intent(Record, _OfAttempt, frozen=True):
    """held: who holds the leaves, as process 0 sees it, which counts for all; () in a job of one process."""

    format: int
    write_id: str
    step: int
    attempt: str
    epoch: int
    opened_by: str
    time: float
    process_count: int
    device_count: int
    mesh: dict[str, int]
    tree: TreeSpec
    built_on: int = -1  # version of the head that this attempt builds on; -1: written before there was this field
    held: tuple[Held, ...] = ()


class Cause(StrEnum):
    """What a save that did not commit is counted as. Set where that is decided, and the same on all processes."""

    REJECTED = "refused"  # a process voted to abort; as it has been counted since the first version
    SILENT = "silent"  # a process did not answer in time
    INCOMPLETE = "incomplete"  # the receipts do not cover an array exactly
    DISAGREE = "disagree"  # replicas, or hosts' own copies, differ
    FINALIZE = "finalize"  # the coordinator could not merge or write the manifest
    FENCED = "fenced"  # a newer incarnation has taken over
    HUNG = "hung"  # the save before still waits for the store, or this one has made way for a newer one
    MEMORY = "memory"  # a process cannot bring to the store what it has put into memory
    FAILED = "failed"  # anything else

    @classmethod
    def _missing_(cls, value: object) -> Cause:
        return cls.FAILED  # of a later version


class Failure(Record, frozen=True, omit_defaults=True):
    """Why a process voted to abort: the phase it was in, and what went wrong in one line. kind: what the attempt is
    counted as if it is aborted for this."""

    process: int
    host: str
    phase: str
    cause: str
    kind: Cause = Cause.REJECTED


class ShardFingerprint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The fingerprint of one shard as it is on these devices (JAX's ids), of one process: 32 hex digits."""

    box: Box
    print: str
    devices: tuple[int, ...]


class Place(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Where a chunk is: the number of its file among the receipt's, offset and bytes there, CRC-32C of its elements.
    The bounds are checked as it is decoded: a large job's receipts have a million."""

    file: Annotated[int, msgspec.Meta(ge=0)]
    offset: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    bytes: Annotated[int, msgspec.Meta(gt=4, le=2**63 - 1)]  # elements, and four bytes of CRC-32C
    crc32c: str


class Receipt(Record, _OfAttempt, frozen=True):
    """A process's promise about what it made durable, or its failure.

    places, small: key in the array store -> where each chunk of this process is, or the chunk itself (elements and
    CRC-32C) if it is too small to be worth a place in a file. went_by: CRC-32C of the intent's `held` that this process
    went by. own: four bytes for each leaf that every process has its own of (`holders.digest`), in order.
    """

    format: int
    write_id: str
    step: int
    attempt: str
    process: int
    host: str
    files: tuple[FileEntry, ...] = ()
    boxes: dict[str, tuple[Box, ...]] = {}  # leaf name -> regions this process wrote
    places: dict[str, Place] = {}
    small: dict[str, bytes] = {}
    prints: dict[
        str, tuple[ShardFingerprint, ...]
    ] = {}  # leaf name -> fingerprints of this process's shards, with `attest`
    seconds: dict[str, float] = {}  # stage, write, seal
    failure: Failure | None = None
    built_on: int = -1  # as in Intent
    went_by: str = ""
    own: bytes = b""


class GroupReceipt(Record, _OfAttempt, frozen=True):
    """Receipts of several processes as one object, none of them a failure. process: the group's leader, who stored it.
    number: how many it has stored in this attempt, with this one."""

    format: int
    write_id: str
    step: int
    attempt: str
    process: int
    number: int
    receipts: tuple[Receipt, ...]
    built_on: int = -1  # as in Intent


class Manifest(Record, _OfAttempt, frozen=True):
    """Every file of a committed attempt; its own CRC-32C is in the journal."""

    format: int
    write_id: str
    step: int
    attempt: str
    process_count: int
    files: tuple[FileEntry, ...]
    hosts: tuple[str, ...]
    seconds: tuple[dict[str, float], ...]  # per process, from the receipts
    # Key in the array store -> CRC-32C of each chunk's elements, in hex. A file's own CRC-32C cannot tell it from
    # another save's: it consists of parts that each end with their CRC-32C, and of all such files of one layout the
    # CRC-32C is the same.
    chunks: dict[str, str] = {}
    fingerprints: dict[str, str] = {}  # leaf name -> fingerprint of the whole array, with `attest`
    built_on: int = -1  # as in Intent
    built_on_id: str = ""  # `write_id` of that entry: another journal has an entry of that number, too; "": unknown

    @property
    def total_bytes(self) -> int:
        return sum(entry.bytes for entry in self.files)


class Extra(Record, frozen=True):
    """The user's JSON beside a step. `timestamp`: seconds since the epoch, coordinator's clock. The stored forms are
    those of `json_numbers`; `metrics` and `extra` are what the user gave."""

    format: int
    write_id: str
    step: int
    timestamp: float
    stored_metrics: dict[str, json_numbers.StoredNumber] = msgspec.field(name="metrics")
    stored_extra: dict[str, Json] = msgspec.field(name="extra")

    @property
    def metrics(self) -> dict[str, float]:
        return json_numbers.numbers(self.stored_metrics)

    @property
    def extra(self) -> dict[str, Json]:
        return {name: json_numbers.unpack(value) for name, value in self.stored_extra.items()}


class JournalEvent(Record, frozen=True, omit_defaults=True):
    """What an entry of the journal changed. cause: of an abort; None in entries that were written before there was this
    field."""

    kind: str
    step: int | None = None
    attempt: str | None = None
    reason: str = ""
    failures: tuple[Failure, ...] = ()
    steps: tuple[int, ...] = ()
    cause: Cause | None = None


class Quarantine(Record, frozen=True):
    """Why and when (seconds since 1970) an attempt was quarantined, and the trust that it had. by_hand: somebody's
    decision, which no reading of the data can disprove."""

    time: float
    reason: str = ""
    by_hand: bool = False
    trust: str = "committed"


class LiveStep(Record, _OfAttempt, frozen=True):
    """One committed attempt. `trust`: committed, verified, restored or quarantined. `bytes`: all its files.

    metrics: those that the journal carries. metrics_omitted: how many more there are, in the attempt's extra.json.
    metrics_absent: what retention looked for and is not among those either.
    quarantine: of a quarantined one; None in entries that were written before there was this field.
    """

    step: int
    attempt: str
    manifest_crc32c: str
    tree: str
    bytes: int
    stored_metrics: dict[str, json_numbers.StoredNumber] = msgspec.field(name="metrics")
    time: float
    trust: str = "committed"
    pins: tuple[str, ...] = ()
    metrics_omitted: int = 0
    metrics_absent: tuple[str, ...] = ()
    quarantine: Quarantine | None = None

    @property
    def metrics(self) -> dict[str, float]:
        return json_numbers.numbers(self.stored_metrics)

    @property
    def restorable(self) -> bool:
        return self.trust != "quarantined"


class RetiredAttempt(Record, _OfAttempt, frozen=True, omit_defaults=True):
    """An attempt that is no longer restorable, or never was, and whose data is not deleted yet. cause: of an aborted
    one, as in JournalEvent."""

    step: int
    attempt: str
    reason: str
    cause: Cause | None = None


class Head(Record, frozen=True):
    """One journal entry: the complete state of the run at `version`. `live` is in commit order, newest last, and has a
    step once. `aside`: quarantined attempts whose step was committed again; not restorable, but their data stays."""

    format: int
    version: int
    epoch: int
    writer: str
    write_id: str
    time: float
    event: JournalEvent
    live: tuple[LiveStep, ...] = ()
    retired: tuple[RetiredAttempt, ...] = ()
    aside: tuple[LiveStep, ...] = ()

    @property
    def quarantined(self) -> tuple[LiveStep, ...]:
        """Attempts that are kept as evidence, newest last: those whose step was committed again come first."""
        return (*self.aside, *(live for live in self.live if not live.restorable))


def crc32c(data: bytes) -> str:
    """CRC-32C of `data`, 8 hex digits."""
    return f"{crc32c_library.crc32c(data):08x}"


def file_entry(path: str, body: bytes) -> FileEntry:
    """A file as the manifest lists it, from its bytes."""
    return FileEntry(path=path, bytes=len(body), crc32c=crc32c(body), crc32=crc32(body))


def crc32(data: bytes) -> str:
    """CRC-32 (IEEE 802.3) of `data`, 8 hex digits; '' of more than SMALL_FILE_BYTES."""
    return f"{zlib.crc32(data):08x}" if len(data) <= SMALL_FILE_BYTES else ""
