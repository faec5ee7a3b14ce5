"""Several processes' tiers as one store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.keys import STEPS, journal_key
from orchestrator.rules.records import FileEntry
from orchestrator.storage import Created, Entry, Exists, MemoryStorage
from orchestrator.storage.joined import JoinedStorage

ATTEMPT = AttemptId.of(20, 3, 1)


def store(*names: str) -> MemoryStorage:
    made = MemoryStorage()
    for name in names:
        made.create(ATTEMPT.key(name), name.encode())
    return made


class Silent:
    """A source that does not answer."""

    url = "http://host-b"

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        raise Unavailable("host-b does not answer")

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        raise Unavailable("host-b does not answer")

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        raise Unavailable("host-b does not answer")


def test_an_attempts_files_are_found_wherever_they_are() -> None:
    joined = JoinedStorage(store("a", "b"), [store("b", "c"), store("d")])
    assert [entry.key for entry in joined.list(ATTEMPT.prefix)] == [ATTEMPT.key(name) for name in "abcd"]
    assert [entry.key for entry in joined.list(ATTEMPT.prefix, ATTEMPT.key("c"))] == [
        ATTEMPT.key("c"),
        ATTEMPT.key("d"),
    ]
    assert joined.get(ATTEMPT.key("d")) == b"d"
    measured = joined.measure(ATTEMPT.key("c"))
    assert measured is not None and measured.bytes == 1
    assert joined.get(ATTEMPT.key("e")) is None and joined.measure(ATTEMPT.key("e")) is None


def test_the_own_one_is_asked_first_and_alone_is_written_to() -> None:
    own, other = store(), store("a")
    own.create(ATTEMPT.key("a"), b"own")
    joined = JoinedStorage(own, [other])
    assert joined.get(ATTEMPT.key("a")) == b"own" and joined.url == own.url
    assert joined.create(ATTEMPT.key("b"), b"b") == Created()
    assert joined.create(ATTEMPT.key("b"), b"c") == Exists(b"b")
    assert other.get(ATTEMPT.key("b")) is None
    assert joined.delete(ATTEMPT.key("a")) and other.get(ATTEMPT.key("a")) == b"a"


def test_a_source_that_does_not_answer_is_passed_over_but_never_taken_for_a_missing_object() -> None:
    joined = JoinedStorage(store("a"), [Silent(), store("c")])
    assert joined.get(ATTEMPT.key("a")) == b"a" and joined.get(ATTEMPT.key("c")) == b"c"
    with pytest.raises(StorageError, match="host-b"):
        joined.get(ATTEMPT.key("e"))
    with pytest.raises(StorageError, match="host-b"):
        joined.list(ATTEMPT.prefix)


def test_logs_and_the_list_of_all_attempts_are_one_processs() -> None:
    own, other = store("a"), store("b")
    other.create(journal_key(4), b"theirs")
    joined = JoinedStorage(own, [other], log=other)
    assert joined.get(journal_key(4)) == b"theirs"
    assert [entry.key for entry in joined.list("journal/")] == [journal_key(4)]
    assert [entry.key for entry in joined.list(STEPS)] == [ATTEMPT.key("b")]
    assert JoinedStorage(own, [other]).get(journal_key(4)) is None
