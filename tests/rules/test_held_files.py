"""Which files of a step are where: as numbers, in few digits, whoever has sent them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.rules import held_files
from orchestrator.rules.held_files import numbers, spans, spread, writer_of
from orchestrator.rules.records import FORMAT, FileEntry, Manifest

FILES = tuple(FileEntry(path=f"state/{name}", bytes=1, crc32c="0" * 8) for name in "abc")
MANIFEST = Manifest(
    format=FORMAT, write_id="x", step=1, attempt="e0001-a01", process_count=1, files=FILES, hosts=(), seconds=()
)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [((), ""), ((0,), "0"), ((0, 1, 2), "0-2"), ((5, 0, 2, 1, 9), "0-2,5,9"), (range(3, 4000), "3-3999")],
)
def test_numbers_are_told_in_few_digits(chosen: range, text: str) -> None:
    assert spans(chosen) == text and numbers(text, 4000) == frozenset(chosen)


@given(st.sets(st.integers(0, 300)))
def test_what_is_told_is_what_is_heard(chosen: set[int]) -> None:
    assert numbers(spans(chosen), 301) == chosen


@given(st.text(alphabet="0123456789-, x\u0663", max_size=30), st.integers(0, 50))
def test_whatever_another_process_sends_names_files_of_the_step_alone(text: str, count: int) -> None:
    assert all(0 <= number < count for number in numbers(text, count))


@pytest.mark.parametrize(
    ("had", "lacks"),
    [
        ([{0, 1, 2, 3}], ""),
        ([{0, 1}, {2}, {3}], ""),
        ([{0, 1, 2, 3}, {0}], ""),
        ([{1, 2, 3}], "manifest.json"),
        ([{0, 1}, {3}], "state/b"),
        ([], "manifest.json"),
    ],
)
def test_a_step_is_whole_if_each_file_is_somewhere(had: list[set[int]], lacks: str) -> None:
    assert held_files.lacking(MANIFEST, had) == lacks


@given(st.lists(st.integers(), unique=True, max_size=6), st.integers(0, 100))
def test_readers_ask_the_same_holders_and_do_not_all_begin_with_one(holders: list[int], reader: int) -> None:
    assert sorted(spread(holders, reader)) == sorted(holders)
    firsts = {spread(holders, one)[0] for one in range(len(holders))} if holders else set()
    assert firsts == set(holders)


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("state/ocdbt.process_12/d/0a", 12),
        ("receipts/00003.json", 3),
        ("receipts/group-00008-01.json", 8),
        ("process/00002.bin", 2),
        ("intent.json", 0),
        ("state/d/0a", 0),
    ],
)
def test_a_file_is_of_the_process_that_its_name_says(name: str, process: int) -> None:
    assert writer_of(name) == process
