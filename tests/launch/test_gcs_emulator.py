"""The emulator itself: it must be as strict as the service, or what is tested on it is worth nothing.

Told three ways: by plain HTTP requests, by gcsfs and by TensorStore.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from typing import Any

import crc32c
import pytest
import tensorstore as ts
from gcsfs.core import GCSFileSystem
from hypothesis import given
from hypothesis import strategies as st

from launch.gcs_emulator.bucket import ApiError, Bucket, Preconditions
from launch.gcs_emulator.faults import Dice, Faults
from launch.gcs_emulator.process import EmulatorProcess, Server
from tests.support.gcs import BUCKET, REPO, faults

OBJECTS = f"/storage/v1/b/{BUCKET}/o"


@pytest.fixture
def folder() -> str:
    return uuid.uuid4().hex


def upload(gcs: EmulatorProcess, name: str, body: bytes, query: str = "") -> tuple[int, dict[str, Any]]:
    status, _, told = gcs.ask("POST", f"/upload{OBJECTS}?uploadType=media&name={name}{query}", body)
    return status, json.loads(told)


def test_preconditions_are_those_of_the_service(gcs: EmulatorProcess, folder: str) -> None:
    name = f"{folder}/x"
    path = f"{OBJECTS}/{folder}%2Fx"
    assert upload(gcs, name, b"1", "&ifGenerationMatch=7")[0] == 412
    status, made = upload(gcs, name, b"1", "&ifGenerationMatch=0")
    assert (status, made["size"], made["metageneration"]) == (200, "1", "1")
    assert upload(gcs, name, b"2", "&ifGenerationMatch=0")[0] == 412
    first = made["generation"]
    status, made = upload(gcs, name, b"22", f"&ifGenerationMatch={first}")
    assert status == 200 and int(made["generation"]) > int(first)
    assert gcs.ask("GET", f"{path}?alt=media&ifGenerationMatch={first}")[0] == 412
    assert gcs.ask("GET", f"{path}?alt=media&ifGenerationNotMatch={made['generation']}")[0] == 304
    assert gcs.ask("GET", f"{path}?alt=media&generation={first}")[0] == 404
    status, headers, body = gcs.ask("GET", f"{path}?alt=media")
    assert (status, body, headers["x-goog-generation"]) == (200, b"22", made["generation"])
    status, _, changed = gcs.ask("PATCH", f"{path}?ifMetagenerationMatch=1", b'{"metadata": {"a": "b"}}')
    assert status == 200 and json.loads(changed)["metageneration"] == "2"
    assert gcs.ask("PATCH", f"{path}?ifMetagenerationMatch=1", b"{}")[0] == 412
    assert gcs.ask("DELETE", f"{path}?ifGenerationMatch={first}")[0] == 412
    assert gcs.ask("DELETE", path)[0] == 204
    assert gcs.ask("DELETE", path)[0] == gcs.ask("GET", path)[0] == 404


def test_of_64_concurrent_conditional_creates_exactly_one_is_accepted(gcs: EmulatorProcess, folder: str) -> None:
    ready = threading.Barrier(64)

    def create(index: int) -> int:
        ready.wait(30)
        return upload(gcs, f"{folder}/one", b"%d" % index, "&ifGenerationMatch=0")[0]

    with ThreadPoolExecutor(64) as pool:
        statuses = sorted(pool.map(create, range(64)))
    assert statuses == [200] + [412] * 63


def test_ranges(gcs: EmulatorProcess, folder: str) -> None:
    upload(gcs, f"{folder}/r", bytes(range(10)))
    path = f"{OBJECTS}/{folder}%2Fr?alt=media"
    for wanted, status, body in [
        ("bytes=2-4", 206, bytes([2, 3, 4])),
        ("bytes=7-", 206, bytes([7, 8, 9])),
        ("bytes=-2", 206, bytes([8, 9])),
        ("bytes=5-99", 206, bytes([5, 6, 7, 8, 9])),
        ("bytes=10-", 416, b""),
    ]:
        got = gcs.ask("GET", path, Range=wanted)
        assert (got[0], got[2]) == (status, body), wanted
    assert gcs.ask("GET", path, Range="bytes=2-4")[1]["Content-Range"] == "bytes 2-4/10"


@pytest.mark.parametrize("last", [b"", b"\r", b"\n", b"\r\n"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_a_multipart_upload_is_checked_against_its_crc32c(
    gcs: EmulatorProcess, folder: str, end: str, last: bytes
) -> None:
    data = b"--b\r\n\n--not the end" + bytes(range(256)) + last
    good = "crc32c=" + _base64(crc32c.crc32c(data))

    def send(checksum: str, name: str) -> int:
        about = json.dumps({"name": f"{folder}/{name}", "crc32c": checksum.partition("=")[2]})
        head = f"--XX{end}Content-Type: application/json{end}{end}{about}{end}--XX{end}Content-Type: a/b{end}{end}"
        body = head.encode() + data + f"{end}--XX--".encode()
        kind = 'multipart/related; boundary="XX"'
        return gcs.ask("POST", f"/upload{OBJECTS}?uploadType=multipart", body, Content_Type=kind)[0]

    assert send("crc32c=AAAAAA==", "bad") == 400
    assert send(good, "good") == 200
    status, headers, body = gcs.ask("GET", f"{OBJECTS}/{folder}%2Fgood?alt=media")
    assert (status, body, headers["x-goog-hash"]) == (200, data, good)
    assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Fbad")[0] == 404


def _base64(checksum: int) -> str:
    import base64

    return base64.b64encode(checksum.to_bytes(4, "big")).decode()


def test_a_resumable_upload_goes_on_where_it_was_and_keeps_its_conditions(gcs: EmulatorProcess, folder: str) -> None:
    name = f"{folder}/big"
    start = f"/upload{OBJECTS}?uploadType=resumable&name={name}&ifGenerationMatch=0"
    status, headers, _ = gcs.ask("POST", start, b"{}")
    assert status == 200
    session = headers["Location"].removeprefix(gcs.url)
    assert gcs.ask("PUT", session, b"", Content_Range="bytes */*")[0] == 308
    status, headers, _ = gcs.ask("PUT", session, b"0123", Content_Range="bytes 0-3/10")
    assert (status, headers["Range"]) == (308, "bytes=0-3")
    assert gcs.ask("PUT", session, b"23456789", Content_Range="bytes 2-9/10")[0] == 200  # overlaps what is there
    assert gcs.ask("PUT", session, b"", Content_Range="bytes */10")[0] == 200  # the reply was lost: asked again
    assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Fbig?alt=media")[2] == b"0123456789"
    assert gcs.ask("POST", start, b"{}")[0] == 412
    late = gcs.ask("POST", f"/upload{OBJECTS}?uploadType=resumable&name={name}2&ifGenerationMatch=0", b"{}")[1]
    upload(gcs, name + "2", b"somebody was faster")
    assert gcs.ask("PUT", late["Location"].removeprefix(gcs.url), b"mine", Content_Range="bytes 0-3/4")[0] == 412


def test_listing_pages_prefixes_and_start(gcs: EmulatorProcess, folder: str) -> None:
    names = [f"{folder}/a/{index:02}" for index in range(7)] + [f"{folder}/b", f"{folder}/c/d/e"]
    for name in names:
        upload(gcs, name, b"x")

    def listed(query: str) -> tuple[list[str], list[str], int]:
        found, prefixes, token, pages = [], [], "", 0
        while True:
            more = f"&pageToken={token}" if token else ""
            page = json.loads(gcs.ask("GET", f"{OBJECTS}?prefix={folder}/{query}{more}")[2])
            found += [item["name"].removeprefix(folder + "/") for item in page.get("items", [])]
            prefixes += [name.removeprefix(folder + "/") for name in page.get("prefixes", [])]
            pages, token = pages + 1, page.get("nextPageToken", "")
            if not token:
                return found, prefixes, pages

    assert listed("") == ([name.removeprefix(folder + "/") for name in names], [], 1)
    assert listed("&maxResults=2")[2] == 5 and listed("&maxResults=2")[0] == listed("")[0]
    assert listed("&delimiter=/") == (["b"], ["a/", "c/"], 1)
    assert listed("&delimiter=/&maxResults=1") == (["b"], ["a/", "c/"], 3)
    assert listed(f"a/&startOffset={folder}/a/05")[0] == ["a/05", "a/06"]
    assert listed(f"a/&startOffset={folder}/a/02&endOffset={folder}/a/04&maxResults=1")[0] == ["a/02", "a/03"]


@given(
    names=st.sets(st.text(st.sampled_from("ab/é"), min_size=1, max_size=5), max_size=12),
    prefix=st.sampled_from(["", "a", "a/", "é"]),
    start=st.sampled_from(["", "a/b", "b"]),
    delimiter=st.sampled_from(["", "/"]),
    limit=st.integers(1, 5),
)
def test_pages_together_are_the_whole_listing(
    names: set[str], prefix: str, start: str, delimiter: str, limit: int
) -> None:
    bucket = Bucket("b", 1 << 20)
    for name in names:
        bucket.put(name, b"", Preconditions())
    expected_objects, expected_prefixes = [], []
    for name in sorted(name for name in names if name.startswith(prefix) and name >= start):
        rest = name[len(prefix) :]
        if not delimiter or delimiter not in rest:
            expected_objects.append(name)
        elif (folder := prefix + rest.partition(delimiter)[0] + delimiter) not in expected_prefixes:
            expected_prefixes.append(folder)
    objects: list[str] = []
    prefixes: list[str] = []
    token: str | None = None
    while True:
        page = bucket.list(prefix, start, "", delimiter, limit, token)
        assert len(page.objects) + len(page.prefixes) <= limit
        objects += [found.name for found in page.objects]
        prefixes += page.prefixes
        token = page.next_token
        if token is None:
            break
    assert (objects, prefixes) == (expected_objects, expected_prefixes)


def test_copies_and_moves(gcs: EmulatorProcess, folder: str) -> None:
    upload(gcs, f"{folder}/a", b"body")
    source, base = f"{OBJECTS}/{folder}%2Fa", f"/b/{BUCKET}/o/{folder}%2F"
    assert json.loads(gcs.ask("POST", f"{source}/rewriteTo{base}b")[2])["done"] is True
    assert gcs.ask("POST", f"{source}/copyTo{base}b?ifGenerationMatch=0")[0] == 412
    assert gcs.ask("POST", f"{source}/moveTo/o/{folder}%2Fc")[0] == 200
    assert gcs.ask("GET", source)[0] == 404
    assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Fc?alt=media")[2] == b"body"


def test_gcsfs_creates_reads_lists_and_deletes(gcs: EmulatorProcess, folder: str) -> None:
    files = GCSFileSystem(token="anon", project="p", use_listings_cache=False, skip_instance_cache=True)
    files.pipe_file(f"{BUCKET}/{folder}/x", b"one", mode="create")
    with pytest.raises(FileExistsError):
        files.pipe_file(f"{BUCKET}/{folder}/x", b"two", mode="create")
    big = os.urandom((6 << 20) + 3)  # two chunks of a resumable upload
    files.pipe_file(f"{BUCKET}/{folder}/big", big, mode="create", chunksize=5 << 20)
    with pytest.raises(FileExistsError):
        files.pipe_file(f"{BUCKET}/{folder}/big", big, mode="create", chunksize=5 << 20)
    with files.open(f"{BUCKET}/{folder}/written", "wb", block_size=1 << 18) as out:
        out.write(big[: 700 << 10])
    assert files.cat_file(f"{BUCKET}/{folder}/big") == big
    assert files.cat_file(f"{BUCKET}/{folder}/written", 10, 20) == big[10:20]
    assert sorted(files.find(f"{BUCKET}/{folder}")) == [f"{BUCKET}/{folder}/{name}" for name in ("big", "written", "x")]
    assert files.ls(f"{BUCKET}/{folder}", detail=True)[0]["size"] == len(big)
    files.cp_file(f"{BUCKET}/{folder}/x", f"{BUCKET}/{folder}/y")
    files.mv(f"{BUCKET}/{folder}/y", f"{BUCKET}/{folder}/z")
    assert files.cat_file(f"{BUCKET}/{folder}/z") == b"one"
    files.rm(f"{BUCKET}/{folder}", recursive=True)
    assert files.find(f"{BUCKET}/{folder}") == []


def test_a_batch_of_deletes_from_gcsfs_itself(gcs: EmulatorProcess, folder: str) -> None:
    import fsspec.asyn

    files = GCSFileSystem(token="anon", project="p", use_listings_cache=False, skip_instance_cache=True)
    for index in range(3):
        upload(gcs, f"{folder}/{index}", b"x")
    paths = [f"{BUCKET}/{folder}/{index}" for index in range(4)]  # the last is not there
    told = fsspec.asyn.sync(files.loop, files._rm_files, paths)
    assert told[:3] == paths[:3] and isinstance(told[3], OSError)
    assert files.find(f"{BUCKET}/{folder}") == []


def test_tensorstore_writes_on_condition_lists_and_reads_ranges(gcs: EmulatorProcess, folder: str) -> None:
    store: Any = ts.KvStore.open(f"gs://{BUCKET}/{folder}/").result()
    nothing = store.read("a/b").result().stamp.generation
    first = store.write("a/b", b"0123456789", if_equal=nothing).result()
    assert store.write("a/b", b"other", if_equal=nothing).result().generation == b""  # not written
    assert store.read("a/b").result().value == b"0123456789"
    again = store.write("a/b", b"0123456789!", if_equal=first.generation).result()
    assert again.generation not in (b"", first.generation)
    store.write("a/c", b"c").result()
    assert store.list().result() == [b"a/b", b"a/c"]
    store.delete_range(ts.KvStore.KeyRange("a/c", "a/d")).result()
    assert store.list().result() == [b"a/b"]


def test_ocdbt_takes_16_writers_of_one_database(gcs: EmulatorProcess, folder: str) -> None:
    """OCDBT rests on conditional writes of its manifest: an emulator that ignores them loses keys here."""

    def write(index: int) -> None:
        context = ts.Context()
        store: Any = ts.KvStore.open({"driver": "ocdbt", "base": f"gs://{BUCKET}/{folder}/"}, context=context).result()
        store.write(f"key {index:02}", b"x" * 100).result()

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(16)))
    store: Any = ts.KvStore.open({"driver": "ocdbt", "base": f"gs://{BUCKET}/{folder}/"}).result()
    assert store.list().result() == [b"key %02d" % index for index in range(16)]


def test_each_fault_does_what_it_says_and_is_counted(gcs: EmulatorProcess, folder: str) -> None:
    path = f"{OBJECTS}/{folder}%2Fx?alt=media"
    upload(gcs, f"{folder}/x", b"0123456789")
    gcs.counts(reset=True)
    with faults(gcs, too_many=1):
        assert gcs.ask("GET", path)[0] == 429
    with faults(gcs, unavailable=1):
        assert gcs.ask("GET", path)[0] == 503
    with faults(gcs, lost=1), pytest.raises(OSError):
        upload(gcs, f"{folder}/lost", b"landed")
    assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Flost?alt=media")[2] == b"landed"
    with faults(gcs, cut=1), pytest.raises(OSError):
        upload(gcs, f"{folder}/cut", b"never lands")
    assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Fcut")[0] == 404
    with faults(gcs, cut=1), pytest.raises(Exception, match="IncompleteRead"):
        gcs.ask("GET", path)
    with faults(gcs, down=True), pytest.raises(OSError):
        gcs.ask("GET", path)
    with faults(gcs, read_only=True):
        assert upload(gcs, f"{folder}/no", b"x")[0] == 403
        assert gcs.ask("GET", path)[2] == b"0123456789"
    assert gcs.counts()["faults"] == {"too_many": 1, "unavailable": 1, "lost": 1, "cut": 2, "down": 1}


def test_requests_are_counted_by_class_and_names_written_too_often_are_noticed(
    gcs: EmulatorProcess, folder: str
) -> None:
    gcs.counts(reset=True)
    upload(gcs, f"{folder}/x", b"1")
    upload(gcs, f"{folder}/x", b"2")
    gcs.ask("GET", f"{OBJECTS}?prefix={folder}")
    gcs.ask("GET", f"{OBJECTS}/{folder}%2Fx")
    gcs.ask("DELETE", f"{OBJECTS}/{folder}%2Fx")
    told = gcs.counts()
    assert told["operations"] == {"insert": 2, "list": 1, "get": 1, "delete": 1}
    assert told["classes"] == {"A": 3, "B": 1, "free": 1}
    assert told["rewritten_too_soon"] == 1


def test_a_bucket_has_a_limit() -> None:
    bucket = Bucket("b", 10)
    bucket.put("a", b"0123456789", Preconditions())
    with pytest.raises(ApiError, match="10 bytes at most"):
        bucket.put("b", b"1", Preconditions())
    bucket.put("a", b"", Preconditions())
    bucket.put("b", b"0123456789", Preconditions())


@pytest.mark.parametrize("text", ["nonsense=1", "lost=2", "lost=x", "down=1"])
def test_faults_that_make_no_sense_are_rejected_in_one_line(text: str) -> None:
    with pytest.raises(ValueError):
        Faults.parse(text)
    command = [sys.executable, "-m", "launch.gcs_emulator", "--port=0", f"--faults={text}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_same_seed_brings_the_same_faults() -> None:
    told = Faults.parse("lost=0.3,slow_s=0.5,seed=7")
    assert (told.lost, told.slow_s, told.seed) == (0.3, 0.5, 7)
    draws = [[dice.hit("lost") for _ in range(50)] for dice in (Dice(told), Dice(told))]
    assert draws[0] == draws[1] and 5 < sum(draws[0]) < 25


def test_a_command_runs_with_the_emulator_and_gives_its_exit_code() -> None:
    asks = "urllib.request.urlopen(os.environ['STORAGE_EMULATOR_HOST'] + '/storage/v1/b/demo')"
    child = f"import os, sys, urllib.request; {asks}; sys.exit(7)"
    command = [sys.executable, "-m", "launch.gcs_emulator", "--port=0", "--", sys.executable, "-c", child]
    assert subprocess.run(command, cwd=REPO, timeout=60, check=False).returncode == 7


def test_rules_answer_certain_requests_otherwise_and_no_others(gcs: EmulatorProcess, folder: str) -> None:
    name, path = f"{folder}/x", f"{OBJECTS}/{folder}%2Fx"
    upload(gcs, name, b"0123456789")
    upload(gcs, f"{folder}/y", b"y")
    checksum = "crc32c=" + base64.b64encode(crc32c.crc32c(b"0123456789").to_bytes(4, "big")).decode()

    def media(**rule: Any) -> tuple[int, dict[str, str], bytes]:
        gcs.set_rules(folder, {"name": f"^{name}$", **rule})
        return gcs.ask("GET", f"{path}?alt=media")

    try:
        assert media(kind="status", value=416)[0] == 416
        assert gcs.ask("GET", path)[0] == 416  # metadata, too
        assert gcs.ask("GET", f"{OBJECTS}/{folder}%2Fy?alt=media")[2] == b"y"
        assert media(kind="status", value=500, operations=["get"])[2] == b"0123456789"
        status, headers, body = media(kind="flip")
        assert (status, body, headers["x-goog-hash"]) == (200, b"012344" + b"6789", checksum)
        status, headers, body = media(kind="short", value=3)
        assert (status, headers["Content-Length"], body) == (200, "3", b"012")
        assert media(kind="range")[1]["Content-Range"] == "bytes 7-9/11"
        assert media(kind="type")[1]["Content-Type"].startswith("text/html")
        with pytest.raises(IncompleteRead) as caught:
            media(kind="cut", value=4)
        assert caught.value.partial == b"0123"
        started = time.monotonic()
        assert media(kind="slow", value=0.2)[2] == b"0123456789" and time.monotonic() - started >= 0.2
        started = time.monotonic()
        assert media(kind="trickle", value=0.02)[2] == b"0123456789" and time.monotonic() - started >= 0.15
        assert media(kind="status", value=503, skip=1, times=2)[0] == 200
        assert [gcs.ask("GET", f"{path}?alt=media")[0] for _ in range(3)] == [503, 503, 200]
        with socket.create_connection(tuple(gcs.url.removeprefix("http://").split(":"))) as client:  # type: ignore[arg-type]
            gcs.set_rules(folder, {"name": name, "kind": "hang"})
            client.settimeout(0.3)
            client.sendall(f"GET {path}?alt=media HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            with pytest.raises(TimeoutError):
                client.recv(1)
        before = gcs.hits(folder)
        assert before >= 10
    finally:
        gcs.set_rules(folder)
    assert gcs.ask("GET", f"{path}?alt=media")[2] == b"0123456789" and gcs.hits(folder) == before


@pytest.mark.parametrize("rule", [{"kind": "no"}, {"name": "("}, {"nome": "x"}, {"kind": "status"}])
def test_a_rule_that_is_none_is_rejected(gcs: EmulatorProcess, rule: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        gcs.set_rules("refused", {"name": "x", **rule})


def test_each_host_has_a_link_of_its_own_whose_bytes_take_their_time_and_are_counted() -> None:
    size = 4 << 20
    with EmulatorProcess([BUCKET], "--links=2") as store:
        first, second = store.links(bytes_per_s=8 * size, latency_s=0.05)
        hosts = [Server(link["url"]) for link in (first, second)]
        insert = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=big"
        took = {}
        for name, host, call in (
            ("a slow upload", hosts[0], ("POST", insert, bytes(size))),
            ("a slow download", hosts[1], ("GET", f"{OBJECTS}/big?alt=media")),
            ("a distance", hosts[1], ("GET", f"{OBJECTS}/big")),
            ("no link", store, ("GET", f"{OBJECTS}/big?alt=media")),
        ):
            started = time.monotonic()
            status, _, body = host.ask(*call)
            took[name] = time.monotonic() - started
            assert status == 200, (name, body)
        assert took["a slow upload"] >= 0.175 and took["a slow download"] >= 0.175 and took["a distance"] >= 0.05, took
        links = store.links()
        assert [link["received"] for link in links] == [{"big": size}, {}]
        assert [link["sent"] for link in links] == [{}, {"big": size}]
        assert [link["requests"] for link in links] == [{"insert": 1}, {"media": 1, "get": 1}]
        store.counts(reset=True)
        assert not any(link["requests"] or link["sent"] or link["received"] for link in store.links())
        with pytest.raises(ValueError, match="expected 0 or more"):
            store.links(bytes_per_s=-1.0)
