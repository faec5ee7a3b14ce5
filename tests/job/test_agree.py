"""How a process learns who holds the leaves of a state that is new to it: from process 0, bounded, and by name."""

from __future__ import annotations

import jax.numpy as jnp
import msgspec
import pytest
from msgspec import structs

from orchestrator.arrays.tree import flatten
from orchestrator.errors import UsageError, WaitTimeout
from orchestrator.job.agree import Agreement
from orchestrator.rules import holders
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.keys import INTENT
from orchestrator.rules.records import Held, Json
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import MemoryStorage
from tests.support import builders

HELD = (Held(1, ((1, 2),)), Held(1, None))
FLAT = flatten({"a": jnp.arange(3), "b": 7})
SIGNALS = "run/1/a/"


class Signals:
    """A rendezvous that only carries signals, as process `process` of two sees it."""

    count = 2

    def __init__(self, process: int, **posted: str) -> None:
        self.process, self.hosts = process, {0: "host-0", 1: "host-1"}
        self.posted = {f"{SIGNALS}{key}/0": value for key, value in posted.items()}
        self.polls = 0

    def broadcast(self, name: str, value: Json, timeout_s: float) -> Json:
        raise AssertionError("a collective")

    def gather(self, name: str, value: Json, timeout_s: float) -> list[Json]:
        raise AssertionError("a collective")

    def preempted(self, step: int) -> bool:
        return False

    def post(self, key: str, value: str) -> None:
        self.posted[key] = value

    def forget(self, prefix: str) -> None:
        raise AssertionError("not this one's")

    def poll(self, prefix: str) -> dict[str, str]:
        self.polls += 1
        return {key.removeprefix(prefix): value for key, value in self.posted.items() if key.startswith(prefix)}


def agreement(signals: Signals, timeout_s: float = 20.0, together: bool = True) -> tuple[Agreement, Catalog]:
    catalog = Catalog(MemoryStorage(), "test")
    return Agreement(catalog, signals, timeout_s, together=together), catalog


def settle(agreed: Agreement, apart: str = "") -> tuple[Held, ...]:
    return agreed.settle(FLAT, AttemptId(1, builders.FIRST), SIGNALS, lambda: ("aborted", apart) if apart else None)


def test_an_account_that_is_known_costs_no_message_until_a_save_fails() -> None:
    signals = Signals(1, held=msgspec.json.encode(HELD).decode())
    agreed, _ = agreement(signals)
    assert settle(agreed) == HELD
    asked = signals.polls
    assert settle(agreed) == HELD and signals.polls == asked
    agreed.doubt()
    assert settle(agreed) == HELD and signals.polls > asked


def test_process_0_posts_its_account_with_each_attempt_and_has_it_in_the_intent() -> None:
    signals = Signals(0)
    agreed, _ = agreement(signals)
    assert settle(agreed) == agreed.account(FLAT) == (Held(2, None),)
    assert signals.posted == {f"{SIGNALS}held/0": "[[2,null,null]]"}


def test_a_job_of_one_process_needs_none() -> None:
    agreed, _ = agreement(Signals(0), together=False)
    assert settle(agreed) == agreed.account(FLAT) == ()
    assert holders.name(()) == ""


def test_a_signal_that_is_lost_is_found_in_the_intent() -> None:
    agreed, catalog = agreement(Signals(1))
    intent = builders.intent(builders.leaf("a"), builders.leaf("b"), processes=2, step=1)
    body = encode(structs.replace(intent, held=HELD))
    catalog.storage.create(AttemptId(1, builders.FIRST).key(INTENT), body)
    assert settle(agreed) == HELD


@pytest.mark.parametrize(
    ("signals", "timeout_s", "apart", "error", "said"),
    [
        ({"decision": "{aborted}"}, 20.0, "", UsageError, r"process 0 \(host-0\) has decided without this process: "),
        ({}, 20.0, "process 0 saves step 5", UsageError, "process 0 saves step 5"),
        ({}, 0.05, "", WaitTimeout, r"step 1 .*: process 0 \(host-0\) did not say within 0.05 s who holds the leaves"),
    ],
)
def test_a_process_does_not_wait_for_an_account_that_will_not_come(
    signals: dict[str, str], timeout_s: float, apart: str, error: type[Exception], said: str
) -> None:
    agreed, _ = agreement(Signals(1, **signals), timeout_s)
    with pytest.raises(error, match=said):
        settle(agreed, apart)
