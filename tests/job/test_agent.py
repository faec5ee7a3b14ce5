"""The agent as a training loop sees it, in one process."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import orchestrator as oc
from orchestrator.job import sigterm
from orchestrator.observe import events
from orchestrator.storage import PosixStorage
from tests.support.fakes import FailOnce, HookedStorage, another_host
from tests.support.runs import LIKE, fill, journal_of, now, state
from tests.support.snapshots import snapshot

# The loop of the README.


def test_a_new_run_has_nothing_to_restore_and_a_stopped_one_goes_on_where_it_was(root: Path) -> None:
    def train(until: int) -> int:
        with oc.Agent(root, save=oc.every(2), keep=oc.last(2)) as agent:
            restored = agent.restore(LIKE)
            current, start = (restored.state, restored.step + 1) if restored else (state(0), 0)
            for step in range(start, until):
                current = {"w": current["w"] + 1, "count": step}
                agent.save(step, current, metrics={"loss": 1.0 / (step + 1)})
        return start

    assert train(5) == 0
    assert train(9) == 5
    reader = oc.open_run(root)
    assert reader.all_steps() == [4, 6, 8]  # 4: the newest that a run is known to have come up on
    assert float(reader.restore(LIKE).state["w"][0]) == 9.0


def test_everything_that_was_saved_beside_the_state_comes_back(root: Path) -> None:
    extra = {"history": [1.0, 0.5], "note": "ü", "nested": {"a": None}}
    before = time.time()
    with oc.Agent(root, options=now()) as agent:
        metrics = {"loss": jnp.float32(0.5), "steps": 7, "bad": float("nan"), "worse": float("inf")}
        agent.save(3, state(3), metrics=metrics, extra=extra, process_state=b"\0reader")
        restored = agent.restore(LIKE)
    assert restored is not None
    assert (restored.step, restored.process_states) == (3, {0: b"\0reader"})
    assert math.isnan(restored.metrics.pop("bad"))
    assert restored.metrics == {"loss": 0.5, "steps": 7.0, "worse": math.inf}
    timestamp = restored.extra.pop("timestamp")
    assert restored.extra == extra
    assert before <= timestamp <= time.time()


def test_the_extras_may_all_be_left_out(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(0, state(0))
        restored = agent.restore(LIKE)
    assert restored is not None
    assert (restored.step, restored.metrics, restored.process_states) == (0, {}, {})
    assert list(restored.extra) == ["timestamp"]


# What is due.


def test_save_follows_the_policy_says_whether_it_saved_and_can_be_forced(root: Path) -> None:
    with oc.Agent(root, save=oc.every(3) | oc.at([4]), options=now()) as agent:
        assert [step for step in range(7) if agent.should_save(step)] == [0, 3, 4, 6]
        assert [step for step in range(7) if agent.save(step, state(step))] == [0, 3, 4, 6]
        assert agent.save(7, state(7), force=True)
        assert not agent.save(7, state(7), force=True)  # it is saved already
        assert agent.all_steps() == [0, 3, 4, 6, 7]


def test_a_policy_in_seconds_counts_from_the_last_saves_beginning(root: Path) -> None:
    with oc.Agent(root, save=oc.every_seconds(1.5), options=now()) as agent:
        assert agent.save(1, state(1))
        assert not agent.save(2, state(2))
        time.sleep(1.55)
        assert agent.save(3, state(3))


def test_a_step_may_be_as_large_as_jax_can_count_and_not_negative(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(2**31 - 1, state(1))
        assert agent.all_steps() == [2**31 - 1]
        with pytest.raises(oc.UsageError, match="step=-1: expected a whole number of at least 0"):
            agent.save(-1, state(1))
        with pytest.raises(oc.UsageError, match=r"step=2147483648: .* at most 2147483647"):
            agent.save(2**31, state(1))


@pytest.mark.parametrize("step", [np.int64(5), jnp.int32(5)], ids=["numpy", "jax"])
def test_a_step_taken_from_an_array_is_the_step(root: Path, step: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(step, state(5))
        assert agent.all_steps() == [5]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"metrics": {"loss": "low"}}, r"metrics\['loss'\]='low': expected a number"),
        ({"metrics": {"loss": jnp.ones(3)}}, r"metrics\['loss'\]=.*: expected a number"),
        ({"extra": {"a": object()}}, r"extra\['a'\]=.*: expected plain JSON"),
    ],
)
def test_what_is_no_number_or_no_json_is_rejected_before_anything_is_written(
    root: Path, arguments: Any, said: str
) -> None:
    with oc.Agent(root, options=now()) as agent:
        before = snapshot(root)
        with pytest.raises(oc.UsageError, match=said):
            agent.save(1, state(1), **arguments)
        assert snapshot(root) == before
        assert agent.save(1, state(1))  # the same step, mended


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"on_save_failure": "ignore"}, "on_save_failure='ignore': expected 'warn' or 'raise'"),
        ({"save_timeout_s": 0}, "save_timeout_s=0: expected a positive number of seconds, at most 1000000"),
        (
            {"rendezvous_timeout_s": float("nan")},
            "rendezvous_timeout_s=nan: expected a positive number of seconds, at most 1000000",
        ),
    ],
)
def test_options_that_make_no_sense_are_rejected(arguments: Any, said: str) -> None:
    with pytest.raises(oc.UsageError) as caught:
        oc.Options(**arguments)
    assert str(caught.value) == said


# Asynchronous saves.


class Gate:
    """A hook that holds the first create of a key that contains `part` until it is opened."""

    def __init__(self, part: str) -> None:
        self.part, self.reached, self.opened = part, threading.Event(), threading.Event()

    def __call__(self, operation: str, key: str) -> None:
        if operation == "create" and self.part in key:
            self.reached.set()
            assert self.opened.wait(30)


def test_save_returns_before_the_step_is_written_and_only_a_committed_one_is_seen(
    root: Path,
) -> None:
    gate = Gate("manifest.json")
    with oc.Agent(root, storage=HookedStorage(PosixStorage(str(root)), gate)) as agent:
        assert agent.save(1, state(1))
        assert gate.reached.wait(30)
        assert agent.latest_step() is None and agent.all_steps() == []
        assert oc.open_run(root).latest_step() is None
        gate.opened.set()
        agent.wait_until_finished()
        assert agent.latest_step() == 1


@pytest.fixture
def told() -> Iterator[list[events.Event]]:
    heard: list[events.Event] = []
    unsubscribe = events.subscribe(heard.append)
    yield heard
    unsubscribe()


def test_saved_is_reported_only_after_the_journal_holds_it(root: Path) -> None:
    seen: list[bool] = []

    def look(event: events.Event) -> None:
        if isinstance(event, events.SaveCommitted):
            seen.append(oc.open_run(root).latest_step() == event.step)

    unsubscribe = events.subscribe(look)
    try:
        fill(root, 1, 2)
    finally:
        unsubscribe()
    assert seen == [True, True]


def test_the_bytes_reported_are_the_bytes_on_disk(root: Path, told: list[events.Event]) -> None:
    fill(root, 1)
    (committed,) = [event for event in told if isinstance(event, events.SaveCommitted)]
    (attempt,) = root.glob("steps/*/*")
    assert committed.state_bytes == sum(file.stat().st_size for file in attempt.rglob("*") if file.is_file())


def test_the_next_save_waits_for_the_one_before_so_steps_commit_in_order(root: Path) -> None:
    with oc.Agent(root) as agent:
        for step in range(6):
            assert agent.save(step, state(step))
    assert [head.event.step for head in journal_of(root) if head.event.kind == "committed"] == list(range(6))


def test_leaving_because_of_an_exception_waits_for_a_save_no_longer_than_its_grace(root: Path) -> None:
    gate = Gate("manifest.json")
    storage = HookedStorage(PosixStorage(str(root)), gate)
    with (
        pytest.raises(ZeroDivisionError),
        oc.Agent(root, storage=storage, options=oc.Options(failure_grace_s=0.2)) as agent,
    ):
        agent.save(1, state(1))
        assert gate.reached.wait(30)
        raise ZeroDivisionError
    assert agent.in_flight == 1  # not waited for until the gate gives up
    gate.opened.set()


def test_leaving_because_of_an_exception_finishes_the_save_and_keeps_the_exception(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), oc.Agent(root) as agent:
        agent.save(1, state(1))
        raise ZeroDivisionError
    assert oc.open_run(root).all_steps() == [1]


def test_closing_twice_is_harmless(root: Path) -> None:
    agent = oc.Agent(root)
    agent.save(1, state(1))
    agent.close()
    agent.close()
    assert oc.open_run(root).all_steps() == [1]


# Failed saves.


@pytest.mark.parametrize("part", ["intent.json", "receipts/", "extra.json", "manifest.json"])
def test_a_failed_save_does_not_stop_training_and_the_next_due_step_is_saved(
    root: Path, part: str, told: list[events.Event]
) -> None:
    hook = FailOnce("create", part)
    with oc.Agent(
        root, storage=HookedStorage(PosixStorage(str(root)), hook), options=now(on_save_failure="warn")
    ) as agent:
        assert agent.save(1, state(1))
        assert agent.failures == 1 and agent.all_steps() == []
        assert agent.save(1, state(1))  # the same step may be tried again
        assert agent.save(2, state(2))
        assert agent.failures == 1 and agent.all_steps() == [1, 2]
    aborted = [head.event for head in journal_of(root) if head.event.kind == "aborted"]
    assert [(event.step, event.attempt) for event in aborted] == [(1, "e0001-a01")]
    assert "ENOSPC" in aborted[0].failures[0].cause
    assert oc.open_run(root).restore(LIKE, step=1).state["count"] == 1
    (failed,) = [event for event in told if isinstance(event, events.SaveNotCommitted)]
    assert "step 1 e0001-a01" in failed.reason and "ENOSPC" in failed.reason


def test_on_save_failure_raise_raises_once_at_the_next_call_and_names_the_attempt(root: Path) -> None:
    storage = HookedStorage(PosixStorage(str(root)), FailOnce("make_durable", "ocdbt.process_0"))
    with oc.Agent(root, storage=storage, options=oc.Options(on_save_failure="raise")) as agent:
        assert agent.save(1, state(1))
        with pytest.raises(oc.SaveFailed, match=r"step 1 e0001-a01 was not saved: .*ENOSPC") as caught:
            agent.wait_until_finished()
        assert (caught.value.step, caught.value.attempt) == (1, "e0001-a01")
        agent.wait_until_finished()
        assert agent.save(2, state(2))
    assert oc.open_run(root).all_steps() == [2]


def test_a_save_that_failed_last_is_raised_by_close(root: Path) -> None:
    storage = HookedStorage(PosixStorage(str(root)), FailOnce("create", "manifest.json"))
    agent = oc.Agent(root, storage=storage, options=oc.Options(on_save_failure="raise"))
    agent.save(1, state(1))
    with pytest.raises(oc.SaveFailed):
        agent.close()


def test_a_commit_that_the_store_rejects_is_not_reported_as_saved(root: Path) -> None:
    storage = HookedStorage(PosixStorage(str(root)), FailOnce("create", "journal/00000000000000000001"))
    with oc.Agent(root, storage=storage, options=now()) as agent:
        with pytest.raises(oc.SaveFailed, match="ENOSPC"):
            agent.save(1, state(1))
        assert agent.all_steps() == []
        assert agent.save(1, state(1))
        assert agent.all_steps() == [1]


def test_a_commit_whose_reply_was_lost_leaves_one_whole_step_whatever_was_reported(root: Path) -> None:
    storage = HookedStorage(PosixStorage(str(root)), after=FailOnce("create", "journal/00000000000000000001"))
    with oc.Agent(root, storage=storage, options=now(on_save_failure="warn")) as agent:
        agent.save(1, state(1))
        agent.save(1, state(1), force=True)
        agent.save(2, state(2))
        assert agent.all_steps() == [1, 2]
    assert [live.step for live in journal_of(root)[-1].live] == [1, 2]
    assert oc.open_run(root).restore(LIKE, step=1).state["count"] == 1


def test_a_rejected_state_may_be_mended_and_saved_as_the_same_step(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        with pytest.raises(oc.UnsupportedLeaf):
            agent.save(1, {"w": object()})
        assert agent.save(1, state(1))


# Fencing and other jobs.


def test_an_older_agent_cannot_commit_after_a_newer_one_has_opened_the_run(root: Path) -> None:
    zombie = oc.Agent(root)
    zombie.save(1, state(1))
    zombie.wait_until_finished()
    with oc.Agent(root, options=now(), rendezvous=another_host()) as successor:
        assert successor.epoch is None and zombie.epoch == 1
        successor.restore(LIKE)
        assert (zombie.epoch, successor.epoch) == (1, 2)
        zombie.save(2, state(2))
        for _ in range(2):  # for good: every later call says so
            with pytest.raises(oc.Fenced, match=r"fenced by epoch 2 .*must stop"):
                zombie.wait_until_finished()
        with pytest.raises(oc.Fenced):
            zombie.save(3, state(3))
        with pytest.raises(oc.Fenced):
            zombie.close()
        assert successor.all_steps() == [1]
        assert successor.save(2, {**state(2), "w": jnp.full(512, -1.0)})
    assert float(oc.open_run(root).restore(LIKE).state["w"][0]) == -1.0
    assert oc.Fenced.exit_code == 5
    assert {head.epoch for head in journal_of(root) if head.event.kind == "committed" and head.event.step == 2} == {2}


def test_a_job_with_another_tree_is_rejected_before_it_writes_and_told_what_differs(root: Path) -> None:
    fill(root, 1)
    with oc.Agent(root, options=now()) as other:
        before = snapshot(root)
        with pytest.raises(oc.OtherJob) as caught:
            other.save(2, {"w": jnp.zeros(5), "count": 2})
        assert snapshot(root) == before
    text = str(caught.value)
    assert "holds another job's state (step 1)" in text and "w: the run has f32[512], this job f32[5]" in text
    with oc.Agent(root, options=now(other_tree=True)) as other:
        assert other.save(2, {"w": jnp.zeros(5), "count": 2})


def test_a_job_that_has_restored_the_run_cannot_save_another_tree_to_it(root: Path) -> None:
    fill(root, 1)
    with oc.Agent(root, options=now()) as agent:
        assert agent.restore(LIKE) is not None  # opens the epoch
        for _ in range(2):
            with pytest.raises(oc.OtherJob, match=r"holds another job's state \(step 1\)"):
                agent.save(2, {"w": jnp.zeros(5), "count": 2})
        assert agent.save(2, state(2)) and agent.all_steps() == [1, 2]


# Retention and deletion.


def attempts_on_disk(root: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in root.glob("steps/*/*") if any(path.rglob("*")))


def test_retention_keeps_what_the_policy_says_and_the_rests_data_is_deleted(root: Path) -> None:
    losses = {0: 0.9, 1: 0.1, 2: 0.8, 3: 0.7, 4: 0.6, 5: 0.5}
    with oc.Agent(root, keep=oc.last(2) | oc.best("loss") | oc.every_nth(3), options=now()) as agent:
        for step, loss in losses.items():
            agent.save(step, state(step), metrics={"loss": loss})
        assert agent.all_steps() == [0, 1, 3, 4, 5]
    fill(root, 6)  # whatever a collector has not come to is found by the next incarnation
    assert attempts_on_disk(root) == [f"{step:08d}/e000{1 + (step > 5)}-a01" for step in (0, 1, 3, 4, 5, 6)]
    assert journal_of(root)[-1].retired == ()


def test_a_metric_that_no_save_has_retires_nothing_and_is_named_once(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep = oc.best("val_loss", 2)
    with oc.Agent(root, keep=keep, options=now()) as agent:
        for step in range(4):
            agent.save(step, state(step), metrics={"loss": 4.0 - step})
        assert agent.all_steps() == [0, 1, 2, 3]
        told = [record.message for record in caplog.records if "'val_loss'" in record.message]
        assert len(told) == 1 and told[0].startswith("step 0: keep= goes by the metric 'val_loss'")
        assert "its metrics: 'loss'" in told[0]
        agent.save(4, state(4), metrics={"val_loss": 1.0})
        agent.save(5, state(5), metrics={"val_loss": 2.0})
        assert agent.all_steps() == [4, 5]


def test_without_a_policy_everything_is_kept(root: Path) -> None:
    fill(root, *range(4))
    assert oc.open_run(root).all_steps() == [0, 1, 2, 3]


def test_only_leftovers_of_a_killed_incarnation_are_deleted_after_the_first_commit(root: Path) -> None:
    fill(root, 1)
    leftover = root / "steps" / "00000002" / "e0001-a01" / "state" / "ocdbt.process_0" / "d" / "x"
    running = root / "steps" / "00000009" / "e0002-a01" / "state" / "x"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    with oc.Agent(root, options=now()) as agent:
        assert agent.restore(LIKE) is not None  # opens epoch 2
        running.parent.mkdir(parents=True)
        running.write_bytes(b"half")
        agent.save(3, state(3))
    assert attempts_on_disk(root) == ["00000001/e0001-a01", "00000003/e0002-a01", "00000009/e0002-a01"]
    assert running.exists()


def test_after_a_return_to_an_older_step_the_next_commit_is_the_newest(root: Path) -> None:
    fill(root, 1, 2, 3)
    with oc.Agent(root, options=now()) as agent:
        restored = agent.restore(LIKE, step=1)
        assert restored is not None and restored.step == 1
        agent.save(2, {**state(2), "w": jnp.full(512, 20.0)})
        again = agent.restore(LIKE)
    assert again is not None and again.step == 2 and float(again.state["w"][0]) == 20.0
    assert oc.open_run(root).all_steps() == [1, 2, 3]


# SIGTERM.


@pytest.mark.parametrize("another_is_open", [False, True])
def test_after_sigterm_the_next_step_is_saved_whatever_the_policy_and_the_loop_ends(
    another_is_open: bool, root: Path, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as ends:
        ends.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        if another_is_open:  # that the program has reset what it installed, is nothing to an agent opened afterwards
            ends.enter_context(oc.Agent(tmp_path / "another"))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ends.callback(sigterm.forget)
        agent = ends.enter_context(oc.Agent(root, save=oc.every(1000)))
        assert not agent.save(1, state(1)) and not agent.reached_preemption(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert agent.save(2, state(2)) and agent.reached_preemption(2)
    assert oc.open_run(root).all_steps() == [2]


# Readers.


def test_a_reader_sees_steps_restores_any_of_them_and_writes_nothing(root: Path) -> None:
    fill(root, 1, 2, 3)
    before = snapshot(root)
    reader = oc.open_run(str(root))
    assert (reader.latest_step(), reader.all_steps()) == (3, [1, 2, 3])
    assert reader.restore(LIKE).step == 3
    assert reader.restore(LIKE, step=2).state["count"] == 2
    assert reader.restore().state["count"] == 3
    assert snapshot(root) == before


def test_watch_yields_each_step_committed_from_then_on_once_and_ends_when_it_is_quiet(root: Path) -> None:
    fill(root, 1)
    reader = oc.open_run(root)
    found = []
    with oc.Agent(root, options=now()) as agent:
        watching = reader.watch(poll_s=0.02, timeout_s=1.0)
        trainer = threading.Thread(target=lambda: [agent.save(step, state(step)) for step in (2, 3)])
        found.append(watch_first(watching, trainer))
        trainer.join(30)
        found += list(watching)
    assert found == [2, 3]


def watch_first(watching: Iterator[int], trainer: threading.Thread) -> int:
    """The first step that is yielded after the trainer has started; watching begins before it."""
    threading.Timer(0.1, trainer.start).start()
    return next(watching)


def test_a_step_committed_again_is_watched_again(root: Path) -> None:
    fill(root, 1)
    watching = oc.open_run(root).watch(poll_s=0.02, timeout_s=2.0)
    threading.Timer(0.1, fill, (root, 1)).start()
    assert next(watching) == 1


def test_a_run_is_opened_by_string_path_or_url(root: Path) -> None:
    fill(root, 1)
    for name in (str(root), root, f"file://{root}"):
        assert oc.open_run(name).all_steps() == [1]


def test_the_intent_says_who_saved_on_what_mesh(root: Path, mesh8: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {"w": jax.device_put(jnp.zeros(8), NamedSharding(mesh8, PartitionSpec("data")))})
    (file,) = root.glob("steps/*/*/intent.json")
    intent = json.loads(file.read_text())
    assert (intent["mesh"], intent["process_count"], intent["device_count"]) == ({"data": 4, "model": 2}, 1, 8)
    assert f"pid-{os.getpid()}" in intent["opened_by"]
