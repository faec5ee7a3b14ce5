"""The life of a token for Cloud Storage, and what a process makes of credentials that are late, revoked or of no use.

The situations are played by `credentials_child`, in a process of its own beside the session's emulator.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec import config
from google.oauth2 import credentials as user

from orchestrator import environment
from orchestrator.observe.events import Event, Retried, subscribe
from orchestrator.storage import gcs_identity
from orchestrator.storage.gcs_credentials import Credentials, Identity, NoToken, Token
from tests.support.gcs import REPO, emulator

BUCKET = "guarded-bucket"
MACHINE = "the machine's service account, metadata server"


class Source:
    """An identity whose renewals are `answers`, one after the other; the last one for ever. A float: a token that is
    valid for so long."""

    def __init__(self, *answers: float | NoToken) -> None:
        self.answers, self.asked, self.now = list(answers), 0, 1000.0
        self.gate = threading.Event()
        self.gate.set()

    def renew(self) -> Token:
        assert self.gate.wait(30)
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        if isinstance(answer, NoToken):
            raise answer
        return Token({"Authorization": f"Bearer {self.asked}"}, self.now + answer)

    def credentials(self, again_s: float = 0.0) -> Credentials:
        identity = Identity(lambda: "somebody", self.renew, "do something")
        return Credentials(lambda: identity, lambda: self.now, first_wait_s=0.01, again_s=again_s)


PASSING, FINAL = NoToken("503", passing=True), NoToken("revoked", passing=False)


def eventually(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_token_is_asked_for_once_however_many_wait_and_used_while_it_is_valid() -> None:
    source = Source(3600.0)
    held = source.credentials()
    source.gate.clear()
    with ThreadPoolExecutor(16) as pool:
        waiting = [pool.submit(held.wait, 30.0) for _ in range(16)]
        source.gate.set()
        tokens = {id(one.result(30)) for one in waiting}
    assert len(tokens) == 1 and source.asked == 1
    source.now += 3500
    assert held.wait(1.0).headers == {"Authorization": "Bearer 1"}


def test_a_token_near_its_end_is_renewed_beside_those_who_use_it() -> None:
    source = Source(3600.0)
    held = source.credentials()
    first = held.wait(30.0)
    source.now += 3400
    source.gate.clear()
    assert held.wait(0.0) is first  # and waits for nothing
    source.gate.set()
    eventually(lambda: held.held() is not first)
    assert source.asked == 2


def test_a_token_that_is_valid_for_five_more_minutes_is_used_while_renewing_fails() -> None:
    source = Source(3600.0, PASSING)
    held = source.credentials()
    first = held.wait(30.0)
    source.now += 3302
    for _ in range(3):
        assert held.wait(0.0) is first
        eventually(lambda: held._renewal is None)
    assert source.asked == 4  # each was tried, and nobody waited
    source.now += 290
    with pytest.raises(NoToken, match=r"somebody: (503; tried|no token within 0.2 s; before: 503).*; do something$"):
        held.wait(0.2)


def test_early_renewals_keep_a_distance() -> None:
    source = Source(200.0)  # from its beginning near its end, as some metadata servers give them
    held = source.credentials(again_s=30.0)
    for _ in range(50):
        held.wait(30.0)
    assert source.asked == 1


@pytest.mark.parametrize("failures", [1, 3])
def test_what_may_pass_is_tried_again_while_somebody_waits(failures: int) -> None:
    source = Source(*[PASSING] * failures, 3600.0)
    told: list[Event] = []
    unsubscribe = subscribe(told.append)
    assert source.credentials().wait(30.0).headers
    unsubscribe()
    assert source.asked == failures + 1
    assert [event.operation for event in told if isinstance(event, Retried)] == ["credentials"] * failures


def test_what_will_not_pass_is_said_at_once_and_asked_again_by_the_next() -> None:
    source = Source(FINAL, 3600.0)
    held = source.credentials()
    with pytest.raises(NoToken, match=r"^somebody: revoked; do something$"):
        held.wait(30.0)
    assert source.asked == 1
    assert held.wait(30.0)


def test_a_rejected_token_is_not_given_out_again_and_a_newer_one_is_not_lost() -> None:
    source = Source(3600.0)
    held = source.credentials()
    first = held.wait(30.0)
    held.reject(first)
    second = held.wait(30.0)
    held.reject(first)  # by a request that was under way
    assert held.wait(30.0) is second is not first and source.asked == 2


def test_who_waits_is_told_at_the_deadline_even_if_no_answer_ever_comes() -> None:
    source = Source(3600.0)
    source.gate.clear()
    with pytest.raises(NoToken, match=r"no token within 0.1 s"):
        source.credentials().wait(0.1)
    source.gate.set()


@pytest.mark.parametrize(
    ("token", "environ", "expected"),
    [
        (None, {environment.ANONYMOUS: "1"}, "nobody"),
        (None, {environment.EMULATOR: "http://127.0.0.1:1"}, "nobody"),
        (None, {environment.EMULATOR: "default"}, "no credentials: GOOGLE_APPLICATION_CREDENTIALS is not set"),
        (None, {}, "no credentials: GOOGLE_APPLICATION_CREDENTIALS is not set"),
        (None, {"NO_GCE_CHECK": ""}, MACHINE),
        (
            None,
            {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/key.json"},
            "file /nowhere/key.json cannot be used: ENOENT",
        ),
        ("anon", {}, "nobody"),
        ("google_default", {}, "no credentials"),
        ("cloud", {"NO_GCE_CHECK": "", "GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/key.json"}, MACHINE),
        (user.Credentials("a raw token"), {}, "the token of fsspec's configuration for gcs"),
        ({"type": "nothing"}, {}, "the token of fsspec's configuration for gcs cannot be used"),
    ],
)
def test_nobody_is_only_who_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: Any, environ: dict[str, str], expected: str
) -> None:
    for name in (environment.ANONYMOUS, environment.EMULATOR, "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    for name, value in {"NO_GCE_CHECK": "true", **environ}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(config.conf, "gcs", {} if token is None else {"token": token})
    try:
        found = gcs_identity.find()()
        assert found.shared is (expected == MACHINE)
        said = found.label()
    except NoToken as error:
        assert not error.passing
        said = str(error)
    assert expected in said and "raw token" not in said


# In a process of its own.


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("credentials")
    emulator().ask("POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode())
    command = [sys.executable, "-m", "tests.support.credentials_child", emulator().url, str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=REPO, env={**_plain(), "PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert "-secret" not in done.stderr + done.stdout, "a token was printed"
    return {row["row"]: row for row in rows} | {"": {"stderr": done.stderr}}


def _plain() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "GOOGLE_"))}


GOT = r"\(Created\(\), b'1'\)"
EVERYTHING = r"\[b'elements', \['b', 'state/d/x'\], 1, \['None', 'None'\], False\]"
FILE = r"GOOGLE_APPLICATION_CREDENTIALS file \S+\.json"
# Situation: what it brings (or the error), how often a token was asked for, what was tried again.
TABLE: dict[str, tuple[str, range, str]] = {
    "metadata_server": (GOT, range(1, 2), ""),
    "late_start": (GOT, range(2, 99), "credentials .*connection ended"),
    "never_starts": (
        f"{MACHINE} .*the connection ended without an answer.* is not set: has the machine or pod",
        range(2, 99),
        "credentials",
    ),
    "hangs": (r"\['Unavailable'(, 'Unavailable'){7}\]", range(1, 5), ".*"),
    "unavailable_for_a_while": ("b'1'", range(2, 99), "credentials .*HTTP 503"),
    "forbidden_by_the_metadata_server": (f"{MACHINE}.*Status: 403", range(1, 2), ""),
    "revoked": (rf"a@p.iam.gserviceaccount.com \({FILE}\): invalid_grant: Invalid JWT", range(1, 2), ""),
    "service_account": (GOT, range(1, 2), ""),
    "external": (GOT, range(1, 2), ""),
    "external_impersonating": (GOT, range(2, 3), ""),
    "impersonating": (GOT, range(2, 3), ""),
    "impersonated": (rf"i@p.iam.* \({FILE}\): iamcredentials.* ECONNREFUSED", range(1, 2), "credentials"),
    "broken_key": (f"{FILE} cannot be used: .*PEM", range(1), ""),
    "list": (f"{FILE} cannot be used: .*type ''; expected service_account", range(1), ""),
    "unknown_type": (f"{FILE} cannot be used: .*type 'of_tomorrow'", range(1), ""),
    "garbage": (f"{FILE} cannot be used: JSONDecodeError", range(1), ""),
    "missing": (f"{FILE} cannot be used: ENOENT", range(1), ""),
    "anonymous_as_asked": ("None", range(1), ""),
    "rejected_once": ("b'1'", range(1, 2), "get http 401"),
    "rejected_always": (
        "HTTP 401 Invalid Credentials; the credentials are not accepted .pod@p",
        range(2, 3),
        "get http 401",
    ),
    "arrays": (EVERYTHING, range(1, 99), ""),
    "arrays_external": (EVERYTHING, range(1, 99), ""),
    "requester_pays": (EVERYTHING, range(1, 99), ""),
}

PASSING_BY_ITSELF = ("never_starts", "impersonated")  # nobody rejects: nobody answers
JOBS = ("job_revoked", "job_rejected_while_read", "job_external")
WRITES = {  # is the step saved, and does TensorStore go on writing
    "job_write_limited": ("'3 False'", [1, 2, 3, 9]),
    "job_write_forbidden": ("'2 False'", [1, 2, 9]),
    "job_write_rejected": ("'3 True'", [1, 2, 3, 9]),
}


@pytest.mark.jobs
@pytest.mark.parametrize("name", TABLE)
def test_credentials_are_waited_for_renewed_or_named(played: dict[str, dict[str, Any]], name: str) -> None:
    expected, asked, retried = TABLE[name]
    row = played[name]
    got = row.get("value") or row["text"]
    assert re.search(expected, got), row
    assert row["asked"] in asked, row
    assert re.search(retried, " ".join(row["retried"])) if retried else row["retried"] == [], row
    if "text" in row:
        assert row["kinds"][0] == "Unavailable" and "\n" not in got and len(got) < 900, row
        assert "the credentials" in got, row
    assert (row["rejected"] > 0) is ("text" in row and name not in PASSING_BY_ITSELF), row


@pytest.mark.jobs
def test_all_rows_are_played_and_judged(played: dict[str, dict[str, Any]]) -> None:
    assert set(played) - {""} == {*TABLE, *JOBS, *WRITES, "job_long_read"}


@pytest.mark.jobs
def test_a_bucket_whose_requester_pays_names_the_option(played: dict[str, dict[str, Any]]) -> None:
    assert "set ORCHESTRATOR_GCS_USER_PROJECT=PROJECT" in played["requester_pays"]["without"]


@pytest.mark.jobs
@pytest.mark.parametrize("name", JOBS)
def test_a_job_outlives_its_credentials_and_nothing_is_quarantined(
    played: dict[str, dict[str, Any]], name: str
) -> None:
    row = played[name]
    assert row.get("failed_before") == 0 and row["steps"] == [1, 2, 9] and row["right"], row
    assert set(row["events"]) <= {"opened-epoch", "committed", "restored", "aborted"}, row
    if name == "job_revoked":
        assert row["failed"] == 1 and "invalid_grant" in played[""]["stderr"], row
        for what in ("restore", "list"):
            assert row[what]["kinds"][0] == "Unavailable" and "a@p.iam.gserviceaccount.com" in row[what]["text"], row
    else:  # one read of a chunk was answered with 401, and read again with another token
        assert row["failed"] == 0 and row["restore"]["value"] == "2", row
        assert row["restore"]["asked"] >= 1 and "401" in " ".join(row["restore"]["retried"]), row


@pytest.mark.jobs
@pytest.mark.parametrize("name", WRITES)
def test_what_tensorstore_is_not_allowed_to_write_the_client_writes_or_says_why(
    played: dict[str, dict[str, Any]], name: str
) -> None:
    row = played[name]
    saved, steps = WRITES[name]
    assert "save" in row, row
    assert (row["save"]["value"], row["steps"], row["right"]) == (saved, steps, True), row
    assert row["failed"] == (0 if 3 in steps else 1), row
    reasons = [line for line in played[""]["stderr"].splitlines() if "SaveNotCommitted" in line and "HTTP 403" in line]
    assert len(reasons) == 1 and "roles/storage.objectCreator has storage.objects.create" in reasons[0]
    assert len(reasons[0]) < 1500, reasons


@pytest.mark.jobs
def test_a_read_that_outlasts_its_token_goes_on_with_the_next(played: dict[str, dict[str, Any]]) -> None:
    row = played["job_long_read"]
    assert row.get("read", {}).get("value") == "32", row
