"""The codec of everything that is stored: exact round trips, and no damage that goes unnoticed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import Damaged, NewerFormat
from orchestrator.rules.attempt_id import name_of
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.json_numbers import stored, stored_all
from orchestrator.rules.records import (
    Box,
    Extra,
    Failure,
    FileEntry,
    Head,
    Intent,
    JournalEvent,
    LeafSpec,
    LiveStep,
    Manifest,
    Receipt,
    Record,
    RetiredAttempt,
    TreeSpec,
    crc32c,
)
from tests.support.builders import box, head, intent, leaf, live, receipt

WHERE = "run/journal/7.json"
FAILURE = Failure(process=3, host="host-d", phase="write", cause='OSError: ENOSPC "quoted" \u2028 ü \\ \n')
EXAMPLES: list[Record] = [
    head(
        live(1, metrics={"loss": 0.1, "nan": math.nan, "best": -math.inf}, pins=("paper",)),
        live(2, trust="quarantined"),
        retired=(RetiredAttempt(step=0, attempt="e0001-a01", reason="aborted"),),
        event=JournalEvent(
            kind="aborted", step=0, attempt="e0001-a01", failures=(FAILURE,), reason="because", steps=(1, 2)
        ),
    ),
    intent(
        leaf(),
        LeafSpec(path=("rng",), kind="key", dtype="key<fry>", stored_shape=(2,), stored_dtype="uint32", value="fry"),
    ),
    receipt(
        5,
        files=(FileEntry(path="state/d/x", bytes=2**60, crc32c="00c0ffee"),),
        boxes={"w": (box((0, 4), (4, 8)), box((4, 8), (4, 8))), "scalar": (box(),)},
        seconds={"write": 1e-9},
    ),
    receipt(3, failure=FAILURE),
    Manifest(
        format=1, write_id="m", step=1, attempt="e0001-a01", process_count=1, files=(), hosts=("h",), seconds=({},)
    ),
    Extra(
        format=1,
        write_id="x",
        step=1,
        timestamp=0.1,
        stored_metrics=stored_all({"loss": math.inf}),
        stored_extra={"a": [1, None, {"b": "c"}], "": True},
    ),
]
NAMES = [type(example).__name__ for example in EXAMPLES]


@pytest.mark.parametrize("record", EXAMPLES, ids=NAMES)
def test_every_record_comes_back_equal_and_is_written_the_same_way_each_time(record: Record) -> None:
    body = encode(record)
    assert decode(body, type(record), WHERE) == record
    assert encode(decode(body, type(record), WHERE)) == body
    assert body.endswith(b"\n") and b"\n" not in body[:-1]


@pytest.mark.parametrize("record", EXAMPLES, ids=NAMES)
def test_a_record_is_plain_json_for_other_programs(record: Record) -> None:
    fields = json.loads(encode(record))
    assert fields["format"] == 1
    assert fields["crc32c"] == crc32c(encode(record).rpartition(b',"crc32c":')[0])


@pytest.mark.parametrize("record", EXAMPLES, ids=NAMES)
def test_a_record_cut_off_at_any_byte_is_noticed(record: Record) -> None:
    body = encode(record)
    for length in range(len(body)):
        with pytest.raises(Damaged, match=WHERE):
            decode(body[:length], type(record), WHERE)


@pytest.mark.parametrize("record", EXAMPLES, ids=NAMES)
def test_any_edit_of_any_single_byte_is_noticed(record: Record) -> None:
    body = encode(record)
    for position in range(len(body)):
        for value in {body[position] ^ 1, body[position] ^ 0x20, body[position] ^ 0x80, ord("9"), ord(" ")}:
            edited = body[:position] + bytes([value]) + body[position + 1 :]
            if edited != body:
                with pytest.raises(Damaged, match=WHERE):
                    decode(edited, type(record), WHERE)


@given(st.data())
def test_inserted_deleted_and_swapped_bytes_are_noticed(data: st.DataObject) -> None:
    body = encode(EXAMPLES[0])
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, min(len(body), start + 8)))
    edited = body[:start] + data.draw(st.binary(max_size=8)) + body[end:]
    if edited != body:
        with pytest.raises(Damaged):
            decode(edited, Head, WHERE)


def signed(fields: dict[str, Any]) -> bytes:
    """A record made by hand, with a right checksum: what another version, or an attacker, could write."""
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return body + b',"crc32c":"' + crc32c(body).encode() + b'"}\n'


def test_a_record_of_a_newer_format_says_so_even_if_nothing_else_of_it_can_be_understood() -> None:
    for body in (signed({"format": 2, "shape": "unknown"}), b'{"format":2}', b'{"format": 7, "sum": "sha256:..."}\n'):
        with pytest.raises(NewerFormat, match=r"run/journal/7.json: format \d, this version reads up to 1"):
            decode(body, Head, WHERE)


def test_fields_of_later_minor_versions_are_ignored() -> None:
    fields = {**json.loads(msgspec.json.encode(head(live(1)))), "later": [1, 2]}
    assert decode(signed(fields), Head, WHERE) == head(live(1))


@pytest.mark.parametrize(
    "change",
    [
        {"version": "7"},
        {"version": 7.5},
        {"live": [{"step": 1}]},
        {"live": None},
        {"epoch": None},
        {"event": "committed"},
    ],
)
def test_a_record_with_a_field_of_another_type_is_rejected_by_name(change: dict[str, Any]) -> None:
    fields = {**json.loads(msgspec.json.encode(head())), **change}
    with pytest.raises(Damaged, match=f"run/journal/7.json: not a Head: .*{next(iter(change))}"):
        decode(signed(fields), Head, WHERE)


@pytest.mark.parametrize(
    "body", [b"", b"\n", b"{}", b"null", b"\x00" * 4096, b"\xff\xfe", b'{"format":"1"}', b"[" * 10_000]
)
def test_what_is_not_a_record_is_damage_and_never_another_error(body: bytes) -> None:
    with pytest.raises(Damaged, match=f"{WHERE}: {len(body)} bytes"):
        decode(body, Head, WHERE)


def test_one_kind_of_record_is_not_taken_for_another() -> None:
    with pytest.raises(Damaged, match="not a Receipt"):
        decode(encode(head()), Receipt, WHERE)


DECODES_ALL = """
import sys

