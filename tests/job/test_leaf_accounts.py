"""How a process learns who holds the leaves of a state that is new to it: from process 0, bounded, and by name."""

from __future__ import annotations

import jax.numpy as jnp
import pytest
from msgspec import structs

from orchestrator.arrays.tree import flatten
from orchestrator.errors import UsageError, WaitTimeout
from orchestrator.job.leaf_accounts import LeafAccounts
from orchestrator.job.outcome import Aborted
from orchestrator.job.signals import Signals
from orchestrator.rules import holders
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import Held
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import MemoryStorage
from tests.support import builders
from tests.support.fakes import FakeBoard

HELD = (Held(1, ((1, 2),)), Held(1, None))
FLAT = flatten({"a": jnp.arange(3), "b": 7})
ATTEMPT = AttemptId(1, builders.FIRST)


def leaf_accounts(
    board: FakeBoard, timeout_s: float = 20.0, together: bool = True
) -> tuple[LeafAccounts, JournalStore]:
    store = JournalStore(MemoryStorage(), "test")
    return LeafAccounts(store, board, Signals(board, "i"), timeout_s, together=together), store


def obtain(accounts: LeafAccounts, other_step: str = "") -> tuple[Held, ...]:
    return accounts.obtain(FLAT, ATTEMPT, lambda: Aborted(other_step) if other_step else None)


def test_an_account_that_is_known_costs_no_message_until_a_save_fails() -> None:
    board = FakeBoard(1, 2)
    Signals(board, "i").post_held(ATTEMPT, HELD)
    accounts, _ = leaf_accounts(board)
    assert obtain(accounts) == HELD
    asked = board.polls
    assert obtain(accounts) == HELD and board.polls == asked
    accounts.forget()
    assert obtain(accounts) == HELD and board.polls > asked


def test_process_0_posts_its_account_with_each_attempt_and_has_it_in_the_intent() -> None:
    board = FakeBoard(0, 2)
    accounts, _ = leaf_accounts(board)
    assert obtain(accounts) == accounts.account(FLAT) == (Held(2, None),)
    assert Signals(board, "i").held(ATTEMPT) == (Held(2, None),)


def test_a_job_of_one_process_needs_none() -> None:
    accounts, _ = leaf_accounts(FakeBoard(0, 2), together=False)
    assert obtain(accounts) == accounts.account(FLAT) == ()
    assert holders.name(()) == ""


def test_a_signal_that_is_lost_is_found_in_the_intent() -> None:
    accounts, store = leaf_accounts(FakeBoard(1, 2))
    intent = builders.intent(builders.leaf("a"), builders.leaf("b"), processes=2, step=1)
    body = encode(structs.replace(intent, held=HELD))
    store.storage.create(ATTEMPT.intent_key, body)
    assert obtain(accounts) == HELD


@pytest.mark.parametrize(
    ("decision", "timeout_s", "other_step", "error", "expected"),
    [
        (Aborted("no"), 20.0, "", UsageError, r"process 0 \(host-0\) has decided without this process: .*no"),
        (None, 20.0, "process 0 saves step 5", UsageError, "process 0 saves step 5"),
        (
            None,
            0.05,
            "",
            WaitTimeout,
            r"step 1 .*: process 0 \(host-0\) did not say within 0.05 s who holds the leaves",
        ),
    ],
)
def test_a_process_does_not_wait_for_an_account_that_will_not_come(
    decision: Aborted | None, timeout_s: float, other_step: str, error: type[Exception], expected: str
) -> None:
    board = FakeBoard(1, 2)
    if decision:
        Signals(board, "i").post_decision(ATTEMPT, decision)
    accounts, _ = leaf_accounts(board, timeout_s)
    with pytest.raises(error, match=expected):
        obtain(accounts, other_step)
