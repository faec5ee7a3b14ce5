"""Stored runs changed by accident and by forgery: what reading them may end in. `make chaos` plays more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.proof.forged import CASES
from tests.proof.fuzz import ALLOWED, AS_SIGNED, CLEAR, OLDER, RIGHT, RUNS, Case, Outcome, drawn, report
from tests.support.images import Image

MUTATIONS = 600
# Forged and harmless: what was changed is not read by a restore, or says nothing that a reader relies on.
HARMLESS = {
    *("an unknown key implementation", "no chunks", "large metrics", "members twice", "a chunk that is not listed"),
    *("a receipt of odd files", "a receipt of odd chunks", "a receipt of another process", "a receipt of another step"),
    "an event of 200,000 steps",
    *(case.name for case in CASES if case.name.startswith("sharding ")),
}
# Bytes that were saved, under another name or type: whoever can sign a step may say so.
RELABELLED = {"dtype 'uint16'", "shape [32, 128] in chunks [32, 128]", "a path of slashes"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """In processes of their own: the children of one that has used JAX could hang."""
    file = tmp_path_factory.mktemp("fuzz") / "outcomes.jsonl"
    command = [sys.executable, "-m", "tests.proof.fuzz", f"--mutations={MUTATIONS}", "--seed=1", f"--outcomes={file}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert file.exists(), done.stdout + done.stderr
    found = [Outcome(**json.loads(line)) for line in file.read_text().splitlines()]
    assert (done.returncode == 0) == all(one.good for one in found)
    return found


@pytest.mark.slow
def test_a_mutated_run_ends_in_a_right_value_or_a_clear_error(outcomes: list[Outcome]) -> None:
    found = [one for one in outcomes if one.case.startswith("mutation ")]
    assert len(found) == MUTATIONS
    assert [one for one in found if not one.good] == []
    # Each must occur, or the campaign would not show much. How often depends on names that are drawn anew each time.
    for run in RUNS:
        mine = [one.outcome for one in found if one.run == run]
        assert min(mine.count(RIGHT), mine.count(OLDER), mine.count(CLEAR)) > 0, run
    assert all(one.forged for one in found if one.outcome == AS_SIGNED)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} ({case.run})")
def test_a_forged_run_by_name(case: Case, outcomes: list[Outcome]) -> None:
    (found,) = [one for one in outcomes if (one.case, one.run) == (case.name, case.run)]
    allowed = {RIGHT} if case.name in HARMLESS else {AS_SIGNED} if case.name in RELABELLED else {OLDER, CLEAR}
    assert found.outcome in allowed, found
    assert found.peak_mb < 6000


# The judge itself.


def test_a_seed_draws_the_same_mutation_again() -> None:
    files = {
        "journal/00000000000000000003.json": b'{"live":[{"step":3,"attempt":"e0001-a01"}],"crc32c":"00000000"}\n',
        "steps/00000003/e0001-a01/manifest.json": b'{"files":[{"path":"a","bytes":1}],"crc32c":"00000000"}\n',
        "steps/00000002/e0001-a01/manifest.json": b'{"files":[{"path":"b","bytes":2}],"crc32c":"00000000"}\n',
    }
    for seed in range(100, 140, 2):  # accidents: a forger needs the records of a run
        one, again = Image(files), Image(files)
        assert drawn(seed).change(one) == drawn(seed).change(again)
        assert one.changed == again.changed


def test_the_report_names_what_was_wrong() -> None:
    good = Outcome("mutation 1", "plain", False, "bits flipped x", RIGHT, "", 0.1, 200)
    bad = Outcome("mutation 2", "plain", True, "intent.json: w", "WRONG VALUE", "step 3: w", 0.2, 300)
    table = report([good, bad], [], 7)
    assert "2 mutations with seed 7; 1 ended in anything else." in table
    assert "- plain, mutation 2: intent.json: w: WRONG VALUE: step 3: w" in table
    assert good.good and not bad.good and RIGHT in ALLOWED
