"""Chunks that lie in several places: each is read from the first that gives it as it was saved."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import orchestrator as oc
from orchestrator import arrays
from orchestrator.errors import Damaged, StorageError, Suspect, Unavailable
from orchestrator.rules import chunk_index, keys
from orchestrator.rules.codec import RECORD_BYTES_MAX
from orchestrator.rules.records import FileEntry, LiveStep
from orchestrator.run.stored_step import StoredStep
from orchestrator.storage import Entry, PosixStorage
from orchestrator.storage.sources import Source, Sources
from tests.support.damage import flip
from tests.support.runs import now, store_of

STATE: dict[str, Any] = {
    "large": np.arange(3 << 20, dtype=np.float32).reshape(3, -1),
    "odd": np.arange(3 * 50_000, dtype=np.int16).reshape(3, -1),
    "small": np.arange(6, dtype=np.int16),
}


class Peer:
    """What another host serves, as this process reads it. fails: after so many reads it is gone."""

    def __init__(self, path: Path, fails_after: int = 10**9) -> None:
        self._files, self.url = PosixStorage(str(path)), f"http://host-b/{path.name}"
        self.reads, self.threads, self._fails_after = 0, set[str](), fails_after

    def get(self, key: str, most_bytes: int = RECORD_BYTES_MAX) -> bytes | None:
        return self._files.get(key, most_bytes)

    def list(self, prefix: str, start: str = "") -> Iterator[Entry]:
        return self._files.list(prefix, start)

    def measure(self, key: str, expected_bytes: int | None = None) -> FileEntry | None:
        return self._files.measure(key, expected_bytes)

    def read_into(self, key: str, offset: int, view: memoryview) -> int:
        self.reads += 1
        self.threads.add(threading.current_thread().name)
        if self.reads > self._fails_after:
            raise Unavailable(f"{self.url}: connection refused")
        body = self._files.get(key, 1 << 40)
        if body is None:
            raise StorageError(f"{self.url}/{key}: no such file")
        part = body[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)


@pytest.fixture(params=[False, True], ids=["plain", "compressed"])
def saved(root: Path, request: pytest.FixtureRequest) -> tuple[Path, LiveStep]:
    with oc.Agent(root, options=now(compression=request.param)) as agent:
        agent.save(1, STATE)
    live = store_of(root).find(1)
    assert live is not None
    return root, live


Dropped = list[tuple[str, str, str]]


def read_from(live: LiveStep, *sources: Source) -> tuple[dict[str, Any], Sources, Dropped]:
    """What comes back, and what was dropped meanwhile: source, file, reason."""
    dropped: Dropped = []

    def told(source: Source, key: str, reason: str) -> None:
        dropped.append((source.kind, key.removeprefix(live.id.prefix), reason))

    is_remote = any(source.is_remote for source in sources)
    placed = Sources("memory", lambda key: sources, dict, told, is_remote)
    step = StoredStep(placed, live, lambda live: None)
    leaves = step.intent.tree.leaves
    places = arrays.Places(placed, live.id.state_prefix, lambda path: step.file(keys.STATE + path))
    read: list[int] = []
    requests = [arrays.ReadRequest(leaf) for leaf in leaves]
    values = arrays.load(step.state_url, requests, read.append, chunk_index.stored(step.manifest), places=places)
    assert sum(placed.read_bytes(sum(read), live.id.state_prefix).values()) == sum(read)
    return {leaf.name: value for leaf, value in zip(leaves, values, strict=True)}, placed, dropped


def data_files(path: Path) -> list[Path]:
    return sorted((one for one in path.glob("steps/*/*/state/**/d/*")), key=lambda one: one.stat().st_size)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lock_away(path: Path) -> None:
    path.unlink()
    path.mkdir()


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("remote", [False, True], ids=["directory", "peer"])
@pytest.mark.parametrize("damage", [flip, shorten, blank, lock_away, Path.unlink])
def test_what_is_wrong_in_one_place_comes_from_the_next_and_is_named(
    damage: Callable[[Path], None], remote: bool, saved: tuple[Path, LiveStep], tmp_path: Path
) -> None:
    root, live = saved
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    spoilt = data_files(copy)[-1]
    damage(spoilt)
    first = Source("bad", Peer(copy), "host-b") if remote else Source("bad", PosixStorage(str(copy)))
    values, placed, dropped = read_from(live, first, Source("good", PosixStorage(str(root))))
    assert all(np.array_equal(values[name], STATE[name]) for name in STATE)
    (event,) = dropped
    assert event[:2] == ("bad", str(spoilt.relative_to(copy / live.id.prefix)))
    assert placed.read_bytes(0, "").get("good", 0) > 0
    with pytest.raises((Suspect, Damaged, StorageError)):
        read_from(live, first)  # as without any other place


def test_a_peer_that_vanishes_while_it_is_read_is_replaced(saved: tuple[Path, LiveStep]) -> None:
    root, live = saved
    peer = Peer(root, fails_after=3)
    values, placed, dropped = read_from(live, Source("peer", peer, "host-b"), Source("own", PosixStorage(str(root))))
    assert all(np.array_equal(values[name], STATE[name]) for name in STATE)
    assert dropped and {reason.rpartition(": ")[2] for *_, reason in dropped} == {"connection refused"}
    assert placed.read_bytes(0, "")["own"] > 0


def test_a_peer_is_read_on_the_read_threads_one_request_for_a_large_chunk(saved: tuple[Path, LiveStep]) -> None:
    root, live = saved
    peer = Peer(root)
    values, _, dropped = read_from(live, Source("peer", peer, "host-b"))
    assert not dropped and all(np.array_equal(values[name], STATE[name]) for name in STATE)
    step = store_of(root).step(live)
    chunks = sum(len(receipt.places) for receipt in step.receipts())
    assert peer.reads <= chunks and {name.split("_")[0] for name in peer.threads} == {"restore"}
