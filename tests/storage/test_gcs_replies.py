"""What is made of the answers of Cloud Storage: tried again or not, how long it is waited, and what people read."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from launch.gcs_emulator.process import EmulatorProcess
from orchestrator import environment
from orchestrator.errors import StorageError, Unavailable, UsageError
from orchestrator.storage import Created, Exists, open_storage
from orchestrator.storage import gcs_replies as replies
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Budget, Client
from orchestrator.storage.gcs_replies import Reply
from tests.support.gcs import new_root


def body(message: str, *reasons: str, status: int = 403) -> bytes:
    errors = [{"reason": reason, "message": message, "domain": "global"} for reason in reasons]
    return json.dumps({"error": {"code": status, "message": message, "errors": errors}}).encode()


TRACEBACK = "Traceback (most recent call last):\n" + '  File "x.py", line 1, in f\n    f()\n' * 30 + "ValueError: no\n"
# status, body, what its line says
LINES: list[tuple[int, bytes, str]] = [
    (
        403,
        body("a@p does not have storage.objects.create access", "forbidden"),
        "roles/storage.objectCreator has storage",
    ),
    (403, body("a@p does not have storage.objects.delete access", "forbidden"), "roles/storage.objectUser has storage"),
    (403, body("a@p does not have storage.objects.list access", "forbidden"), "roles/storage.objectViewer has storage"),
    (
        403,
        body("Access denied.", "forbidden"),
        "lacks a role on the bucket, see docs/gcs.md: roles/storage.objectViewer",
    ),
    (403, body("Object 'x' is under active Temporary hold", "objectUnderActiveHold"), "under a hold"),
    (403, body("Object is subject to bucket's retention policy", "retentionPolicyNotMet"), "retention policy rejects"),
    (
        400,
        body("Bucket is a requester pays bucket but no user project provided.", "required"),
        "set ORCHESTRATOR_GCS_USER",
    ),
    (
        403,
        body("a@p does not have serviceusage.services.use access", "USER_PROJECT_DENIED"),
        "may not bill the project",
    ),
    (403, body("The billing account for the owning project is disabled", "accountDisabled"), "has no billing"),
    (403, body("Request had insufficient authentication scopes.", "insufficientPermissions"), "access scopes lack"),
    (403, body("Request is prohibited by organization's policy.", "vpcServiceControls"), "VPC Service Controls"),
    (403, body("Permission denied on Cloud KMS key.", "forbidden"), "the bucket's encryption key: is it enabled"),
    (401, body("Invalid Credentials", "authError"), "the credentials are not accepted (somebody)"),
    (404, body("The specified bucket does not exist.", "notFound"), "check the bucket's name"),
    (407, b"who are you", "the proxy on the way asks for a password"),
    (412, body("pre-conditions", "conditionNotMet"), "a condition that was not asked for"),
    (500, TRACEBACK.encode(), "HTTP 500 ValueError: no"),
    (500, body(TRACEBACK), "HTTP 500 ValueError: no"),
    (502, b"<html><head><title>Bad\nGateway</title></head>" + b"<p>x" * 9999, "HTTP 502 Bad Gateway"),
    (403, b"<Error><Code>AccessDenied</Code><Message>Access denied.</Message></Error>", "lacks a role"),
    (403, b'{"error": {"message": "a@p does not have storage.objects.get access to the Go', "objectViewer has storage"),
    (400, b'{"error": "invalid_grant", "error_description": "revoked"}', "HTTP 400 revoked"),
    (400, b"\xff\xfe" * 99999, "HTTP 400"),
    (400, b"", "HTTP 400"),
    (400, b"[1]", "HTTP 400 [1]"),
    (400, b'{"error": {"errors": 7}}', "HTTP 400"),
]


@pytest.mark.parametrize(("status", "text", "expected"), LINES)
def test_an_answer_is_one_short_line_that_says_what_to_do(status: int, text: bytes, expected: str) -> None:
    error = str(replies.rejection("get", "gs://b/x", Reply(status, {}, text), "somebody"))
    assert expected in error and "\n" not in error and len(error) < 700, error
    assert error.startswith(f"get gs://b/x: HTTP {status}")
    assert ("(somebody)" in error) == any(word in error for word in ("not accepted", "lack"))  # not of holds and quotas


@pytest.mark.parametrize(
    ("status", "text", "passes"),
    [
        (403, body("The user project has exceeded its rate limit.", "userRateLimitExceeded"), True),
        (403, body("slow down", "rateLimitExceeded"), True),
        (403, body("no", "forbidden"), False),
        (403, b"<html>", False),
        (401, b"", False),
        (400, b"", False),
        (412, b"", False),
        *((status, b"", True) for status in (408, 429, 500, 502, 503, 504)),
    ],
)
def test_only_what_may_pass_is_tried_again(status: int, text: bytes, passes: bool) -> None:
    assert replies.may_pass(Reply(status, {}, text)) is passes


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({}, 0.0),
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": " 7 "}, 7.0),
        ({"Retry-After": formatdate(NOW + 9, usegmt=True)}, 9.0),
        ({"Retry-After": formatdate(NOW - 9, usegmt=True)}, 0.0),
        # The server's clock is not ours.
        ({"Retry-After": formatdate(NOW + 5009, usegmt=True), "Date": formatdate(NOW + 5000, usegmt=True)}, 9.0),
        ({"Retry-After": "soon"}, 0.0),
        ({"Retry-After": "-3"}, 0.0),
        ({"Retry-After": "Fri, 99 Zzz 2026"}, 0.0),
    ],
)
def test_both_forms_of_retry_after_are_read(headers: dict[str, str], expected_s: float) -> None:
    assert replies.retry_after_s(headers, NOW) == expected_s


# Through the client, at the emulator.


def patient(deadline_s: float = 20.0) -> GcsStorage:
    return GcsStorage(new_root(), Client(deadline_s, Budget(1000), first_wait_s=0.01))


@contextmanager
def rules(gcs: EmulatorProcess, store: GcsStorage, **rule: Any) -> Iterator[str]:
    group = store.url.split("/")[3]
    gcs.set_rules(group, {"name": group, "kind": "status", **rule})
    try:
        yield group
    finally:
        gcs.set_rules(group)


def test_a_rate_limit_is_waited_out_and_a_create_that_met_one_is_no_unknown_outcome(gcs: EmulatorProcess) -> None:
    store = patient()
    with rules(gcs, store, value=403, reason="rateLimitExceeded", times=2, operations=["insert"]):
        assert store.create("a", b"1") == Created()
    assert store._client.retries == {"http 403 rateLimitExceeded": 2}
    spent = GcsStorage(new_root(), Client(30.0, Budget(2), first_wait_s=0.01))
    with (
        rules(gcs, spent, value=403, reason="rateLimitExceeded", operations=["insert"]),
        pytest.raises(Unavailable, match="budget is spent"),  # and not OutcomeUnknown: it was not carried out
    ):
        spent.create("a", b"1")


@pytest.mark.parametrize("told", ["1", "date"])
def test_a_store_that_asks_for_time_gets_it(gcs: EmulatorProcess, told: str) -> None:
    store = patient()
    store.create("a", b"1")
    started = time.monotonic()
    when = told if told != "date" else formatdate(time.time() + 2, usegmt=True)  # of whole seconds
    with rules(gcs, store, value=429, retry_after=when, times=1):
        assert store.get("a") == b"1"
    assert time.monotonic() - started >= 0.9


def test_a_store_that_asks_for_more_than_the_deadline_is_asked_once_more_before_it(gcs: EmulatorProcess) -> None:
    store = patient(2.0)
    store.create("a", b"1")
    with rules(gcs, store, value=503, retry_after="3600", times=1):
        assert store.get("a") == b"1"
    assert store._client.retries == {"http 503": 1}


@pytest.mark.parametrize("status", [400, 412])
def test_an_upload_that_arrived_damaged_is_sent_again_and_then_said_in_the_servers_words(
    gcs: EmulatorProcess, status: int
) -> None:
    said = "The crc32c does not match: expected YZE=, got AAA="
    store = patient()
    with rules(gcs, store, value=status, message=said, times=1, operations=["insert"]):
        assert store.create("a", b"1") == Created()
    with rules(gcs, store, value=status, message=said, operations=["insert"]), pytest.raises(StorageError) as caught:
        store.create("b", b"1")
    assert re.search(rf"create gs://.*/b: HTTP {status} {said}.*so 3 times: something on the way", str(caught.value))


def test_a_conflict_with_nothing_is_said_in_the_servers_words(gcs: EmulatorProcess) -> None:
    store = patient()
    with (
        rules(gcs, store, value=412, message="conditionNotMet: so it is", operations=["insert"]),
        pytest.raises(StorageError, match="HTTP 412 'conditionNotMet: so it is', though no such object is there, 3"),
    ):
        store.create("a", b"1")
    store.create("b", b"1")
    assert store.create("b", b"2") == Exists(b"1")


def test_a_batch_keeps_each_reason_and_tries_again_what_may_pass(gcs: EmulatorProcess) -> None:
    store = patient()
    for key in ("held", "kept", "limited", "plain"):
        store.create(key, b"1")
    group = store.url.split("/")[3]
    hold = "Object is under active Temporary hold and cannot be deleted"
    gcs.set_rules(
        group,
        {"name": f"{group}.*held", "value": 403, "message": hold, "operations": ["delete"]},
        {"name": f"{group}.*kept", "value": 403, "message": "retention policy", "operations": ["delete"]},
        {
            "name": f"{group}.*limited",
            "value": 403,
            "reason": "rateLimitExceeded",
            "times": 1,
            "operations": ["delete"],
        },
    )
    errors = dict(store.delete_many(["held", "kept", "limited", "plain", "gone"]))
    gcs.set_rules(group)
    assert [key for key, error in errors.items() if error is None] == ["limited", "plain", "gone"]
    assert f"{store.url}/held: HTTP 403 {hold}; the object is under a hold" in str(errors["held"])
    assert "the bucket's retention policy rejects" in str(errors["kept"])
    assert [entry.key for entry in store.list("")] == ["held", "kept"]


class NoBatches(BaseHTTPRequestHandler):
    """A server that has no batches, and takes a moment for each delete."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    busy = most = 0
    lock = threading.Lock()

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked.append(self.path)
        self._answer(404)

    def do_DELETE(self) -> None:
        kind = type(self)
        with self.lock:
            kind.busy += 1
            kind.most = max(kind.most, kind.busy)
        time.sleep(0.05)
        with self.lock:
            kind.busy -= 1
        self._answer(204)

    def log_message(self, *_: object) -> None:
        pass


