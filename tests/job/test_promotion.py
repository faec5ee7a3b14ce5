"""Steps that are due for the store and for memory: staged once, held, and uploaded from there."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator import environment
from orchestrator.errors import StorageError, Unavailable
from orchestrator.job.persistence import GivenUp, Persistence
from orchestrator.observe import events
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.storage import PosixStorage, Storage
from tests.support.damage import flip, truncate
from tests.support.fakes import HookedStorage, StepClock, another_host
from tests.support.gcs import emulator, new_root
from tests.support.runs import LIKE, state, store_of
from tests.support.tiers import crash, held_dir, train

OUTCOMES = (events.SaveStarted, events.SaveCommitted, events.SaveNotCommitted, events.StepHeld, events.StepNotHeld)


@pytest.fixture
def seen() -> Iterator[list[Any]]:
    found: list[Any] = []
    stop = events.subscribe(lambda event: found.append(event) if isinstance(event, OUTCOMES) else None)
    yield found
    stop()


def agent(root: Path, *, storage: Storage | None = None, save: int = 1, every: int = 1, **more: Any) -> oc.Agent:
    """By default each step is due for both."""
    place = root.parent / "tier"
    place.mkdir(exist_ok=True)
    tier = {name: more.pop(name) for name in ("keep", "bytes_max") if name in more}
    tiers, options = [oc.memory(every=every, directory=place, **tier)], oc.Options(**more)
    return oc.Agent(root, save=oc.every(save), tiers=tiers, storage=storage, options=options)


def told(seen: list[Any], kind: type) -> list[int]:
    return [event.step for event in seen if isinstance(event, kind)]


def counted(running: oc.Agent, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who stages, in this order."""
    staged: list[str] = []
    for name, writer in (("store", running._writer), ("memory", running._holding._writer)):

        def stage(*given: Any, _name: str = name, _stage: Any = writer.stage, **named: Any) -> Any:
            staged.append(_name)
            return _stage(*given, **named)

        monkeypatch.setattr(writer, "stage", stage)
    return staged


def first_id(step: int, epoch: int = 1) -> AttemptId:
    return AttemptId.of(step, epoch, 1)


def files_below(root: Path, attempt: AttemptId) -> dict[str, bytes]:
    top = root / attempt.prefix
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()}


