"""What may be in a stored record: bounds of every field, for whoever reads and for whoever writes."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec
import pytest

from orchestrator.errors import Damaged, Unavailable, UnsafeKey, UsageError
from orchestrator.rules import codec, validate
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.placement import PlacedHost, Placement
from orchestrator.rules.records import (
    Box,
    ExternalArray,
    Extra,
    FileEntry,
    GroupReceipt,
    Head,
    Intent,
    LeafSpec,
    Manifest,
    Place,
    Receipt,
    Record,
    RetiredAttempt,
    TreeSpec,
)
from tests.support import builders
from tests.support.images import signed, signed_text

FILE = FileEntry(path="state/d/x", bytes=100, crc32c="00c0ffee", crc32="00c0ffee")
KEY = LeafSpec(
    path=("k",), kind="key", shape=(3,), dtype="key<fry>", stored_shape=(3, 2), stored_dtype="uint32", value="fry"
)
ARRAY = LeafSpec(path=("w",), kind="array", shape=(4, 6), dtype="float32", chunk=(2, 6), sharding="P('data',)")
VALUES = [
    LeafSpec(path=(kind,), kind=kind, value=value)
    for kind, value in {
        **{"none": "", "bool": "True", "int": "-12", "float": "-0x1.8p+1", "complex": "nan inf", "str": "ü \0"},
        **{"bytes": "AAECAw==", "empty": "tuple"},
    }.items()
]
GOOD: dict[str, Record] = {
    "Head": builders.head(builders.live(1), builders.live(2, metrics={"loss": 0.5}, pins=("p",))),
    "Intent": msgspec.structs.replace(builders.intent(ARRAY, KEY, *VALUES), mesh={"data": 2, "model": 4}),
    "Receipt": builders.receipt(
        3,
        files=(FILE,),
        boxes={"w": (Box((0, 0), (2, 6)),)},
        places={"w/c/0/0": Place(0, 0, 52, "00c0ffee")},
        small={"k/c/0": b"12345678"},
        seconds={"write": 0.5},
    ),
    "GroupReceipt": builders.group_receipt(builders.receipt(3), builders.receipt(4, files=(FILE,)), process=3),
    "Manifest": Manifest(
        format=1,
        write_id="m",
        step=3,
        attempt="e0001-a01",
        process_count=2,
        files=(FILE,),
        hosts=("a", "b"),
        seconds=({"write": 1.0}, {}),
        chunks={"w/c/0/0": "00c0ffee"},
        fingerprints={"w": "0" * 32},
    ),
    "Extra": Extra(
        format=1,
        write_id="x",
        step=3,
        timestamp=1.0,
        stored_metrics={"loss": -0.0},
        stored_extra={"a": [1, {"b": None}]},
    ),
    "Placement": Placement(
        format=1,
        epoch=3,
        time=1.0,
        asked="slice",
        copies_asked=1,
        level="node",
        hosts=(
            PlacedHost(name="a", processes=(0, 1), targets=(1,)),
            PlacedHost(name="b", processes=(2,), targets=(0,)),
        ),
        notes=("all hosts are in one slice, s0",),
    ),
}


def fields(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(encode(GOOD[kind]))
    return found


def changed(kind: str, path: str, value: Any) -> bytes:
    """The record with another value at `a.b.0.c`, signed."""
    record = fields(kind)
    holder: Any = record
    *above, last = path.split(".")
    for name in above:
        holder = holder[int(name) if isinstance(holder, list) else name]
    holder[int(last) if isinstance(holder, list) else last] = value
    return signed(record)


BIG = 2**63
BAD: list[tuple[str, str, list[Any]]] = [
    ("Head", "version", [-1, 10**20, 10**30, 1.5, None]),
    ("Head", "epoch", [-1, BIG]),
    ("Head", "time", [-1.0, 1e300, "now"]),
    ("Head", "writer", ["x" * 5000, 7]),
    (
        "Head",
        "event",
        [{"kind": "x", "step": -1}, {"kind": "x", "steps": [2**31]}, {"kind": "x", "reason": "x" * 2**21}],
    ),
    ("Head", "live.0.step", [-1, 2**31, 2]),
    ("Head", "live.0.manifest_crc32c", ["", "0000000g", "0000000", "000000000", "ABCDEF00"]),
    ("Head", "live.0.bytes", [-1, BIG]),
    ("Head", "live.0.time", [-1.0, 1e300]),
    ("Head", "live.0.metrics", [{"loss": "inf"}, {"loss": "nan"}, {"loss": [1.0]}]),
    ("Head", "live.0.trust", ["", "good", "Quarantined"]),
    ("Head", "live.0.pins", [["x" * 5000]]),
    ("Placement", "epoch", [-1, BIG]),
    ("Placement", "hosts.0.name", ["x" * 5000, None]),
    ("Placement", "hosts.0.processes", [[-1], [2_000_000], ["a"]]),
    ("Placement", "hosts.1.targets", [[2], [-1]]),
    ("Placement", "notes", [["x" * 5000]]),
    ("Intent", "step", [-1, 2**31]),
    ("Intent", "process_count", [0, -1, 2_000_000]),
    ("Intent", "device_count", [-1, 2_000_000]),
    ("Intent", "mesh", [{"a": 0}, {"a": -1}, {"a": 2**62}, {"a": 1000, "b": 10_000}]),
    ("Intent", "built_on", [-2]),
    ("Intent", "tree.leaves", [[]]),
    ("Intent", "tree.leaves.0.path", [["k"], ["w"] * 600, ["\ud800"], ["x" * 9000], ["none", "below"], []]),
    ("Intent", "tree.leaves.0.kind", ["", "tensor", "Array"]),
    ("Intent", "tree.leaves.0.shape", [[-4, 6], [4], [4, 2**62], [2**70, 6], [1] * 65, [4, 0]]),
    ("Intent", "tree.leaves.0.dtype", ["", "float", "f4", "object", "finfo", "i4,i4", "float128", "uint2"]),
    ("Intent", "tree.leaves.0.chunk", [[0, 6], [-2, 6], [3, 6], [8, 6], [2], [2, 6, 1], [4, 2**40]]),
    ("Intent", "tree.leaves.0.stored_shape", [[4], [6, 4]]),
    ("Intent", "tree.leaves.0.stored_dtype", ["float64", "uint8"]),
    ("Intent", "tree.leaves.0.sharding", ["P(" * 5000]),
    ("Intent", "tree.leaves.1.stored_shape", [None, [2, 2], [2]]),
    ("Intent", "tree.leaves.1.stored_dtype", ["", "float32"]),
    ("Intent", "tree.leaves.1.value", [""]),
    ("Intent", "tree.leaves.1.dtype", ["uint32", ""]),
    *(("Intent", f"tree.leaves.{number}.shape", [[2]]) for number in range(2, 10)),
    ("Intent", "tree.leaves.2.value", ["x"]),
    ("Intent", "tree.leaves.3.value", ["", "true", "1"]),
    ("Intent", "tree.leaves.4.value", ["", "x", "1_0", " 1", "0x1", "9" * 5000, "\u0661"]),
    ("Intent", "tree.leaves.5.value", ["", "x", "0x1p99999"]),
    ("Intent", "tree.leaves.6.value", ["", "0x1p0", "0x1p0 x", "0x1p0  0x1p0", "1 2 3"]),
    ("Intent", "tree.leaves.8.value", ["!", "A", "AA=A", "Ä==="]),
    ("Intent", "tree.leaves.9.value", ["", "set"]),
    ("Receipt", "process", [-1, 2_000_000]),
    ("GroupReceipt", "process", [-1, 2_000_000]),
    ("GroupReceipt", "number", [0, -1, 2_000_000]),
    ("GroupReceipt", "receipts.0.process", [4, -1]),
    ("GroupReceipt", "receipts.0.step", [99]),
    ("GroupReceipt", "receipts.1.attempt", ["e0001-a02"]),
    ("GroupReceipt", "receipts.1.files.0.bytes", [-1, BIG]),
    ("GroupReceipt", "receipts.1.failure", [{"process": 4, "host": "h", "phase": "p", "cause": "c"}]),
    ("Receipt", "host", ["x" * 5000]),
    ("Receipt", "files", [[{"path": "a", "bytes": 1, "crc32c": "00c0ffee"}] * 2]),
    ("Receipt", "files.0.bytes", [-1, BIG]),
    ("Receipt", "files.0.crc32c", ["", "z" * 8]),
    ("Receipt", "files.0.crc32", ["0"]),
    (
        "Receipt",
        "boxes.w.0",
        [[[0], [2, 6]], [[-1, 0], [2, 6]], [[3, 0], [2, 6]], [[0, 0], [2, BIG]], [[0] * 65, [1] * 65]],
    ),
    ("Receipt", "places.w/c/0/0", [[-1, 0, 52, "00c0ffee"], [0, -1, 52, "00c0ffee"], [0, BIG, 52, "00c0ffee"]]),
    ("Receipt", "places.w/c/0/0", [[0, 0, 4, "00c0ffee"], [0, 0, BIG, "00c0ffee"], [0, 0, 52, "x"]]),
    ("Receipt", "small.k/c/0", ["", "AAAA", "!!!"]),
    ("Receipt", "seconds.write", [-1.0, 1e13]),
    ("Receipt", "prints", [{"w": [[[[0], [2]], "0", [0]]]}]),
    ("Receipt", "failure", [{"process": 4, "host": "h", "phase": "p", "cause": "c"}]),
    ("Manifest", "process_count", [0, 1, 3, 2_000_000]),
    ("Manifest", "hosts", [[], ["a"], ["a", "b", "c"]]),
    ("Manifest", "seconds", [[], [{}]]),
    ("Manifest", "seconds.0.write", [-1.0, 1e300]),
    ("Manifest", "files.0.bytes", [-1, BIG]),
    ("Manifest", "chunks.w/c/0/0", ["", "zz", "00c0ffee0"]),
    ("Manifest", "fingerprints.w", ["", "0" * 31, "x" * 32]),
    ("Extra", "step", [-1, 2**31]),
    ("Extra", "timestamp", [-1.0, 1e300]),
    ("Extra", "metrics.loss", ["x"]),
]
UNSAFE = [
    ("Head", "live.0.attempt", ["..", "e1-a1", "e0001-a01/../x", "", "e\u0660\u0660\u0660\u0661-a01"]),
    ("Receipt", "attempt", ["", "../x"]),
    *((kind, "files.0.path", ["", "/a", "../a", "a//b", "a/./b", "a\\b", "a\0"]) for kind in ("Receipt", "Manifest")),
]


def flat(table: list[tuple[str, str, list[Any]]]) -> list[Any]:
    return [
        pytest.param(kind, path, value, id=f"{kind}.{path}={str(value)[:40]!a}")
        for kind, path, values in table
        for value in values
    ]


@pytest.mark.parametrize("kind", GOOD)
def test_what_writers_write_is_good(kind: str) -> None:
    assert decode(encode(GOOD[kind]), type(GOOD[kind]), "here") == GOOD[kind]


@pytest.mark.parametrize(("kind", "path", "value"), flat(BAD))
def test_a_field_out_of_bounds_is_damage_that_says_where(kind: str, path: str, value: Any) -> None:
    with pytest.raises(Damaged, match=f"^run/key: not a {kind}: .*; not used$"):
        decode(changed(kind, path, value), type(GOOD[kind]), "run/key")


@pytest.mark.parametrize(("kind", "path", "value"), flat(UNSAFE))
def test_a_key_that_leaves_its_attempt_is_unsafe(kind: str, path: str, value: Any) -> None:
    with pytest.raises(UnsafeKey, match=r"^run/key: .*damaged"):
        decode(changed(kind, path, value), type(GOOD[kind]), "run/key")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_metrics_that_are_not_finite_are_words(word: str) -> None:
    live = msgspec.structs.replace(builders.live(1), stored_metrics={"loss": word})  # type: ignore[arg-type]
    validate.check(builders.head(live))


EXTERNAL = ExternalArray(item="params", driver="zarr3", ocdbt=True, name="a/b.c")


@pytest.mark.parametrize(
    ("external", "good"),
    [
        (EXTERNAL, True),
        (msgspec.structs.replace(EXTERNAL, item=""), True),
        *(
            (msgspec.structs.replace(EXTERNAL, driver=driver), driver == "zarr")
            for driver in ("zarr", "json", "n5", "")
        ),
        *(
            (msgspec.structs.replace(EXTERNAL, item=item), False)
            for item in ("..", "a/../..", "/etc", "|gs://x|", "a|b")
        ),
        *((msgspec.structs.replace(EXTERNAL, name=name), False) for name in ("..", "../x", "/etc", "a|b", "a\\b")),
    ],
    ids=str,
)
def test_an_external_array_lies_in_its_step(external: ExternalArray, good: bool) -> None:
    leaf = LeafSpec(path=("w",), kind="array", shape=(4,), dtype="float32", external=external)
    data = signed(json.loads(msgspec.json.encode(builders.intent(leaf))))
    if good:
        assert decode(data, Intent, "here").tree.leaves[0].external == external
    else:
        with pytest.raises(Damaged):
            decode(data, Intent, "here")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("Head", {"version": 8}),
        ("Intent", {"step": 101}),
        ("Intent", {"attempt": "e0001-a02"}),
        ("Receipt", {"process": 2}),
        ("GroupReceipt", {"process": 4}),
        ("GroupReceipt", {"number": 2}),
        ("Manifest", {"step": 4}),
        ("Extra", {"step": 4}),
    ],
    ids=str,
)
def test_a_record_that_belongs_elsewhere_is_not_used(kind: str, expected: dict[str, Any]) -> None:
    ((name, value),) = expected.items()
    said = getattr(GOOD[kind], name)
    with pytest.raises(Damaged, match=f"^run/key: says it is {name} {said}, expected {value}; it was copied"):
        decode(encode(GOOD[kind]), type(GOOD[kind]), "run/key", **expected)
    assert decode(encode(GOOD[kind]), type(GOOD[kind]), "run/key", **{name: said}) == GOOD[kind]


def test_an_attempt_is_live_or_retired_not_both() -> None:
    gone = RetiredAttempt(step=1, attempt=builders.FIRST, reason="retention")
    head = builders.head(builders.live(1), retired=(gone,))
    with pytest.raises(Damaged, match=r"step 1 e0001-a01 is in `live` and in `retired`"):
        decode(signed(json.loads(msgspec.json.encode(head))), Head, "here")


# JSON of all kinds.


ODD = {
    **{f"lists {depth} deep": b"[" * depth + b"]" * depth for depth in (600, 5000, 500_000)},
    **{f"objects {depth} deep": b'{"a":' * depth + b"1" + b"}" * depth for depth in (600, 5000)},
    **{"100,000 digits": b"9" * 100_000, "too large": b"1e999", "NaN": b"NaN", "not UTF-8": b'"\xff\xfe"'},
    **{"half a character": b'"\\ud800"', "cut": b"tru", "nothing": b""},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_json_is_damage_and_never_another_error(odd: bytes) -> None:
    body = encode(GOOD["Extra"]).rpartition(b',"crc32c":"')[0] + b"}"
    with pytest.raises(Damaged, match="here: not a Extra"):
        decode(signed_text(body.replace(b'"a":[', b'"q":' + odd + b',"a":[', 1)), Extra, "here")


def test_a_record_that_does_not_fit_into_memory_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be whole: nothing is quarantined for it."""

    def full(record: Record) -> None:
        raise MemoryError

    monkeypatch.setattr(validate, "check", full)
    with pytest.raises(Unavailable, match=r"here: \d+ bytes: no memory left"):
        decode(signed({"format": 1, **json.loads(msgspec.json.encode(GOOD["Extra"]))}), Extra, "here")


