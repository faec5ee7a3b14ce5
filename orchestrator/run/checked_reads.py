"""Reading what a run has stored, so that a wrong answer is never taken for damage, nor damage for a wrong answer.

What is wrong once is no proof: the network, a cache or this host's memory may give wrong bytes. It is `Damaged` if the
store's own account of the object is wrong as well, or if what it gave twice is what it has, and wrong. Else it is read
again, READS times in all, and `Unavailable` in the end. Functions may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import Damaged, Unavailable
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX, AnyRecord, decode
from orchestrator.rules.records import FileEntry, GroupReceipt, Head, Receipt, file_entry
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Reads, TooLarge, drop

READS = 3  # of one object, before what differs from read to read is given up

Early = Begun[bytes | None] | None  # a reading that was begun before somebody asked for it


def decoded(url: str, key: str, body: bytes | None, kind: type[AnyRecord], **expected: object) -> AnyRecord:
    """The record that `body`, read from `key` below `url`, is. `expected`: fields that its key tells. Raises Damaged
    if there is none (None), and as `codec.decode`."""
    where = f"{url}/{key}"
    if body is None:
        raise Damaged(f"{where}: is missing")
    return decode(body, kind, where, **expected)


def record(storage: Reads, key: str, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record at `key`, whatever the journal knows of it; None if it is not there. Raises Damaged, StorageError."""
    body = storage.get(key)
    return None if body is None else decoded(storage.url, key, body, kind)


def receipts(
    storage: Reads, attempt: AttemptId, name: str, created: bytes | None = None
) -> tuple[tuple[Receipt, ...], FileEntry] | None:
    """The receipts in the file `name` of an attempt, and it as one of its files; None if it is not written yet.
    `created`: what the store has just acknowledged under its name; it is not read again then. Raises Damaged,
    StorageError."""
    body = storage.get(attempt.key(name)) if created is None else created
    return None if body is None else (receipts_in(storage.url, attempt, name, body), file_entry(name, body))


def receipts_in(url: str, attempt: AttemptId, name: str, body: bytes) -> tuple[Receipt, ...]:
    """What `body`, the file `name` of an attempt, says: the receipt of one process, or those of a group. Raises
    Damaged."""
    key, expected = attempt.key(name), {"step": attempt.step, "attempt": attempt.name}
    if group := keys.group_of(name):
        leader, number = group
        return decoded(url, key, body, GroupReceipt, process=leader, number=number, **expected).receipts
    return (decoded(url, key, body, Receipt, process=keys.process_of(name), **expected),)


def journal_entry(storage: Reads, key: str, version: int) -> Head:
    """The journal entry `version`, which is at `key`. Raises Damaged if it is missing, edited or in the wrong place,
    Unavailable if by the store's own account it is another than was read."""
    for tries_left in reversed(range(READS)):
        body = storage.get(key)
        try:
            return decoded(storage.url, key, body, Head, version=version)
        except Damaged as error:
            read = None if body is None else file_entry(key, body)
            there = storage.measure(key)  # what a cache has kept of it is gone then
            if (read and (read.bytes, read.crc32c)) == (there and (there.bytes, there.crc32c)):
                raise
            if not tries_left:
                text = f"{error}; but by the store's own account the entry is another: it could not be read"
                raise Unavailable(text) from error
    raise AssertionError("unreachable")


def attempt_file(
    storage: Reads,
    attempt: AttemptId,
    name: str,
    problem: Callable[[FileEntry | None], str],
    check_live: Callable[[], None],
    most_bytes: int = RECORD_BYTES_MAX,
    early: Early = None,
) -> bytes:
    """A file of an attempt that `problem` finds nothing wrong with: '', or in words what is wrong with a file of that
    size and checksum, or with none. `early`: the first reading. `check_live` raises StepRetired where retention was
    quicker: what is deleted is not damaged.

    Raises Damaged, StepRetired, StorageError.
    """
    key = attempt.key(name)
    tries_left = READS
    while tries_left:
        expected_bytes = None
        try:
            body, early = early.result() if early else storage.get(key, most_bytes), None
            read = None if body is None else file_entry(name, body)
        except TooLarge as error:  # whatever is in it
            body, early, expected_bytes = None, None, most_bytes
            read = FileEntry(path=name, bytes=error.bytes, crc32c="")
        wrong = problem(read)
        if body is not None and not wrong:
            return body
        if drop(storage, key, wrong):
            continue
        tries_left -= 1
        again = storage.measure(key, expected_bytes)
        check_live()  # last: whatever retention deletes it has journalled before
        if reported := problem(again):
            raise Damaged(f"{storage.url}/{key}: {reported}", files=[name])
        if read and again and (read.bytes, read.crc32c) == (again.bytes, again.crc32c) and _same(storage, key, read):
            raise Damaged(f"{storage.url}/{key}: {wrong}", files=[name])
    raise Unavailable(
        f"{storage.url}/{key}: {wrong or 'was not there'} when read {READS} times, but the store's own account is "
        "right; the network, a cache or this host's memory gives wrong bytes"
    )


def _same(storage: Reads, key: str, read: FileEntry) -> bool:
    body = storage.get(key, max(read.bytes, RECORD_BYTES_MAX))
    return body is not None and file_entry(read.path, body) == read


def file_problem(expected: FileEntry, found: FileEntry | None) -> str:
    """What is wrong with a file, '' if it is as the manifest says."""
    if found is None:
        return f"is missing, the manifest says {expected.bytes} bytes"
    if (found.bytes, found.crc32c) != (expected.bytes, expected.crc32c):
        has = f"{found.bytes} bytes" + (f" with crc32c {found.crc32c}" if found.crc32c else "")
        return f"has {has}, the manifest says {expected.bytes} bytes with crc32c {expected.crc32c}"
    if found.crc32 and expected.crc32 and found.crc32 != expected.crc32:
        return f"is whole, but another file: crc32 {found.crc32}, the manifest says {expected.crc32}"
    return ""


def manifest_problem(crc32c: str, found: FileEntry | None) -> str:
    """What is wrong with a manifest whose checksum is `crc32c` in the journal, '' if it is that one."""
    if found is None:
        return "is missing"
    if found.crc32c == crc32c:
        return ""
    has = f"crc32c is {found.crc32c}" if found.crc32c else f"has {found.bytes} bytes, more than a manifest can have"
    return f"{has}, the journal says {crc32c}"
