"""The layouts of `make test-adopt`, as the Orbax that is installed here writes them, and the program's table."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.proof import adopt_matrix, adopt_writer
from tests.proof.adopt_matrix import ADOPTED, REJECTED, Verdict

EXPECTED = {
    "lists, tuples, None, empty nodes, numbers": ADOPTED,
    "JSON in a file of another name": ADOPTED,
    "JSON alone": ADOPTED,
    "an array as item": ADOPTED,
    "JaxRandomKeySave, typed": ADOPTED,
    "JaxRandomKeySave, raw": ADOPTED,
    "NumpyRandomKeySave": REJECTED,
    "an item of an own handler": REJECTED,
    "one checkpoint, Standard": ADOPTED,
    "prefixes side by side, one chosen": ADOPTED,
    "prefixes side by side": REJECTED,
    "v1: save_checkpointables with JSON": ADOPTED,
}


@pytest.mark.parametrize(("layout", "expected"), EXPECTED.items(), ids=EXPECTED)
def test_a_directory_is_adopted_and_leaf_identical_or_rejected_and_unchanged(
    tmp_path: Path, layout: str, expected: str
) -> None:
    about = adopt_writer.LAYOUTS[layout](tmp_path / "theirs")
    verdict = adopt_matrix.judge(tmp_path / "theirs", about, tmp_path / "run")
    assert (verdict.word, verdict.wrong) == (expected, ""), verdict.why


@pytest.mark.parametrize("layout", ["JSON alone", "JaxRandomKeySave, typed", "an item of an own handler"])
def test_a_directory_in_a_bucket_has_the_same_outcome(tmp_path: Path, layout: str) -> None:
    about = adopt_writer.LAYOUTS[layout](tmp_path / "theirs")
    verdict = adopt_matrix.judge_in_store(tmp_path / "theirs", about)
    assert (verdict.word, verdict.wrong) == (EXPECTED[layout], ""), verdict.why


def test_another_value_than_was_saved_is_noticed(tmp_path: Path) -> None:
    about = adopt_writer.LAYOUTS["items: Standard, PyTree, JSON"](tmp_path / "theirs")
    about["steps"]["20"]["trees"]["ema"]["w"] = adopt_writer.digest(1)
    assert "step 20: arrays" in adopt_matrix.judge(tmp_path / "theirs", about, tmp_path / "run").wrong


def test_what_is_neither_adopted_nor_rejected_is_counted_and_shown() -> None:
    one = {"a": Verdict(ADOPTED), "b": Verdict(REJECTED, "x | y")}
    made = adopt_matrix.table({"1": one, "2": {"a": Verdict("", "", "z")}})
    assert made.startswith("3 directories: 1 adopted and leaf-identical, 1 rejected") and "changed, 1 neither" in made
    assert "| a | identical | **wrong**: z |" in made and "- b: x \\| y" in made


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system here")
def test_from_another_file_system_the_files_are_copied(tmp_path: Path) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        theirs = Path(other) / "theirs"
        if theirs.parent.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("no second file system here")
        about = adopt_writer.LAYOUTS["sharded on 4 x 2 devices"](theirs)
        verdict = adopt_matrix.judge(theirs, about, tmp_path / "run")
        assert (verdict.word, verdict.wrong) == (ADOPTED, ""), verdict.why