def test_where_there_are_no_batches_several_objects_are_deleted_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    NoBatches.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), NoBatches) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        store = GcsStorage("gs://bucket/run", Client(30.0))
        keys = [f"a/{index:03}" for index in range(120)]
        assert list(store.delete_many(keys)) == [(key, None) for key in keys]
        server.shutdown()
    assert NoBatches.asked == ["/batch/storage/v1"]  # not asked again for the next hundred
    assert 2 <= NoBatches.most <= 16


def test_an_empty_object_may_come_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Google's own emulator tells of it."""

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            item = {"name": "run/empty", "crc32c": "AAAAAA=="}
            told = json.dumps(item if self.path.startswith("/storage/v1/b/bucket/o/") else {"items": [item]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        store = GcsStorage("gs://bucket/run", Client(30.0))
        assert [(entry.key, entry.bytes) for entry in store.list("")] == [("empty", 0)]
        assert [entry.bytes for entry in store.make_durable(["empty"])] == [0]
        server.shutdown()


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("GS://bucket/run", "expected 'gs://bucket/run'"),
        ("Gs://bucket/run", "expected 'gs://bucket/run'"),
        ("gcs://bucket/run", "expected 'gs://bucket/run'"),
        ("GCS://bucket/run", "expected 'gs://bucket/run'"),
        ("gs:/bucket/run", "expected 'gs://bucket/run'"),
        ("gs:bucket/run", "expected 'gs://bucket/run'"),
        ("FILE:///data/run", "expected 'file:///data/run'"),
        ("gs:///bucket/run", "the bucket's name is missing after gs://"),
        ("gs://Bucket/run", "small letters: gs://bucket/run"),
        ("gs://bucket", "a run has a prefix of its own, as gs://bucket/run7"),
        ("gs://bucket/", "a run has a prefix of its own, as gs://bucket/run7"),
        ("gs://b_/run", "'b_' can be no bucket's name"),
        ("s3://bucket/run", "no storage for s3://; expected a local path, file:// or gs://"),
        ("https://storage.googleapis.com/bucket/run", "no storage for https://"),
    ],
)
def test_a_root_that_is_nearly_one_is_answered_with_the_right_one(root: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(root)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [(environment.ANONYMOUS, "perhaps"), (environment.USER_PROJECT, "a project&x=1")]
)
def test_options_that_make_no_sense_are_usage_errors(
    gcs: EmulatorProcess, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=name):
        open_storage(new_root())


def test_a_token_is_waited_for_by_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials at all, on a machine that is not Google's: said at once, and to everybody."""
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    store = GcsStorage("gs://bucket/run", Client(30.0))

    def get(_: int) -> str:
        with pytest.raises(Unavailable) as caught:
            store.get("a")
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        for text in pool.map(get, range(8)):
            assert "no credentials: GOOGLE_APPLICATION_CREDENTIALS is not set" in text
            assert f"{environment.ANONYMOUS}=1 reads public buckets" in text