def test_a_record_of_more_than_a_gibibyte_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(GOOD["Extra"])
    monkeypatch.setattr(codec, "RECORD_BYTES_MAX", 10)
    with pytest.raises(Damaged, match="expected at most 10"):
        decode(data, Extra, "here")


# Invariant 11: encode, decode, then create.


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            builders.head(msgspec.structs.replace(builders.live(1), stored_metrics={"loss": math.nan})),
            "JSON has no way",
        ),
        (
            builders.head(msgspec.structs.replace(builders.live(1), stored_metrics={"loss": math.inf})),
            "JSON has no way",
        ),
        (builders.head(builders.live(1), builders.live(1)), "live: step 1 twice"),
        (builders.head(builders.live(-1)), "step is -1"),
        (builders.head(version=-1), "version is -1"),
        (builders.intent(builders.leaf(dtype="object")), "dtype 'object'"),
        (builders.intent(builders.leaf("a"), builders.leaf("a")), "would both be stored as 'a'"),
        (builders.receipt(-1), "process is -1"),
        (msgspec.structs.replace(GOOD["Extra"], stored_extra={"best": math.inf}), "JSON has no way to say all of it"),
        (msgspec.structs.replace(GOOD["Extra"], stored_extra={"best": [1, {"x": math.nan}]}), "JSON has no way"),
        (msgspec.structs.replace(GOOD["Extra"], stored_extra={"o": object()}), "Encoding objects of type object"),
        (msgspec.structs.replace(GOOD["Extra"], stored_extra={"s": "\ud800"}), "surrogates"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_record_that_its_reader_would_reject_is_never_encoded(record: Record, said: str) -> None:
    kind = type(record).__name__
    with pytest.raises(UsageError, match=f"this {kind} could not be read again, so it is not written: .*{said}"):
        encode(record)


def test_what_json_writes_in_another_way_is_the_same_to_it() -> None:
    extra = {"tuple": (1, 2.0), "numbers": {1: 2}, "whole": 1.0}
    record = msgspec.structs.replace(GOOD["Extra"], stored_extra=extra, stored_metrics={"loss": 1})
    assert decode(encode(record), Extra, "here").extra == {"tuple": [1, 2], "numbers": {"1": 2}, "whole": 1}


# Tree and manifest.


def listed(*leaves: LeafSpec, state_bytes: int = 1000, chunks: int = 0, **more: Any) -> tuple[Intent, Manifest]:
    names = ("state/d/x", "state/manifest.ocdbt")
    files = tuple(FileEntry(path=name, bytes=state_bytes // 2, crc32c="00c0ffee") for name in names)
    manifest = msgspec.structs.replace(
        GOOD["Manifest"], files=files, chunks={f"{number}": "00c0ffee" for number in range(chunks)}, **more
    )
    assert isinstance(manifest, Manifest)
    return builders.intent(*leaves, processes=2), manifest


def array(*shape: int, chunk: tuple[int, ...] | None = None, **more: Any) -> LeafSpec:
    return LeafSpec(path=("w",), kind="array", shape=shape, dtype="float32", chunk=chunk, **more)


ONE = LeafSpec(path=("n",), kind="int", value="1")
FITS = {
    "all of it": listed(array(16, chunk=(4,)), chunks=4),
    "with a number": listed(array(16, chunk=(4,)), ONE, chunks=5),
    "a number that no chunk is of": listed(array(16, chunk=(4,)), ONE, chunks=4),
    "as much as the files hold": listed(array(250, chunk=(250,)), chunks=1),
    "compressed": listed(array(100_000), chunks=3),
    "no elements": listed(array(0, 2**40)),
    "before manifests had chunks": listed(array(16, chunk=(4,))),
}
FITS_NOT = {
    "more chunks than the manifest": (listed(array(16, chunk=(4,)), chunks=3), "arrays of 4 chunks"),
    "fewer chunks than the manifest": (listed(array(16, chunk=(4,)), chunks=5), "the manifest has 5 chunks"),
    "more bytes than the files": (listed(array(251, chunk=(251,)), chunks=1), "arrays of 1004 bytes"),
    "more than compression could": (listed(array(10**9), chunks=3), "4000000000 bytes, out of 1000"),
    "of other processes": (listed(array(16, chunk=(4,)), process_count=3), "process_count is 2, expected 3"),
    "an external array of no file": (
        listed(array(4, external=msgspec.structs.replace(EXTERNAL, item="elsewhere"))),
        "the manifest lists no files",
    ),
    "an external folder of no file": (
        listed(array(4, external=msgspec.structs.replace(EXTERNAL, ocdbt=False, item="%2e%2e"))),
        "the manifest lists no files",
    ),
}


@pytest.mark.parametrize("case", FITS.values(), ids=FITS)
def test_a_tree_that_fits_its_files(case: tuple[Intent, Manifest]) -> None:
    validate.fits(*case)


@pytest.mark.parametrize("case", FITS_NOT.values(), ids=FITS_NOT)
def test_a_tree_that_does_not_fit_its_files(case: tuple[tuple[Intent, Manifest], str]) -> None:
    (intent, manifest), said = case
    with pytest.raises(validate.Invalid, match=said):
        validate.fits(intent, manifest)


def test_an_array_needs_a_store_that_the_manifest_lists() -> None:
    intent, manifest = listed(array(16, chunk=(4,)), chunks=4)
    files = tuple(entry for entry in manifest.files if not entry.path.endswith("ocdbt"))
    with pytest.raises(validate.Invalid, match="is in an array store, and the manifest lists none"):
        validate.fits(intent, msgspec.structs.replace(manifest, files=files))


@pytest.mark.parametrize(
    ("paths", "clash"),
    [
        ([("a",), ("b",)], ""),
        ([("a", "b"), ("a", "c"), ("ab",)], ""),
        ([()], ""),
        ([("a",), ("a",)], "would both be stored as 'a'"),
        ([("a.b",), ("a", "b")], "would both be stored as 'a.b'"),
        ([("a/c",), ("a",)], "would be stored inside a"),
        ([("a/b/c/d",), ("a/b",)], "would be stored inside a/b"),
        ([("a",), ("a", "x")], "a is a leaf, and has leaves below it"),
        ([("a",), ("a", "x", "y", "z")], "a is a leaf, and has leaves below it"),
        ([(), ("a",)], r"\(root\) is a leaf"),
    ],
    ids=str,
)
def test_each_leaf_has_a_place_of_its_own(paths: list[tuple[str, ...]], clash: str) -> None:
    found = validate.name_clash([LeafSpec(path=path, kind="none") for path in paths])
    assert (found == "") == (clash == "")
    if clash:
        with pytest.raises(Damaged, match=clash):
            data = signed(json.loads(msgspec.json.encode(builders.intent())))
            tree = TreeSpec(leaves=tuple(LeafSpec(path=path, kind="none") for path in paths))
            data = signed({**json.loads(data), "tree": json.loads(msgspec.json.encode(tree))})
            decode(data, Intent, "here")


def test_every_kind_of_record_that_is_stored_has_a_rule() -> None:
    assert set(validate._RULES) == {Head, Intent, Receipt, GroupReceipt, Manifest, Extra, Placement}
