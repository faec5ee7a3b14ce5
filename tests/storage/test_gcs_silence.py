"""A store, or whoever gives tokens for it, that does not answer as hoped: each kind is an error that names who and why,
within its time, and is never taken for a run that is not there; whoever waits is told early."""

from __future__ import annotations

import os
import pty
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.command import STORE_DEADLINE_S, open_store
from orchestrator.errors import StorageError, Unavailable
from orchestrator.storage.gcs import GcsStorage
from orchestrator.storage.gcs_http import Client
from orchestrator.storage.port import Patience
from tests.support.endpoints import Endpoints

DEADLINE_S, NOTICE_S = 2.4, 0.2
SLOW_S = 15.0  # what a busy machine may add; without the bound it was minutes
LIST = b'{"items": []}'
FOUND_ABSENT = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
LATE = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoints]:
    made = Endpoints(tmp_path_factory.mktemp("endpoints"))
    yield made
    made.close()


@contextmanager
def answering(status: int, body: bytes, after_s: float = 0.0) -> Iterator[str]:
    """A server with one answer to everything."""

    class Store(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(after_s)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(5)


@contextmanager
def black_hole() -> Iterator[str]:
    """A port of which nobody hears anything: its queue is full, and further connections get no reply."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filling in (first, second):
            filling.setblocking(False)
            filling.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Exception]], list[str]]:
    """Has the resolver raise errors for one name, one after the other, the last for ever; then it is loopback's."""
    real = socket.getaddrinfo

    def install(name: str, errors: list[Exception]) -> list[str]:
        asked: list[str] = []

        def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
            if host != name:
                return real(host, *arguments, **named)
            asked.append(host)
            if len(asked) <= len(errors):
                raise errors[len(asked) - 1]
            return real("127.0.0.1", *arguments, **named)

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return asked

    return install


def listed(monkeypatch: pytest.MonkeyPatch, url: str | None) -> tuple[StorageError | None, float, list[str]]:
    """What a listing raises, in what time, and what was said meanwhile."""
    if url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
    notices: list[str] = []
    store = GcsStorage("gs://typo/run", Client(patience=Patience(DEADLINE_S, notices.append, NOTICE_S)))
    began = time.monotonic()
    try:
        assert list(store.list("journal/")) == []
        error = None
    except StorageError as raised:
        error = raised
    return error, time.monotonic() - began, notices


SILENT: dict[str, tuple[str, float, bool]] = {  # what the error says; in what time, at least, of the deadline; notice?
    "rejecting": (r"Cannot connect to host 127\.0\.0\.1:1 .*deadline", 0.0, True),
    "selfsigned": (r"127\.0\.0\.1:\d+: its certificate is not trusted: self.signed", 0.0, False),
    "silent": (r"no answer within 2\.\d s", 0.9, True),
    "hole": (r"127\.0\.0\.1:\d+: no connection within \d\.\d s", 0.4, True),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_store_that_cannot_be_talked_to_is_named_within_the_deadline(
    kind: str, endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, share, told = SILENT[kind]
    with black_hole() as hole:
        error, took_s, notices = listed(monkeypatch, {**endpoints.names, "hole": hole}[kind])
    assert isinstance(error, Unavailable) and re.search(said, str(error)), error
    assert share * DEADLINE_S <= took_s < DEADLINE_S + SLOW_S
    if told:
        (notice,) = notices
        assert re.match(
            r"no answer from 127\.0\.0\.1:\d+ yet.*list gs://typo/run/journal/; trying for \d s more", notice
        )


REJECTIONS = {
    (401, b'{"error": {"message": "Invalid Credentials"}}'): "credentials are not accepted",
    (403, b'{"error": {"message": "does not have storage.objects.list access"}}'): "lacks a role on the bucket",
    (404, b'{"error": {"message": "The specified bucket does not exist."}}'): "check the bucket's name",
}


@pytest.mark.parametrize("answer", REJECTIONS, ids=lambda answer: str(answer[0]))
def test_what_the_bucket_rejects_is_final_at_once(answer: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(*answer) as url:
        error, took_s, notices = listed(monkeypatch, url)
    assert error is not None and REJECTIONS[answer] in str(error) and took_s < SLOW_S
    assert notices == [] or took_s >= NOTICE_S  # a busy machine may be slow to answer


def test_slow_answers_are_answers_and_their_lateness_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, LIST, after_s=NOTICE_S * 3) as url:
        error, _, notices = listed(monkeypatch, url)
    assert error is None and len(notices) == 1


def test_a_name_that_does_not_exist_is_tried_a_few_times_only(
    resolver: Callable[[str, list[Exception]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolver("store.invalid", [FOUND_ABSENT] * 100)
    error, _, _ = listed(monkeypatch, "http://store.invalid:1")
    assert isinstance(error, Unavailable) and "store.invalid: the name does not exist" in str(error)
    assert 2 <= len(asked) <= 5


@pytest.mark.parametrize("early", [[LATE] * 3, [FOUND_ABSENT], [FOUND_ABSENT, LATE]], ids=["late", "absent", "both"])
def test_a_resolver_that_is_late_as_in_a_new_pod_is_waited_for(
    early: list[Exception], resolver: Callable[[str, list[Exception]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = resolver("store.invalid", early)
    with answering(200, LIST) as url:
        error, _, _ = listed(monkeypatch, f"http://store.invalid:{url.rpartition(':')[2]}")
    assert error is None and len(asked) == len(early) + 1


def test_a_resolver_that_stays_late_is_waited_for_to_the_deadline(
    resolver: Callable[[str, list[Exception]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver("store.invalid", [LATE] * 1000)
    error, took_s, notices = listed(monkeypatch, "http://store.invalid:1")
    assert isinstance(error, Unavailable) and "store.invalid: the name cannot be resolved yet" in str(error)
    assert took_s > DEADLINE_S / 4 and "cannot be resolved yet" in notices[0]


@pytest.mark.parametrize("machine", ["silent", "absent"])
def test_a_metadata_server_that_does_not_answer_is_named_and_waited_for_no_longer(
    machine: str,
    endpoints: Endpoints,
    resolver: Callable[[str, list[Exception]], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("STORAGE_EMULATOR_HOST", "NO_GCE_CHECK", "GOOGLE_APPLICATION_CREDENTIALS", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    if machine == "silent":
        host = endpoints.names["silent"].partition("://")[2]
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        # google-auth took the name when it was imported, and caches it.
        monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", host, raising=False)
    else:
        host = "metadata.google.internal"
        resolver(host, [FOUND_ABSENT] * 100)
        monkeypatch.setattr("orchestrator.storage.gcs_identity._PRODUCT", tmp_path / "of-nobody")
    error, took_s, notices = listed(monkeypatch, None)
    assert isinstance(error, Unavailable) and f"metadata server {host}" in str(error), error
    assert took_s < DEADLINE_S + SLOW_S and all("gives tokens for Cloud Storage" in notice for notice in notices)
    assert len(notices) == 1 or (machine == "absent" and took_s < DEADLINE_S)  # over before a notice was due, perhaps


def test_a_command_has_20_seconds_and_a_job_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCHESTRATOR_STORE_DEADLINE_S", raising=False)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")

    def deadline_s(store: Any) -> float:
        return float(store._client.deadline_s)

    assert deadline_s(open_store("gs://typo/run").storage) == STORE_DEADLINE_S == 20
    assert deadline_s(GcsStorage("gs://typo/run")) == 120
    monkeypatch.setenv("ORCHESTRATOR_STORE_DEADLINE_S", "7")
    assert deadline_s(open_store("gs://typo/run").storage) == deadline_s(GcsStorage("gs://typo/run")) == 7


def test_a_command_at_a_terminal_says_after_two_seconds_for_whom_it_waits(endpoints: Endpoints) -> None:
    controller, terminal = pty.openpty()
    url = endpoints.names["silent"]
    environ = {**os.environ, "STORAGE_EMULATOR_HOST": url, "ORCHESTRATOR_STORE_DEADLINE_S": "4"}
    command = [sys.executable, "-m", "orchestrator.cli", "ls", "gs://typo/run"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=terminal) as running:
        os.close(terminal)
        shown, until = "", time.monotonic() + 30
        try:
            while time.monotonic() < until and select.select([controller], [], [], until - time.monotonic())[0]:
                shown += os.read(controller, 4096).decode()
        except OSError:  # the terminal's last user has gone
            pass
        finally:
            running.kill()
            os.close(controller)
    first, last = re.sub(r"\n +", " ", shown.replace("\r", "").strip()).split("\n")  # as wide as the terminal
    host = url.partition("://")[2]
    assert (
        first.startswith(f"orchestrator: no answer from {host} yet: list gs://typo/run/") and "trying for 2 s" in first
    )
    assert last.startswith("orchestrator ls: list gs://typo/run/") and "no answer within 4.0 s" in last
