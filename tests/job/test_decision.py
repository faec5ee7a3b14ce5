"""How a process other than 0 learns how an attempt ended: by signal, from a durable journal, or not in time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import WaitTimeout
from orchestrator.job.decision import DecisionReader
from orchestrator.job.outcome import Aborted, Committed, Fenced, Outcome
from orchestrator.job.signals import Signals
from orchestrator.rules import journal, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Cause
from orchestrator.run.journal_store import JournalStore
from tests.support.builders import FIRST
from tests.support.fakes import FakeBoard, HookedStorage, StepClock
from tests.support.runs import two_steps


def test_a_commit_found_in_the_journal_counts_only_once_it_is_durable(tmp_path: Path) -> None:
    storage = HookedStorage(two_steps(tmp_path).storage)
    board = FakeBoard(1, 2)
    reader = DecisionReader(AttemptId(2, FIRST), 1, JournalStore(storage, "w"), Signals(board, "i"), board.hosts)
    assert reader.wait(20.0, lambda: None) == Committed()  # no signal comes: from storage
    assert ("make_durable", keys.journal_key(2)) in storage.calls


@pytest.mark.parametrize(
    ("attempt", "epoch", "outcome"),
    [
        (AttemptId(2, FIRST), 1, Committed()),
        (AttemptId(1, FIRST), 1, Aborted("journal version 2: aborted")),
        (AttemptId(3, FIRST), 1, None),
        (AttemptId(3, FIRST), 0, Fenced("fenced by epoch 1 (test)")),
        (AttemptId(2, FIRST), 0, Committed()),  # another incarnation has opened its epoch since
    ],
)
def test_what_the_journal_says_of_an_attempt(
    attempt: AttemptId, epoch: int, outcome: Outcome | None, tmp_path: Path
) -> None:
    board = FakeBoard(1, 2)
    reader = DecisionReader(attempt, epoch, two_steps(tmp_path), Signals(board, "i"), board.hosts)
    assert reader.journalled() == outcome


def test_a_decision_that_does_not_come_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    board, clock = FakeBoard(1, 2), StepClock()
    reader = DecisionReader(AttemptId(3, FIRST), 1, two_steps(tmp_path), Signals(board, "i"), board.hosts, clock.clock)
    with pytest.raises(WaitTimeout, match=r"no decision from the coordinator, process 0 \(host-0\), after 7 s"):
        reader.wait(7.0, lambda: None)
    assert sum(clock.slept) == pytest.approx(7.0)


def test_the_journal_keeps_the_cause_of_an_abort_beyond_its_entry(tmp_path: Path) -> None:
    store, board = two_steps(tmp_path), FakeBoard(1, 2)
    for step, cause in ((3, Cause.SILENT), (4, Cause.INCOMPLETE)):
        why: dict[str, Any] = {"failures": (), "reason": f"it was {cause}", "cause": cause}
        store.append(partial(journal.abort, epoch=1, attempt=AttemptId(step, FIRST), **why))
    readers = [DecisionReader(AttemptId(step, FIRST), 1, store, Signals(board, "i"), board.hosts) for step in (3, 4)]
    assert [reader.journalled() for reader in readers] == [
        Aborted("journal version 4: aborted", Cause.SILENT),  # its words went with its entry
        Aborted("journal version 4: it was incomplete", Cause.INCOMPLETE),
    ]
