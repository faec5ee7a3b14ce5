"""Objects that lie in several places: each is read from the first that gives what was written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.errors import StorageError, Unavailable
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry
from orchestrator.storage import Entry, MemoryStorage
from orchestrator.storage.port import Reads, drop
from orchestrator.storage.sources import Source, Sources


class Silent:
    """A source that does not answer; counts how often it was asked."""

    url = "http://host-b"

    def __init__(self, error: type[StorageError] = Unavailable) -> None:
        self.asked, self.error = 0, error

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        self.asked += 1
        raise self.error("host-b: no answer")

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        raise self.error("host-b: no answer")

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        self.get(key)
        return None


def store(**bodies: bytes) -> MemoryStorage:
    made = MemoryStorage()
    for name, body in bodies.items():
        made.create(name, body)
    return made


Dropped = list[tuple[str, str, str]]


def joined(*reads: Reads) -> tuple[Sources, Dropped]:
    dropped: Dropped = []
    sources = [Source(f"kind {number}", one, one.url.partition("http://")[2]) for number, one in enumerate(reads)]
    told = lambda source, key, reason: dropped.append((source.kind, key, reason))  # noqa: E731
    return Sources("memory://", lambda key: sources, lambda: {"a": 1, "b": 2}, told), dropped


@pytest.mark.parametrize(
    ("first", "reason"),
    [(store(), "is missing"), (Silent(), "host-b: no answer"), (Silent(StorageError), "host-b: no answer")],
    ids=["missing", "silent", "rejected"],
)
def test_what_one_source_does_not_give_the_next_gives_and_that_is_told_once(first: Reads, reason: str) -> None:
    sources, dropped = joined(first, store(a=b"right"))
    assert sources.get("a") == b"right" == sources.get("a")
    assert dropped == [("kind 0", "a", reason)]
    measured = sources.measure("a")
    assert measured is not None and measured.bytes == 5


def test_what_is_wrong_is_dropped_for_that_object_alone() -> None:
    sources, dropped = joined(store(a=b"wrong", b=b"right"), store(a=b"right", b=b"other"))
    assert sources.get("a") == b"wrong"
    assert drop(sources, "a", "crc32c differs")
    assert (sources.get("a"), sources.get("b")) == (b"right", b"right")
    assert dropped == [("kind 0", "a", "crc32c differs")]


def test_the_last_source_is_never_dropped_and_what_it_says_is_the_answer() -> None:
    sources, dropped = joined(store(), store(a=b"wrong"))
    assert sources.get("a") == b"wrong" and not drop(sources, "a", "crc32c differs")
    assert sources.get("a") == b"wrong" and sources.get("b") is None
    assert dropped == [("kind 0", "a", "is missing"), ("kind 0", "b", "is missing")]
    alone, _ = joined(Silent())
    with pytest.raises(Unavailable, match="host-b"):
        alone.get("a")
    assert not drop(store(a=b"x"), "a", "a store of one place has no other")


def test_a_source_that_does_not_answer_is_asked_last_from_then_on() -> None:
    silent = Silent()
    sources, dropped = joined(silent, store(a=b"a", b=b"b"))
    assert (sources.get("a"), sources.get("b")) == (b"a", b"b") and silent.asked == 1
    assert [key for _, key, _ in dropped] == ["a"]
    with pytest.raises(Unavailable):
        assert sources.drop_source("b", sources.current("b"), "gone too")
        sources.get("b")


def test_a_source_that_another_thread_has_dropped_is_dropped_once() -> None:
    sources, dropped = joined(store(a=b"wrong"), store(a=b"right"))
    first = sources.current("a")
    assert sources.drop_source("a", first, "crc32c differs") and sources.drop_source("a", first, "crc32c differs")
    assert sources.get("a") == b"right" and len(dropped) == 1


def test_a_listing_is_of_what_is_known_to_be_there() -> None:
    sources, _ = joined(store())
    assert [(entry.key, entry.bytes) for entry in sources.list("")] == [("a", 1), ("b", 2)]
    assert [entry.key for entry in sources.list("", "b")] == ["b"]


def test_bytes_are_counted_by_the_kind_of_their_source() -> None:
    sources, _ = joined(store(), store(a=b"tree"))
    for number, read_bytes in ((0, 3), (1, 4), (0, 5)):
        sources.count(sources._of("a")[number], read_bytes)
    assert sources.read_bytes(12, "") == {"kind 0": 8, "kind 1": 4}
    assert sources.get("a") == b"tree"
    assert sources.read_bytes(15, "") == {"kind 0": 8, "kind 1": 7}, "what was in objects that were read whole"


def test_who_reads_elsewhere_by_other_means_has_only_the_last_source_asked() -> None:
    sources, dropped = joined(store(a=b"copy"), store(a=b"store"))
    assert sources.get("a") == b"copy"
    sources.last_only()
    assert sources.get("a") == b"store" and not dropped