def test_a_step_that_is_due_for_both_is_staged_once_and_is_the_same_attempt_in_both(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with agent(root, save=2) as running:
        running.restore(LIKE)
        staged = counted(running, monkeypatch)
        train(running, 0, 1, 2)
        assert staged == ["memory"] * 3
        assert running.all_steps() == [0, 2] and running.failures == 0 and running.saved_step == 2
        assert running.in_flight is None
        log = store_of(held_dir(root)).require_head().live
        assert [live.step for live in log] == [1, 2]
        assert log[-1] == store_of(root).require_head().live[-1]  # the same attempt, manifest, metrics and time
        assert files_below(root, first_id(2)) == files_below(held_dir(root), first_id(2))
    assert told(seen, events.SaveStarted) == told(seen, events.SaveCommitted) == [0, 2]
    assert told(seen, events.StepHeld) == [0, 1, 2] and told(seen, events.StepNotHeld) == []
    with oc.Agent(root) as reader:
        restored = reader.restore(LIKE)
    assert restored and restored.step == 2 and jnp.array_equal(restored.state["w"], state(2)["w"])
    assert restored.process_states == {0: b"at 2"} and restored.extra["at"] == 2


# A process that dies on the way: the store does nothing for it any more.


class Dying(HookedStorage):
    """Rejects everything from the moment on at which `when(operation, key)` is true; a create may have landed then."""

    def __init__(self, inner: Storage, operation: str, part: str, *, landed: bool = False) -> None:
        super().__init__(inner, self._ask, self._landed)
        self.operation, self.part, self.landed, self.dead = operation, part, landed, False

    def _ask(self, operation: str, key: str) -> None:
        if not self.landed and (operation, True) == (self.operation, self.part in key):
            self.dead = True
        if self.dead:
            raise StorageError("this process is dead")

    def _landed(self, operation: str, key: str) -> None:
        if self.landed and (operation, True) == (self.operation, self.part in key):
            self.dead = True
            raise StorageError("this process is dead")


STEP_2 = first_id(2).prefix
MOMENTS = [
    ("create", STEP_2 + keys.INTENT, False, False),
    ("create", STEP_2 + keys.EXTRA, True, False),
    ("create", STEP_2 + "state/ocdbt.process_0/d/", False, False),
    ("create", STEP_2 + "state/ocdbt.process_0/d/", True, False),
    ("create", STEP_2 + "process/", True, False),
    ("make_durable", STEP_2 + "state/ocdbt.process_0/d/", False, False),
    ("create", STEP_2 + keys.RECEIPTS, False, False),
    ("create", STEP_2 + keys.RECEIPTS, True, False),
    ("create", STEP_2 + "state/manifest.ocdbt", True, False),
    ("create", STEP_2 + keys.MANIFEST, False, False),
    ("create", STEP_2 + keys.MANIFEST, True, False),
    ("create", keys.journal_key(2), False, False),  # 0: the epoch, 1: step 0
    ("create", keys.journal_key(2), True, True),
]


@pytest.mark.parametrize(("operation", "part", "landed", "committed"), MOMENTS)
def test_wherever_an_upload_dies_the_step_is_saved_or_an_orphan_that_the_next_start_frees_and_it_is_held(
    operation: str, part: str, landed: bool, committed: bool, root: Path
) -> None:
    storage = Dying(PosixStorage(str(root)), operation, part, landed=landed)
    running = agent(root, storage=storage, save=2)
    running.restore(LIKE)
    train(running, 0, 2)
    assert storage.dead
    crash(running)
    head = store_of(root).require_head()
    assert [live.step for live in head.live] == ([0, 2] if committed else [0])

    with agent(root, save=2) as again:
        restored = again.restore(LIKE)
        assert restored and restored.step == 2 and jnp.array_equal(restored.state["w"], state(2)["w"])
        assert set(restored.sources) == {"memory"}, "committed or not: it is still there"
        train(again, 4)
        assert again.all_steps() == ([0, 2, 4] if committed else [0, 4])
    left = {path.name for path in (root / keys.step_prefix(2)).glob("*")} if not committed else set()
    assert left == set()


# A store that is down.


class Down(HookedStorage):
    """Does not answer while `down`."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, self._ask)
        self.down = False

    def _ask(self, operation: str, key: str) -> None:
        if self.down:
            raise Unavailable(f"{operation} {key}: no answer")


def soon(what: Any, within_s: float = 60.0) -> None:
    until = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_while_a_store_is_down_training_goes_on_and_when_it_is_back_the_newest_step_is_saved(
    root: Path, seen: list[Any]
) -> None:
    storage = Down(PosixStorage(str(root)))
    with agent(root, storage=storage, keep=1) as running:
        running.restore(LIKE)
        train(running, 0)
        storage.down = True
        for step in (1, 2, 3, 4):
            assert running.save(step, state(step), process_state=b"") and running.saved_step == step
            running._holding.settle()
        soon(lambda: sorted(told(seen, events.SaveNotCommitted)) == [1, 2, 3])  # each made way for the next
        assert told(seen, events.StepHeld) == [0, 1, 2, 3, 4] and running.in_flight == 4
        assert (held_dir(root) / first_id(4).prefix).exists()
        storage.down = False
        running.wait_until_finished()
        assert running.all_steps() == [0, 4] and running.failures == 3 and running.saved_step == 4
        reasons = {event.step: event.reason for event in seen if isinstance(event, events.SaveNotCommitted)}
        assert "step 2 is due, and the store does not answer: " in reasons[1]


def test_a_bucket_that_is_down_for_a_while_has_the_newest_step_afterwards_with_large_files_in_pieces(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_STORE_DEADLINE_S", "0.5")
    gcs, where, large = emulator(), new_root(), jnp.arange(3 << 20, dtype=jnp.float32)  # 12 MiB
    (root.parent / "tier").mkdir()
    with oc.Agent(where, tiers=[oc.memory(every=1, directory=root.parent / "tier")]) as running:
        running.restore({"large": large})
        running.save(0, {"large": large})
        running.wait_until_finished()
        try:
            gcs.set_faults(down=True)
            for step in (1, 2):
                running.save(step, {"large": large + step})
                running._holding.settle()
            soon(lambda: told(seen, events.SaveNotCommitted) == [1])
        finally:
            gcs.set_faults()
        running.wait_until_finished()
        assert running.failures == 1 and told(seen, events.StepHeld) == [0, 1, 2]
    run = oc.open_run(where)
    assert run.all_steps() == [0, 2]
    assert jnp.array_equal(run.restore({"large": large}).state["large"], large + 2)


def test_what_is_on_its_way_stays_in_memory_whatever_is_held_after_it(root: Path, seen: list[Any]) -> None:
    storage = Down(PosixStorage(str(root)))
    with agent(root, storage=storage, keep=1, save=4) as running:
        running.restore(LIKE)
        train(running, 0)
        storage.down = True
        running.save(4, state(4))
        for step in (5, 6, 7):
            running._holding.settle()
            running.save(step, state(step))
        running._holding.settle()
        assert told(seen, events.StepHeld) == [0, 4, 5, 6, 7]
        running._holding._freeing.wait(10)
        held = {int(path.name) for path in (held_dir(root) / "steps").iterdir()}
        assert held == {4, 7}  # one is kept, and one is on its way
        storage.down = False
        running.wait_until_finished()
        assert running.all_steps() == [0, 4] and running.failures == 0
        running._saves.settle()
        soon(lambda: {int(path.name) for path in (held_dir(root) / "steps").iterdir()} == {7})


def test_an_upload_ends_with_the_program_even_if_the_store_stays_down(root: Path, seen: list[Any]) -> None:
    storage = Down(PosixStorage(str(root)))
    with pytest.raises(KeyError), agent(root, storage=storage, failure_grace_s=1.0) as running:
        running.restore(LIKE)
        train(running, 0)
        storage.down = True
        running.save(1, state(1))
        raise KeyError
    assert running.failures == 1 and running.in_flight is None and told(seen, events.SaveNotCommitted) == [1]
    storage.down = False
    with agent(root) as again:
        restored = again.restore(LIKE)
        assert restored and restored.step == 1 and set(restored.sources) == {"memory"}


def test_what_a_process_that_was_replaced_goes_on_uploading_is_never_saved(root: Path, seen: list[Any]) -> None:
    storage = Down(PosixStorage(str(root)))
    zombie = agent(root, storage=storage)
    zombie.restore(LIKE)
    train(zombie, 0)
    storage.down = True
    zombie.save(1, state(1))
    zombie._holding.settle()
    with oc.Agent(root, rendezvous=another_host()) as newer:
        assert newer.restore(LIKE).step == 0  # type: ignore[union-attr]
        storage.down = False
        with pytest.raises(oc.Fenced, match="fenced by epoch 2"):
            zombie.wait_until_finished()
        assert newer.save(5, state(5))
        newer.wait_until_finished()
        assert newer.all_steps() == [0, 5]
    (lost,) = [event for event in seen if isinstance(event, events.SaveNotCommitted)]
    assert (lost.step, lost.cause) == (1, "fenced")
    with pytest.raises(oc.Fenced):
        zombie.save(6, state(6))
    crash(zombie)


# A tier that is no help.


def test_a_tier_that_is_always_full_keeps_no_step_from_the_store(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with agent(root, bytes_max=1000, save=2) as running:
        running.restore(LIKE)
        staged = counted(running, monkeypatch)
        train(running, *range(5))
        assert running.all_steps() == [0, 2, 4] and running.failures == 0
        # Asked for room, the tier has none: what is asked takes nothing.
        assert [name for name in staged if name == "store"] == ["store"] * 3
    assert told(seen, events.StepNotHeld) == [0, 1, 2, 3, 4] and told(seen, events.SaveCommitted) == [0, 2, 4]
    assert all("no room in memory" in event.reason for event in seen if isinstance(event, events.StepNotHeld))


def test_a_step_that_comes_while_the_last_is_not_held_yet_goes_to_the_store_directly(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=delay:2@step=1@nth=1")
    with agent(root, save=2) as running:
        running.restore(LIKE)
        train(running, 0)
        staged = counted(running, monkeypatch)
        running.save(1, state(1))
        assert running.save(2, state(2)) and staged == ["memory", "store"]
        running.wait_until_finished()
        assert running.all_steps() == [0, 2] and told(seen, events.StepNotHeld) == [2]
        running._holding.settle()
        assert told(seen, events.StepHeld) == [0, 1]


@pytest.mark.parametrize("place", ["save.seal", "receipt.write", "intent.after"])
def test_a_step_whose_copies_or_records_fail_in_memory_is_saved_from_there_all_the_same(
    place: str, root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.FAILPOINTS, f"{place}=error@step=4@nth=1")
    with agent(root, save=4) as running:
        running.restore(LIKE)
        train(running, 0, 4)
        assert running.all_steps() == [0, 4] and running.failures == 0
        assert not (held_dir(root) / first_id(4).prefix).exists()
    assert told(seen, events.StepNotHeld) == [4] and told(seen, events.StepHeld) == [0]
    restored = oc.open_run(root).restore(LIKE)
    assert restored.step == 4 and jnp.array_equal(restored.state["w"], state(4)["w"])


def test_a_step_that_is_lost_in_memory_is_made_up_for_by_the_next_call_of_save(
    root: Path, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(environment.FAILPOINTS, "save.write=error@step=4@nth=1")
    with agent(root, save=4) as running:
        running.restore(LIKE)
        staged = counted(running, monkeypatch)
        train(running, 0, 4, 5, 6, 8)
        assert running.all_steps() == [0, 5, 8] and running.failures == 1
        assert [name for name in staged if name == "store"] == ["store"]
    (lost,) = [event for event in seen if isinstance(event, events.SaveNotCommitted)]
    assert (lost.step, lost.cause) == (4, "memory") and "could not be written to memory" in lost.reason
    assert told(seen, events.StepNotHeld) == [4] and told(seen, events.StepHeld) == [0, 5, 6, 8]


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


@pytest.mark.parametrize("spoil", [flip, truncate, grow, Path.unlink])
def test_what_memory_has_damaged_never_reaches_the_store(spoil: Any, root: Path, seen: list[Any]) -> None:
    storage = Down(PosixStorage(str(root)))
    with agent(root, storage=storage, save=2) as running:
        running.restore(LIKE)
        train(running, 0)
        storage.down = True
        running.save(2, state(2))
        running._holding.settle()
        (data,) = (held_dir(root) / first_id(2).prefix).glob("state/ocdbt.process_0/d/*")
        spoil(data)
        storage.down = False
        running._saves.settle()
        (lost,) = [event for event in seen if isinstance(event, events.SaveNotCommitted)]
        assert (lost.step, lost.cause) == (2, "memory") and str(data.name) in lost.reason
        train(running, 3)
        assert running.all_steps() == [0, 3]


# How long an upload goes on.


@pytest.mark.parametrize(
    ("began", "newer", "unanswered", "passed_s", "over"),
    [
        (True, False, False, 10_000, ""),
        (True, False, True, 10_000, ""),
        (True, True, False, 10, ""),
        (True, True, True, 10, "the store does not answer"),
        (True, True, False, 700, "has taken 700 s"),
        (False, False, False, 10_000, ""),
        (False, True, False, 0, "still being uploaded"),
        (True, False, False, 90_000, "has taken 90000 s"),
    ],
)
def test_an_upload_makes_way_where_that_brings_a_newer_step_to_the_store_sooner(
    began: bool, newer: bool, unanswered: bool, passed_s: float, over: str
) -> None:
    time_ = StepClock()
    one = Persistence(600.0, time_.clock)
    if began:
        one.begin()
    if unanswered:
        with contextlib.suppress(GivenUp):
            tries = iter([Unavailable("no answer")])

            def call() -> None:
                for error in tries:
                    raise error
                one.end("test")
                raise Unavailable("no answer")

            one.persist("x", call)
        one._end = ""
    time_.now_s += passed_s
    if newer:
        one.make_way("step 2 is due")
    assert (over in one.over) if over else one.over == ""


def test_what_a_store_does_not_answer_is_tried_again_ever_more_rarely() -> None:
    time_ = StepClock()
    one = Persistence(600.0, time_.clock)
    one.begin()
    tries: list[float] = []

    def call() -> str:
        tries.append(time_.now_s)
        if len(tries) < 12:
            raise Unavailable("no answer")
        return "done"

    assert one.persist("x", call) == "done"
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[0] <= 0.6 and max(pauses) <= 30.2 and sum(pauses[-3:]) > 40
    with pytest.raises(StorageError, match="full"):
        one.persist("x", partial(fail, StorageError("full")))


def fail(error: Exception) -> None:
    raise error
