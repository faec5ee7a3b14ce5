"""Deleting what the journal calls dead: nothing is deleted because of an entry that could vanish."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from orchestrator.rules import journal, keys
from orchestrator.run.deletion import BackgroundDeletion, collect
from orchestrator.run.journal_store import JournalStore
from tests.support.fakes import FailOnce, HookedStorage
from tests.support.runs import journal_of, two_steps


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


# In the background.


class Held:
    """A hook that holds the first delete until it is let pass."""

    def __init__(self) -> None:
        self.reached, self.passing = threading.Event(), threading.Event()

    def __call__(self, operation: str, key: str) -> None:
        if operation == "delete":
            self.reached.set()
            assert self.passing.wait(30)


def test_in_the_background_one_deletion_runs_at_a_time_and_is_waited_for_only_so_long(tmp_path: Path) -> None:
    held = Held()
    storage = HookedStorage(two_steps(tmp_path).storage, before=held)
    deletion = BackgroundDeletion(JournalStore(storage, "gc"))
    deletion.start(1)
    assert held.reached.wait(30)
    deletion.start(1)  # nothing: one is under way
    deletion.wait(0.0)
    assert [thread.name for thread in threading.enumerate()].count("collect") == 1
    held.passing.set()
    deletion.wait(30)
    assert journal_of(tmp_path)[-1].retired == ()


def test_in_the_background_none_is_begun_once_it_is_stopped(tmp_path: Path) -> None:
    storage = HookedStorage(two_steps(tmp_path).storage)
    deletion = BackgroundDeletion(JournalStore(storage, "gc"))
    deletion.stop()
    deletion.start(1)
    deletion.wait(30)
    assert storage.calls == [] and len(journal_of(tmp_path)[-1].retired) == 1


def test_in_the_background_what_failed_is_logged_and_done_the_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = HookedStorage(two_steps(tmp_path).storage, before=FailOnce("delete", ""))
    deletion = BackgroundDeletion(JournalStore(storage, "gc"))
    for _ in range(2):
        deletion.start(1)
        deletion.wait(30)
    assert "ENOSPC" in caplog.text and journal_of(tmp_path)[-1].retired == ()


def test_in_the_background_a_fenced_incarnation_deletes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = two_steps(tmp_path)
    store.append(journal.open_epoch)
    deletion = BackgroundDeletion(store)
    deletion.start(1)
    deletion.wait(30)
    assert "epoch 1 is fenced by epoch 2" in caplog.text and len(journal_of(tmp_path)[-1].retired) == 1
