"""Every key of a run: what is built can be parsed, and what comes from storage is not trusted."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from orchestrator.errors import Damaged, UnsafeKey
from orchestrator.rules import keys

NUMBERS = st.integers(0, 10**9)


def test_keys_look_as_the_on_disk_contract_says() -> None:
    assert keys.journal_key(42) == "journal/00000000000000000042.json"
    assert keys.receipt_name(3) == "receipts/00003.json"
    assert keys.process_state_name(3) == "process/00003.bin"


@given(NUMBERS)
def test_what_is_built_is_parsed_back(first: int) -> None:
    assert keys.journal_version(keys.journal_key(first)) == first
    assert keys.process_of(keys.receipt_name(first)) == first
    assert keys.process_of(keys.process_state_name(first)) == first


@given(st.lists(st.integers(0, 10**12), min_size=2))
def test_journal_keys_sort_as_their_versions_do(versions: list[int]) -> None:
    assert sorted(map(keys.journal_key, versions)) == [keys.journal_key(version) for version in sorted(versions)]


@pytest.mark.parametrize(
    "key",
    [
        "journal/42.json",
        "journal/00000000000000000042.json~",
        "journal/00000000000000000042.json.tmp",
        "journal/000000000000000000042.json",
        "journal/x/00000000000000000042.json",
        "journal/-0000000000000000042.json",
        "old/journal/00000000000000000042.json",
        "journal/",
        "",
    ],
)
def test_a_stray_file_in_the_journal_is_not_an_entry(key: str) -> None:
    assert keys.journal_version(key) is None


HOSTILE = ["", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "a//b", "a/", "./a", "a/./b", "a\\b", "a\0b"]


@pytest.mark.parametrize("key", HOSTILE)
def test_a_key_that_could_leave_its_attempt_is_rejected_and_the_record_is_named(key: str) -> None:
    with pytest.raises(UnsafeKey) as caught:
        keys.check_key(key, "run/manifest.json")
    assert str(caught.value).startswith("run/manifest.json: key ")
    assert isinstance(caught.value, Damaged)  # exit code 4, and restore steps down


@pytest.mark.parametrize("key", ["a", "a/b/c", "state/ocdbt.process_0/d/0f", "..a", "a..", ".hidden", "ü/ b"])
def test_plain_relative_keys_pass_unchanged(key: str) -> None:
    assert keys.check_key(key, "here") == key


@given(st.text(alphabet="a./\\", max_size=8))
def test_no_key_that_passes_leaves_its_prefix(key: str) -> None:
    try:
        keys.check_key(key, "here")
    except UnsafeKey:
        return
    depth = 0
    for part in key.split("/"):
        assume(part)
        depth += -1 if part == ".." else part != "."
        assert depth > 0


@pytest.mark.parametrize(
    "name",
    [
        *("process/3.bin", "process/000003.bin", "process/00003.json", "process/00003.bin.tmp", "process/x/00003.bin"),
        *(
            "process/-0003.bin",
            "process/-0001.bin",
            "receipts/-0001.json",
            "process/\u0661\u0661\u0661\u0661\u0661.bin",
            "receipts/00003.json\n",
            "00003.bin",
            "",
        ),
    ],
)
def test_a_process_is_not_read_out_of_a_name_that_nobody_builds(name: str) -> None:
    with pytest.raises(UnsafeKey):
        keys.process_of(name)
