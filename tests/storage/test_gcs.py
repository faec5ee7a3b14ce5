"""What only the Cloud Storage adapter promises, on the emulator: lost replies, retries, deadlines, and a bucket's ways.

The conformance suite is in test_storage.py.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from launch.gcs_emulator.process import EmulatorProcess
from orchestrator.errors import OutcomeUnknown, StorageError, Unavailable, UsageError
from orchestrator.observe.events import Event, Retried, subscribe
from orchestrator.rules.records import FileEntry, crc32c
from orchestrator.storage import Created, Exists, open_storage
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Budget, Client
from tests.support.gcs import ALL_FAULTS, BUCKET, faults, new_root


@pytest.fixture
def store(gcs: EmulatorProcess) -> GcsStorage:
    return GcsStorage(new_root())


def patient(gcs: EmulatorProcess, deadline_s: float = 60.0, retries: float = 10_000) -> GcsStorage:
    return GcsStorage(new_root(), Client(deadline_s, Budget(retries), first_wait_s=0.05))


def creates_once(store: GcsStorage, key: str) -> None:
    """Of 64 who create it at once one wins, and all know it."""
    outcomes = create_at_once([store] * 64, key)
    winners = [index for index, outcome in enumerate(outcomes) if outcome == Created()]
    assert len(winners) == 1
    there = store.get(key)
    assert there == body_of(winners[0])
    assert outcomes.count(Exists(there)) == 63


def create_at_once(stores: list[GcsStorage], key: str) -> list[Created | Exists | StorageError]:
    ready = threading.Barrier(len(stores))

    def write(index: int) -> Created | Exists | StorageError:
        ready.wait(30)
        try:
            return stores[index].create(key, body_of(index))
        except StorageError as error:
            return error

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(write, range(len(stores))))


def body_of(index: int) -> bytes:
    return json.dumps({"write_id": f"{index:032x}"}).encode() * 20


def test_of_64_concurrent_creators_exactly_one_wins_and_all_know_it(store: GcsStorage) -> None:
    for key in ("journal/a", "journal/b", "journal/c"):
        creates_once(store, key)


def test_with_30_percent_of_replies_lost_exactly_one_of_64_wins_and_nobody_is_told_a_lie(gcs: EmulatorProcess) -> None:
    store = patient(gcs)
    gcs.counts(reset=True)
    with faults(gcs, lost=0.3, seed=4):
        for key in ("journal/a", "journal/b", "journal/c"):
            creates_once(store, key)
    assert gcs.counts()["faults"]["lost"] > 40
    assert store._client.retries["connection"] == gcs.counts()["faults"]["lost"]


def test_a_create_whose_every_reply_is_lost_is_read_back_or_called_unknown(gcs: EmulatorProcess) -> None:
    store = patient(gcs, deadline_s=0.5)
    with faults(gcs, lost=1), pytest.raises(OutcomeUnknown, match=r"create gs://.*/journal/0"):
        store.create("journal/0", b"ours")
    well = GcsStorage(store.url)  # with patience: one that takes the store to be down has a sixteenth of a second
    assert well.get("journal/0") == b"ours"  # and so the word "unknown" was the right one
    assert well.create("journal/0", b"ours") == Created()
    assert well.create("journal/0", b"theirs") == Exists(b"ours")


def test_what_was_rejected_for_sure_is_an_error_and_not_an_unknown_outcome(gcs: EmulatorProcess) -> None:
    store = patient(gcs, deadline_s=2)
    with faults(gcs, too_many=1), pytest.raises(StorageError, match=r"HTTP 429.*gave up after") as caught:
        store.create("journal/0", b"ours")
    # The deadline may have cut the last try short, on its way.
    assert not isinstance(caught.value, OutcomeUnknown) or "cannot be read back" in str(caught.value)


def test_an_error_at_the_deadline_gives_the_stores_answer_not_the_cut_of_the_last_try() -> None:
    """A store that rejects at once, and then is as slow as the deadline."""

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if asked.pop():
                self.send_error(503, "come back later")
            else:
                time.sleep(1.5)

        def log_message(self, *_: object) -> None:
            pass

    asked = [False, True]
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
            store = GcsStorage("gs://bucket/run", Client(1.0, Budget(10), first_wait_s=0.01))
            said = r"HTTP 503 .*gave up after 2 tries in [0-9.]+ s \(deadline of 1 s\)"
            with pytest.raises(StorageError, match=said):
                store.get("a")
        server.shutdown()


@pytest.mark.parametrize("reply", ["without a length", "packed"])
def test_a_body_of_unknown_length_is_read_no_further_than_anybody_expects(reply: str) -> None:
    """A gigabyte, in each."""

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if reply == "packed":
                body = gzip.compress(bytes(1 << 30), 1)
                self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # nobody reads it any more
                if reply == "packed":
                    self.wfile.write(body)
                else:
                    for _ in range(1 << 10):
                        self.wfile.write(bytes(1 << 20))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
            store = GcsStorage("gs://bucket/run", Client(30.0))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with pytest.raises(Unavailable, match="bytes, at most 8000000 were expected"):
                store.get("a", 8_000_000)
            assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 300 << 10
        server.shutdown()


def test_every_operation_rides_out_five_percent_of_each_fault_and_counts_its_retries(gcs: EmulatorProcess) -> None:
    store = patient(gcs)
    told: list[Event] = []
    unsubscribe = subscribe(told.append)
    gcs.counts(reset=True)
    bodies = {f"a/{index:03}": os.urandom(2000) for index in range(150)}
    try:
        with faults(gcs, **ALL_FAULTS, slow_s=0.05, seed=11), ThreadPoolExecutor(16) as pool:
            assert set(pool.map(lambda item: store.create(*item), bodies.items())) == {Created()}
            assert dict(zip(bodies, pool.map(store.get, bodies), strict=True)) == bodies
            assert [entry.key for entry in store.list("a/")] == list(bodies)
            sealed = store.make_durable(bodies)
            assert sealed == tuple(FileEntry(path=k, bytes=2000, crc32c=crc32c(b)) for k, b in bodies.items())
            assert set(pool.map(store.delete, list(bodies)[:100])) == {True}
            assert [error for _, error in store.delete_many(list(bodies)[100:])] == [None] * 50
    finally:
        unsubscribe()
    assert list(store.list("")) == []
    met = gcs.counts()["faults"]
    assert min(met.values()) > 5 and set(met) == set(ALL_FAULTS)
    retried = Counter(event.reason for event in told if isinstance(event, Retried))
    assert retried == store._client.retries
    assert retried["http 429"] + retried["http 503"] >= 20 and retried["connection"] >= 10


def test_a_store_that_is_down_is_an_error_within_the_deadline_until_it_is_back(
    gcs: EmulatorProcess,
) -> None:
    store = patient(gcs, deadline_s=1.0)
    store.create("a", b"1")
    with faults(gcs, down=True):
        for call in (lambda: store.get("a"), lambda: list(store.list("")), lambda: store.delete("a")):
            started = time.monotonic()
            with pytest.raises(StorageError, match=r"gs://.*gave up after \d+ tries"):
                call()
            assert time.monotonic() - started < 2.5
    assert store.get("a") == b"1"


def test_an_outage_is_waited_for_once_and_after_that_only_a_part_of_the_deadline(gcs: EmulatorProcess) -> None:
    store = patient(gcs, deadline_s=4.0)
    store.create("a", b"1")

    def seconds(call: Callable[[], object]) -> float:
        started = time.monotonic()
        with pytest.raises(StorageError):
            call()
        return time.monotonic() - started

    with faults(gcs, down=True):
        assert seconds(lambda: store.get("a")) > 1.0
        assert seconds(lambda: store.create("b", b"2")) < 2.0  # and that is a create and reading it back
        assert seconds(lambda: list(store.list(""))) < 1.0
    assert store.get("a") == b"1"
    with faults(gcs, down=True):
        assert seconds(lambda: store.get("a")) > 1.0  # it has answered in between


def test_when_the_retry_budget_is_spent_callers_fail_at_once_and_answers_earn_it_back(gcs: EmulatorProcess) -> None:
    store = patient(gcs, deadline_s=30, retries=6)
    store.create("a", b"1")
    gcs.counts(reset=True)
    with faults(gcs, unavailable=1):
        for _ in range(20):
            with pytest.raises(StorageError, match="budget is spent"):
                store.get("a")
    assert gcs.counts()["faults"]["unavailable"] == 26  # 20 calls, and no more than the six retries of the budget
    for _ in range(6):
        assert store.get("a") == b"1"
    with faults(gcs, unavailable=0.4, seed=3):
        assert store.get("a") == b"1"


def test_a_reader_may_read_and_is_told_which_right_it_lacks(gcs: EmulatorProcess, store: GcsStorage) -> None:
    store.create("a", b"1")
    with faults(gcs, read_only=True):
        assert (store.get("a"), len(list(store.list(""))), store.make_durable(["a"])[0].bytes) == (b"1", 1, 1)
        for call in (lambda: store.create("b", b"2"), lambda: store.delete("a")):
            with pytest.raises(StorageError, match=r"HTTP 403 .*lacks a role on the bucket, see docs/gcs.md"):
                call()
        assert [str(error)[:9] for _, error in store.delete_many(["a"])] == ["delete gs"]
    assert store.get("a") == b"1"


def test_a_bucket_that_is_not_there_is_not_an_empty_run(gcs: EmulatorProcess) -> None:
    store = open_storage("gs://no-such-bucket/run")
    for call in (lambda: store.get("a"), lambda: list(store.list("")), lambda: store.delete("a")):
        with pytest.raises(StorageError, match=r"bucket does not exist.*check the bucket's name"):
            call()
    with pytest.raises(StorageError, match="bucket does not exist"):
        store.create("a", b"1")


@pytest.mark.parametrize(
    "url",
    ["gs://", "gs://bucket", "gs://bucket/", "gs://UPPER/run", "gs://b/run", "gs://bucket/../x", "gs://bucket//x"],
)
def test_a_url_that_is_no_prefix_in_a_bucket_is_rejected(url: str) -> None:
    with pytest.raises(UsageError, match="gs://"):
        open_storage(url)


def test_only_keys_below_the_prefix_are_seen_and_touched(gcs: EmulatorProcess) -> None:
    root = new_root()
    store, sibling = GcsStorage(root), GcsStorage(root + "-other")
    sibling.create("journal/0", b"not mine")
    store.create("journal/0", b"mine")
    parent = root.rpartition("/")[0].removeprefix(f"gs://{BUCKET}/")
    strange = ["steps/", "steps/../../../x", "journal//0", "./a"]  # a console's folder marker; and somebody hostile
    for name in strange:
        gcs.ask("POST", f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={parent}/run/{name}", b"x")
    assert [entry.key for entry in store.list("")] == ["journal/0"]
    assert GcsStorage(root + "/").url == root
    for entry in list(store.list("")):
        store.delete(entry.key)
    everything = json.loads(gcs.ask("GET", f"/storage/v1/b/{BUCKET}/o?prefix={parent}/")[2])["items"]
    left = {item["name"].removeprefix(parent + "/") for item in everything}
    assert left == {"run-other/journal/0", *(f"run/{name}" for name in strange)}


def test_listing_goes_through_all_pages_and_starts_where_it_is_told(gcs: EmulatorProcess, store: GcsStorage) -> None:
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda index: store.create(f"journal/{index:05}", b"x"), range(1050)))
    gcs.counts(reset=True)
    assert [entry.key for entry in store.list("journal/")] == [f"journal/{index:05}" for index in range(1050)]
    assert gcs.counts(reset=True)["operations"] == {"list": 2}
    assert len(list(store.list("journal/", "journal/01040"))) == 10
    assert next(store.list("journal/")).key == "journal/00000"
    assert gcs.counts()["operations"] == {"list": 2}


def test_many_objects_are_deleted_a_hundred_to_a_request(gcs: EmulatorProcess, store: GcsStorage) -> None:
    keys = [f"a/{index:03}" for index in range(250)]
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(lambda key: store.create(key, b"x"), keys))
    gcs.counts(reset=True)
    with faults(gcs, too_many=0.1, seed=5):  # also of single calls inside a batch
        assert list(store.delete_many([*keys, "a/gone"])) == [(key, None) for key in [*keys, "a/gone"]]
    assert gcs.counts()["operations"]["batch"] == 3
    assert gcs.counts()["faults"]["too_many"] > 5
    assert list(store.list("")) == []


def test_sealing_downloads_nothing(gcs: EmulatorProcess, store: GcsStorage) -> None:
    body = os.urandom(3 << 20)
    store.create("s/big", body)
    store.create("s/small", b"123456789")
    gcs.counts(reset=True)
    assert store.make_durable(["s/small", "s/big"]) == (
        FileEntry(path="s/small", bytes=9, crc32c="e3069283"),
        FileEntry(path="s/big", bytes=len(body), crc32c=crc32c(body)),
    )
    assert gcs.counts()["operations"] == {"get": 2}


def test_a_file_that_is_not_what_its_writer_counted_is_not_sealed(store: GcsStorage) -> None:
    store.create("s/a", b"123456789")
    good = FileEntry(path="s/a", bytes=9, crc32c="e3069283")
    assert store.make_durable(["s/a"], {"s/a": good}) == (good,)
    for wrong in (FileEntry(path="s/a", bytes=8, crc32c="e3069283"), FileEntry(path="s/a", bytes=9, crc32c="00000000")):
        with pytest.raises(StorageError, match=r"s/a: the store has 9 bytes with crc32c e3069283"):
            store.make_durable(["s/a"], {"s/a": wrong})


def test_an_upload_that_is_damaged_on_its_way_is_rejected_by_the_store(gcs: EmulatorProcess, store: GcsStorage) -> None:
    """The checksum goes with the body, so that the service compares it with what arrived."""

    class Damaging(Client):
        def send(self, *args: object, **named: object) -> object:  # type: ignore[override]
            body = named.get("body")
            if isinstance(body, bytes):
                named["body"] = body.replace(b"precious", b"preciouS")
            return super().send(*args, **named)  # type: ignore[arg-type]

    damaging = GcsStorage(store.url, Damaging())
    with pytest.raises(StorageError, match=r"HTTP 400 .*CRC32C"):
        damaging.create("a", b"precious data")
    assert store.get("a") is None


def test_a_process_that_used_the_store_ends_quietly(gcs: EmulatorProcess) -> None:
    code = f"from orchestrator.storage import open_storage; print(open_storage({new_root()!r}).create('a', b'1'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("Created()\n", "", 0)


def test_a_deadline_that_is_no_number_is_a_usage_error(gcs: EmulatorProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STORE_DEADLINE_S", "soon")
    with pytest.raises(UsageError, match="ORCHESTRATOR_STORE_DEADLINE_S='soon'"):
        open_storage(new_root())
