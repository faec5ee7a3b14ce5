"""What a tier server and those who ask it say to each other."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import UnsafeKey, UsageError
from orchestrator.rules import peer_protocol
from orchestrator.rules.keys import TEMPORARY
from orchestrator.rules.peer_protocol import (
    CLOCK_S,
    Failure,
    Parts,
    Progress,
    Request,
    Secret,
    Sending,
    Signed,
    Target,
    Unsigned,
    parse_target,
    verify,
)

RUN = "0123456789abcdef"
KEY = bytes(range(32))
SECRET, OTHER = Secret(KEY), Secret(bytes(32))
NONCE = "5e" * 16
NOW = 1_700_000_000
REQUEST = Request("PUT", f"/{RUN}/process-00003/steps/x", "", 5, "e3069283")


def verified(header: str, request: Request = REQUEST, now_s: float = NOW) -> Signed | Unsigned:
    return verify(SECRET, request.method, request.target, request.range, header, now_s)


def test_what_the_secret_has_signed_is_accepted_with_what_it_declares() -> None:
    assert verified(REQUEST.authorize(SECRET, NOW, NONCE)) == Signed(NONCE, 5, "e3069283")


@pytest.mark.parametrize("field", ["method", "target", "range", "body_bytes", "crc32c"])
def test_nothing_that_is_signed_can_be_changed_on_the_way(field: str) -> None:
    other = {"method": "GET", "target": f"/{RUN}/process-00004/steps/x", "range": "bytes=0-1"}
    header = REQUEST.authorize(SECRET, NOW, NONCE)
    if field in other:
        assert verified(header, replace(REQUEST, **{field: other[field]})) == Unsigned("another secret has signed it")
    else:
        changed = header.replace(" 5 ", " 6 ") if field == "body_bytes" else header.replace("e3069283", "00000000")
        assert changed != header and verified(changed) == Unsigned("another secret has signed it")


@pytest.mark.parametrize("off_s", [-CLOCK_S - 1, CLOCK_S + 1, 86400])
def test_an_old_request_is_rejected_and_its_signer_is_told_that_the_clocks_differ(off_s: int) -> None:
    header = REQUEST.authorize(SECRET, NOW, NONCE)
    found = verified(header, now_s=NOW + off_s)
    assert isinstance(found, Unsigned) and found.nonce == NONCE
    assert f"{off_s:+d} s away from this host's clock, expected at most {CLOCK_S} s" in found.reason
    assert isinstance(verified(header, now_s=NOW + off_s // abs(off_s) * CLOCK_S), Signed)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic dXNlcjpwYXNz",
        REQUEST.authorize(OTHER, NOW, NONCE),
        REQUEST.authorize(SECRET, NOW, NONCE) + " ",
        REQUEST.authorize(SECRET, NOW, NONCE)[:-1],
        REQUEST.authorize(SECRET, NOW, NONCE).upper(),
        REQUEST.authorize(SECRET, NOW, NONCE).replace(f" {NOW} ", f" {NOW + 1} "),
        REQUEST.authorize(SECRET, NOW, NONCE).replace(NONCE, "5f" * 16),
        REQUEST.authorize(SECRET, NOW, "5e" * 15 + "\u0665e"),
        "\u0660" * 200,
        "\udcff" * 200,
    ],
)
def test_any_other_header_is_no_signature_and_its_sender_learns_nothing(header: str) -> None:
    found = verified(header)
    assert isinstance(found, Unsigned) and not found.nonce


def test_an_answer_is_proven_for_one_request_one_status_and_one_length() -> None:
    proof = peer_protocol.prove(SECRET, NONCE, 206, 10)
    assert peer_protocol.proves(SECRET, NONCE, 206, 10, proof)
    for secret, nonce, status, length in (
        (OTHER, NONCE, 206, 10),
        (SECRET, "5f" * 16, 206, 10),
        (SECRET, NONCE, 200, 10),
        (SECRET, NONCE, 206, 11),
        (SECRET, NONCE, 206, None),
    ):
        assert not peer_protocol.proves(secret, nonce, status, length, proof)
    assert not peer_protocol.proves(SECRET, NONCE, 206, 10, "\udcff")
    # A server that is asked with a chosen nonce must not sign requests by that.
    assert not SECRET.signed(REQUEST.text(NOW, NONCE), proof)


@pytest.mark.parametrize(
    "text", ["", "ab" * 15, "ab" * 15 + "zz", "ab" * 16 + "c", "a secret of many, many more words"]
)
def test_a_secret_that_is_none_is_rejected_without_being_shown(text: str) -> None:
    with pytest.raises(UsageError, match="ORCHESTRATOR_X: expected") as caught:
        peer_protocol.secret_of(text, "ORCHESTRATOR_X")
    assert not text or text not in str(caught.value)


def test_a_secret_is_neither_shown_nor_pickled() -> None:
    assert peer_protocol.secret_of(f" {KEY.hex().upper()}\n", "x") == KEY
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr([SECRET])):
        assert KEY.hex() not in shown and repr(KEY) not in shown
    with pytest.raises(TypeError):
        pickle.dumps(SECRET)
    with pytest.raises(UsageError, match="has 15 bytes"):
        Secret(bytes(15))


# Targets.

PLAIN = [
    (f"/{RUN}", Target(RUN)),
    (f"/{RUN}?epoch=7", Target(RUN, query={"epoch": "7"})),
    (f"/{RUN}/process-00003", Target(RUN, 3)),
    (f"/{RUN}/process-00003?list=steps%2F&start=", Target(RUN, 3, query={"list": "steps/", "start": ""})),
    (f"/{RUN}/process-123456/steps/20/e2-a01/d/0", Target(RUN, 123456, "steps/20/e2-a01/d/0")),
    (f"/{RUN}/process-00003/a%20b%3F%C3%BC%25", Target(RUN, 3, "a b?ü%")),
]  # fmt: skip


@pytest.mark.parametrize(("text", "target"), PLAIN)
def test_a_target_is_read_as_it_was_built(text: str, target: Target) -> None:
    assert target.encode() == text and parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "*",
        "//",
        f"/{RUN}/",
        f"//{RUN}",
        f"{RUN}/process-00003",
        f"http://other/{RUN}/process-00003/a",
        f"/{RUN.upper()}",
        f"/{RUN}0",
        f"/{RUN[:-1]}",
        f"/{RUN}/..",
        f"/{RUN}/../{RUN}",
        f"/{RUN}/process-3/a",
        f"/{RUN}/process-000003/a",
        f"/{RUN}/process-\u0660\u0660\u0660\u0660\u0660/a",
        f"/{RUN}/process-00003/",
        f"/{RUN}/process-00003//a",
        f"/{RUN}/process-00003/a/",
        f"/{RUN}/process-00003/../process-00004/a",
        f"/{RUN}/process-00003/%2e%2e/a",
        f"/{RUN}/process-00003/%2E%2E/a",
        f"/{RUN}/process-00003/%252e%252e/a/%2e",
        f"/{RUN}/process-00003/a%2fb",
        f"/{RUN}/process-00003/a%2Fb",
        f"/{RUN}/process-00003/a%00b",
        f"/{RUN}/process-00003/a\0b",
        f"/{RUN}/process-00003/a%0Ab",
        f"/{RUN}/process-00003/a%5Cb",
        f"/{RUN}/process-00003/%FF",
        f"/{RUN}/process-00003/%ED%A0%80",
        f"/{RUN}/process-00003/\u00fc",
        f"/{RUN}/process-00003/%c3%bc",
        f"/{RUN}/process-00003/%61",
        f"/{RUN}/process-00003/a%",
        f"/{RUN}/process-00003/a b",
        f"/{RUN}/process-00003/a+b#c",
        f"/{RUN}/process-00003/a?b",
        f"/{RUN}/process-00003/a?x=1&x=2",
        f"/{RUN}/process-00003/a?measure=%ff",
        f"/{RUN}/process-00003/a?",
        f"/{RUN}/process-00003/{TEMPORARY}/x",
        f"/{RUN}/process-00003/{TEMPORARY}",
        f"/{RUN}/process-00003/" + "a/" * 3000 + "a",
    ],
)
def test_a_target_that_nobody_would_have_built_is_unsafe(text: str) -> None:
    with pytest.raises(UnsafeKey):
        parse_target(text)


@given(st.text("ab0/.%25eEF?=&\\\0 \u00fc", max_size=30))
def test_whatever_is_taken_for_a_target_is_what_would_be_built(text: str) -> None:
    for whole in (text, f"/{RUN}{text}", f"/{RUN}/process-00003/{text}"):
        try:
            found = parse_target(whole)
        except UnsafeKey:
            continue
        assert found.encode() == whole


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=5-14", (5, 10)),
        *((bad, None) for bad in ("", "bytes=5-", "bytes=-5", "bytes=5-4", "bytes=0-1,3-4", "items=0-1", "bytes=a-b")),
        ("bytes=0-99999999999999999999", None),
    ],
)
def test_a_range_is_one_plain_range(text: str, found: tuple[int, int] | None) -> None:
    assert peer_protocol.parse_range(text) == found


def test_bodies_are_read_as_they_were_written_and_anything_else_is_none() -> None:
    for body in (
        Failure("room", "need 5, have 3"),
        Parts({3: [(20, "e0002-a01")]}),
        Sending(["a", "b"], ["h:1"], 5),
        Progress(7),
        Progress(7, failure=Failure("x", "y")),
    ):
        assert peer_protocol.decode(peer_protocol.encode(body), type(body)) == body
    for bad in (b"", b"{", b"[]", b'{"kind":1,"text":"x"}', b"[" * 5000, b"\xff", b"null"):
        assert peer_protocol.decode(bad, Failure) is None