from orchestrator import errors
from orchestrator.observe import event_log, events
from orchestrator.rules import codec, records

asked = []

def look(frame, what, _):
    if frame.f_code.co_name == "get_class_annotations":
        asked.append(frame.f_locals)

sys.setprofile(look)
for kind in records.Record.__subclasses__():
    body = b'{"format":1'
    try:
        codec.decode(body + b',"crc32c":"' + records.crc32c(body).encode() + b'"}\\n', kind, "here")
    except (errors.Damaged, KeyError):  # what is stored only inside of others has no rule
        pass
for name in events.KINDS:
    event_log.decode(b'{"v":1,"event":"%s"}' % name.encode())
sys.setprofile(None)
sys.exit(f"described while decoding: {asked}" if asked else 0)
"""


def test_nothing_is_left_for_the_threads_that_decode_first_to_describe() -> None:
    """Two of them at a time crash the process: see `codec._DECODERS`. `get_class_annotations` is msgspec's."""
    done = subprocess.run([sys.executable, "-c", DECODES_ALL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


TEXT = st.text(max_size=20)
TIMES = st.floats(0, 250_000_000_000)
HEADS = st.builds(
    Head,
    format=st.just(1),
    version=st.integers(0, 10**20 - 1),
    epoch=st.integers(0, 2**62),
    writer=TEXT,
    write_id=TEXT,
    time=TIMES,
    event=st.builds(JournalEvent, kind=TEXT, reason=TEXT, steps=st.lists(st.integers(0, 99)).map(tuple)),
    live=st.lists(
        st.builds(
            LiveStep,
            step=st.integers(0, 2**31 - 1),
            attempt=st.builds(name_of, st.integers(0, 99_999), st.integers(0, 999)),
            manifest_crc32c=st.binary(min_size=4, max_size=4).map(bytes.hex),
            tree=TEXT,
            bytes=st.integers(0, 2**62),
            stored_metrics=st.dictionaries(TEXT, st.floats().map(stored), max_size=3),
            time=TIMES,
            pins=st.lists(TEXT, max_size=2).map(tuple),
        ),
        max_size=3,
        unique_by=lambda one: one.step,
    ).map(tuple),
)


@given(HEADS)
def test_any_head_comes_back_equal(made: Head) -> None:
    assert decode(encode(made), Head, WHERE) == made


# Trees.


def test_a_trees_fingerprint_is_its_paths_kinds_shapes_and_dtypes() -> None:
    plain = TreeSpec(leaves=(leaf("a"), leaf("b/c", (2, 3))))
    assert plain.fingerprint() == TreeSpec(leaves=(leaf("b/c", (2, 3)), leaf("a"))).fingerprint()
    sharded = msgspec.structs.replace(leaf("a"), sharding="P('data',)", value="1")
    assert plain.fingerprint() == TreeSpec(leaves=(sharded, leaf("b/c", (2, 3)))).fingerprint()
    for other in (
        leaf("a2"),
        leaf("a", (4, 1)),
        leaf("a", dtype="bfloat16"),
        leaf("a", kind="numpy"),
        LeafSpec(path=("a", "b"), kind="array", shape=(4,), dtype="float32"),
    ):
        assert plain.fingerprint() != TreeSpec(leaves=(other, leaf("b/c", (2, 3)))).fingerprint()
    assert plain.fingerprint() != TreeSpec(leaves=(leaf("a"),)).fingerprint()
    assert TreeSpec(leaves=(leaf("b.c"),)).fingerprint() != TreeSpec(leaves=(leaf("b/c"),)).fingerprint()


def test_the_checksum_is_crc32c_as_the_rest_of_the_world_computes_it() -> None:
    assert crc32c(b"123456789") == "e3069283"
    assert crc32c(b"") == "00000000"


def test_a_manifests_size_is_the_sum_of_its_files() -> None:
    files = tuple(FileEntry(path=name, bytes=size, crc32c="0") for name, size in (("a", 3), ("b", 4)))
    manifest = msgspec.structs.replace(EXAMPLES[4], files=files)
    assert isinstance(manifest, Manifest) and manifest.total_bytes == 7


def test_records_are_immutable_and_boxes_are_two_rows_of_numbers() -> None:
    with pytest.raises(AttributeError):
        head().version = 3  # type: ignore[misc]
    assert msgspec.json.encode(Box((0, 4), (8, 8))) == b"[[0,4],[8,8]]"
    assert isinstance(EXAMPLES[1], Intent)


def test_an_intent_is_stored_as_if_its_tree_were_encoded_with_it() -> None:
    """The tree's JSON is made once for all intents that have it."""
    first = intent(leaf("a"), leaf("b"))
    for record in (first, msgspec.structs.replace(first, step=2), intent(leaf("a"))):
        assert encode(record).startswith(msgspec.json.encode(record)[:-1])


def test_intents_of_one_tree_share_it_and_a_changed_one_is_its_own() -> None:
    first = intent(leaf("a"), leaf("b"))
    one, again = (decode(encode(msgspec.structs.replace(first, step=step)), Intent, WHERE) for step in (1, 2))
    assert one.tree is again.tree and (one.step, again.step) == (1, 2)
    other = decode(encode(intent(leaf("a"), leaf("c"))), Intent, WHERE)
    assert [found.path for found in other.tree.leaves] == [("a",), ("c",)]


def test_receipts_of_one_form_share_their_regions_and_a_changed_one_has_its_own() -> None:
    regions = {"a": (box((0, 4)),)}
    one, again = (decode(encode(receipt(number, boxes=regions)), Receipt, WHERE) for number in (1, 2))
    assert one.boxes is again.boxes and one.boxes == regions and (one.process, again.process) == (1, 2)
    for boxes in ({}, {"a": (box((4, 8)),)}):
        record = receipt(1, boxes=boxes)
        assert decode(encode(record), Receipt, WHERE).boxes == boxes
        assert encode(record).startswith(msgspec.json.encode(record)[:-1])


def test_a_tree_that_is_no_tree_is_damage_whatever_was_decoded_before() -> None:
    body = msgspec.json.encode(intent(leaf("a")))[:-1].replace(b'"kind":"array"', b'"kind":5')
    data = body + b',"crc32c":"' + crc32c(body).encode() + b'"}\n'
    encode(intent(leaf("a")))
    with pytest.raises(Damaged, match="not a Intent: tree: "):
        decode(data, Intent, WHERE)
