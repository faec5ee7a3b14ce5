"""Deleting what the journal calls dead: nothing is deleted because of an entry that could vanish."""

from __future__ import annotations

from pathlib import Path

from orchestrator.rules import keys
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from tests.support.fakes import HookedStorage
from tests.support.runs import two_steps


def test_a_collector_makes_the_entry_that_retires_durable_before_it_deletes(tmp_path: Path) -> None:
    storage = HookedStorage(two_steps(tmp_path).storage)
    assert collect(JournalStore(storage, "gc")).files == 1
    operations = [call for call in storage.calls if call[0] in ("make_durable", "delete")]
    assert operations[0] == ("make_durable", keys.journal_key(2))
    assert [operation for operation, _ in operations[1:]] == ["delete"]


def test_a_dry_run_of_a_collector_needs_no_right_to_write(tmp_path: Path) -> None:
    storage = HookedStorage(two_steps(tmp_path).storage)
    assert collect(JournalStore(storage, "gc"), dry_run=True).files == 1
    assert {operation for operation, _ in storage.calls} <= {"get", "list"}
