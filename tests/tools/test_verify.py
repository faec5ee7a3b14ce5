"""Reading back and comparing: what `verify` and `diff` find, say and record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import orchestrator as oc
from orchestrator.errors import StorageError
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.tools import verify
from orchestrator.tools.diff import Side, compare
from tests.support.commands import orchestrator
from tests.support.damage import flip
from tests.support.fakes import HookedStorage
from tests.support.runs import journal_of, now, store_of
from tests.support.snapshots import snapshot


def big(step: int) -> Any:
    """20 chunks of 4 MiB in one array, and small leaves of several kinds."""
    noise = np.random.default_rng(step).integers(0, 256, (20, 4 << 20), np.uint8)
    return {"w": jnp.asarray(noise), "b": jnp.arange(4.0) + step, "n": np.arange(3), "lr": 0.5, "name": "run"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify") / "run"
    with oc.Agent(root, options=now(attest="save")) as agent:
        agent.save(1, big(1))
    return root


@pytest.fixture
def run(saved: Path, root: Path) -> Path:
    import shutil

    shutil.copytree(saved, root)
    return root


def data_file(root: Path) -> Path:
    return max(root.rglob("d/*"), key=lambda path: path.stat().st_size)


def said(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_damage_is_named_by_file_array_region_and_host_and_quarantined(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = data_file(run)
    flip(broken)
    assert orchestrator("verify", run) == 4
    header, file, chunk = capsys.readouterr().out.splitlines()
    assert "step 1 e0001-a01: damaged" in header
    assert broken.name in file and "the manifest says" in file
    assert ("w[" in chunk and ",0:4194304] of process 0 (" in chunk and "crc32c" in chunk) or "damaged" in chunk
    event = journal_of(run)[-1].event
    assert (event.kind, event.step) == ("quarantined", 1) and event.reason.startswith("verify: file://")


def test_never_repairing_the_journal_changes_nothing(run: Path) -> None:
    before = snapshot(run)
    assert orchestrator("verify", run, "--repair_journal=never") == 0
    assert snapshot(run) == before
    flip(data_file(run))
    before = snapshot(run)
    assert orchestrator("verify", run, "--repair_journal=never") == 4
    assert snapshot(run) == before


def test_a_sample_reads_its_share_and_marks_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(run)
    assert orchestrator("verify", run, "--sample=25%", "--json") == 0
    (one,) = said(capsys)
    assert (one["chunks"], one["sample"]) == (6, 0.25)  # of 22, rounded up
    assert snapshot(run) == before
    read: list[int] = []
    store = store_of(run)
    step = store.find(1)
    assert step is not None
    verify.read_back(store, step, sample=0.25, on_bytes=read.append)
    assert sum(read) < 0.4 * step.bytes
    flip(data_file(run))
    found = [verify.read_back(store, step, sample=0.5, seed=seed).damaged for seed in range(8)]
    assert any(found) and not all(found)  # one of 22 chunks: some samples hold it
    (run / "steps/00000001/e0001-a01/extra.json").write_text("{}")
    assert verify.read_back(store, step, sample=0.01).damaged  # records and sizes are no matter of chance


@pytest.mark.parametrize("text", ["0%", "101%", "x", "-1", ""])
def test_a_wrong_sample_is_a_usage_error(run: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert orchestrator("verify", run, f"--sample={text}") == 2
    assert "expected a share such as 10%" in capsys.readouterr().err
    assert orchestrator("verify", run, "--repair_journal=maybe") == 2


def test_a_store_that_fails_says_nothing_about_the_data(run: Path) -> None:
    def reject(operation: str, key: str) -> None:
        if operation == "get" and key.endswith("extra.json"):
            raise StorageError(f"{operation} {key}: EIO (Input/output error)")

    store = JournalStore(HookedStorage(PosixStorage(str(run)), before=reject), "test")
    step = store.find(1)
    assert step is not None
    verdict = verify.read_back(store, step)
    assert not verdict.good and not verdict.damaged and "EIO" in verdict.unread[0]
    before = snapshot(run)
    verify.record(store, step, verdict)
    assert snapshot(run) == before


@pytest.mark.parametrize("damaged", [False, True])
def test_a_verdict_that_cannot_be_journalled_is_said_all_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damaged: bool
) -> None:
    if damaged:
        flip(data_file(run))

    def read_only(self: PosixStorage, key: str, body: bytes) -> None:
        raise StorageError(f"create {key}: EROFS (Read-only file system)")

    before = snapshot(run)
    monkeypatch.setattr(PosixStorage, "create", read_only)
    assert orchestrator("verify", run) == (4 if damaged else 1)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert f"step 1 e0001-a01: {'damaged' if damaged else 'good'}" in first
    assert "not recorded in the journal: " in last and "EROFS" in last
    assert snapshot(run) == before


def test_verify_lifts_a_quarantine_that_it_disproves_but_not_a_persons(run: Path) -> None:
    broken = data_file(run)
    whole = broken.read_bytes()
    flip(broken)
    assert orchestrator("verify", run) == 4
    assert oc.open_run(run).all_steps() == []
    broken.write_bytes(whole)
    assert orchestrator("verify", run, "--all") == 0
    assert oc.open_run(run).all_steps() == [1]
    assert [head.event.kind for head in journal_of(run)[-2:]] == ["released", "verified"]
    assert orchestrator("quarantine", run, "--step=1", "--reason=loss spike", "--force") == 0
    assert orchestrator("verify", run, "--all") == 0
    assert oc.open_run(run).all_steps() == [], "somebody has decided it"
    assert orchestrator("release", run, "--step=1", "--reason=it was the data") == 0
    assert oc.open_run(run).all_steps() == [1]


def test_a_step_retired_while_it_was_read_is_not_quarantined(run: Path) -> None:
    store = store_of(run)
    step = store.find(1)
    assert step is not None
    with oc.Agent(run, options=now(), keep=oc.last(1)) as agent:
        agent.save(2, big(2))
    verdict = verify.read_back(store, step)
    assert "was retired while it was read; the newest is step 2" in verdict.retired
    assert not verdict.good and not verdict.damaged and not verdict.unread
    before = snapshot(run)
    verify.record(store, step, verdict)
    assert snapshot(run) == before


# Diff.


def pair(root: Path, *, attest: tuple[str, str], states: tuple[Any, Any]) -> list[Side]:
    for step, (kind, state) in enumerate(zip(attest, states, strict=True), 1):
        with oc.Agent(root, options=now(attest=kind, other_tree=True)) as agent:
            agent.save(step, state)
    store = store_of(root)
    lives = [store.find(step) for step in (1, 2)]
    return [Side(store, live) for live in lives if live is not None]


ONE = {
    "same": np.arange(4.0),
    "w": jnp.array([1.0, 2.0, jnp.nan]),
    "gone": np.zeros(2),
    "lr": 0.5,
    "typed": np.zeros(3),
}
TWO = {"same": np.arange(4.0), "w": jnp.array([1.0, 2.5, jnp.nan]), "new": np.zeros(2), "lr": 0.25, "typed": np.ones(2)}


@pytest.mark.parametrize("attest", [("off", "off"), ("save", "save"), ("save", "off")])
def test_differences_are_found_by_fingerprint_or_else_by_reading(root: Path, attest: tuple[str, str]) -> None:
    by = "fingerprint" if attest == ("save", "save") else "reading"
    read: list[int] = []
    sides = pair(root, attest=attest, states=(ONE, TWO))
    found = {one.leaf: one for one in compare(*sides, on_bytes=read.append)}
    assert {name: (one.state, one.by) for name, one in found.items()} == {
        "same": ("equal", by),
        "w": ("differs", by),
        "gone": ("only in a", "tree spec"),
        "new": ("only in b", "tree spec"),
        "lr": ("differs", "tree spec"),
        "typed": ("other type", "tree spec"),
    }
    assert (sum(read) == 0) == (by == "fingerprint")
    measured = {one.leaf: one for one in compare(*sides, measure=True)}["w"]
    assert (measured.elements, measured.largest, measured.by) == (1, 0.5, by)


def test_the_diff_of_two_runs_as_a_person_and_a_program_see_it(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    with oc.Agent(other, options=now()) as agent:
        agent.save(5, big(1))
        agent.save(6, {**big(1), "b": jnp.arange(4.0) + 3})
    assert orchestrator("diff", run, 1, 5, f"--other={other}") == 0
    assert capsys.readouterr().out == "0 of 5 leaves differ between step 1 and step 5\n"
    assert orchestrator("diff", run, 1, 6, f"--other={other}", "--max_difference") == 1
    header, row, counts = capsys.readouterr().out.splitlines()
    assert header.split() == ["leaf", "a", "b", "state", "found", "by", "elements", "largest"]
    assert row.split() == ["b", "f32[4]", "differs", "reading", "4", "2"]
    assert counts.startswith("1 of 5 leaves differ")
    assert orchestrator("diff", run, 1, 6, f"--other={other}", "--json") == 1
    told = said(capsys)
    assert (told["equal"], [one["leaf"] for one in told["differing"]]) == (4, ["b"])
    assert orchestrator("diff", run, 1) == 2 and orchestrator("diff", run, 1, "x") == 2
    assert orchestrator("diff", run, 1, 7) == 6


def test_not_a_number_and_other_payloads_differ_without_a_largest_difference(root: Path) -> None:
    nans = [np.array([word], np.uint32).view(np.float32) for word in (0x7FC00001, 0x7FC00002)]
    sides = pair(root, attest=("off", "off"), states=({"w": nans[0]}, {"w": nans[1]}))
    (one,) = compare(*sides, measure=True)
    assert one.state == "differs" and one.elements == 1 and np.isnan(one.largest)
