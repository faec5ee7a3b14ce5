"""What people hand in by mistake: each a UsageError that names the argument, what was got and what was wanted, at once,
and nothing is changed."""

from __future__ import annotations

import enum
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.lib import _jax

import orchestrator as oc
from orchestrator.observe.events import SaveStarted
from orchestrator.rules import arguments
from orchestrator.rules.attempt_id import AttemptId
from tests.support.runs import fill, now, state
from tests.support.snapshots import snapshot


class Number(enum.IntEnum):
    FIVE = 5


def rejected(act: Callable[[], Any], *said: str) -> None:
    with pytest.raises(oc.OrchestratorError) as caught:
        act()
    assert type(caught.value) is oc.UsageError, caught.value
    for part in said:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "step", [True, np.True_, -1, 2**31, 1.0, "1", None, math.nan, np.zeros(2, int), b"1"], ids=repr
)
def test_what_is_no_step_is_rejected_wherever_a_step_is_wanted(root: Path, step: Any) -> None:
    with oc.Agent(root) as agent:
        before = snapshot(root)
        for act in (
            lambda: agent.save(step, state(1)),
            lambda: agent.save(step, state(1), force=True),
            lambda: agent.should_save(step),
            lambda: agent.reached_preemption(step),
        ):
            rejected(act, "step=", "expected a whole number")
        assert snapshot(root) == before


@pytest.mark.parametrize("step", [True, 1.0, "1", math.nan, jnp.ones(1, int)], ids=repr)
def test_a_step_to_restore_that_is_no_number_is_rejected(root: Path, step: Any) -> None:
    fill(root, 1)
    agent = oc.Agent(root)
    for act in (lambda: agent.restore(state(0), step=step), lambda: oc.open_run(root).restore(state(0), step=step)):
        rejected(act, "step=", "expected a whole number, or None for the newest")


@pytest.mark.parametrize("step", [np.int64(5), np.array(5), Number.FIVE, np.uint8(5)], ids=repr)
def test_a_step_may_be_any_kind_of_integer(root: Path, step: Any) -> None:
    with oc.Agent(root, options=now()) as agent:
        assert agent.should_save(step) is True
        assert agent.save(step, state(5))
        restored = agent.restore(state(0), step=step)
        assert restored is not None and type(restored.step) is int and restored.step == 5


def test_the_largest_step_is_what_jax_can_count() -> None:
    """Beyond, a job of several processes would fail where it asks for a preemption."""
    manager = _jax.create_preemption_sync_manager()
    assert manager.reached_sync_point(arguments.STEP_MAX) is False
    with pytest.raises(TypeError):
        manager.reached_sync_point(arguments.STEP_MAX + 1)


cycle: list[Any] = []
cycle.append(cycle)


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": ["loss"]}, "metrics=['loss']: expected a dict"),
        ({"metrics": {"loss": "3"}}, "metrics['loss']='3': expected a number"),
        ({"metrics": {"loss": None}}, "metrics['loss']=None: expected a number"),
        ({"metrics": {"loss": 10**400}}, "metrics['loss']="),
        ({"metrics": {3: 1.0}}, "a key of metrics=3: expected text"),
        ({"metrics": {"\ud800": 1.0}}, "a key of metrics='\\ud800': expected text"),
        ({"extra": [1]}, "extra=[1]: expected a dict"),
        ({"extra": {"a": {1, 2}}}, "extra['a']={1, 2}: expected plain JSON (Object of type set"),
        ({"extra": {"a": b"x"}}, "extra['a']=b'x': expected plain JSON"),
        ({"extra": {"a": cycle}}, "extra['a']=[[[[[[[...]]]]]]]: expected plain JSON (Circular reference"),
        ({"extra": {"a": np.datetime64(1, "ns")}}, "expected plain JSON (Object of type datetime64"),
        ({"extra": {"a": np.float32([3])}}, "expected plain JSON (Object of type ndarray"),
        ({"extra": {"a": np.array(3.0)}}, "expected plain JSON (Object of type ndarray"),
        ({"extra": {"a": jnp.float32(3)}}, "expected plain JSON (Object of type ArrayImpl"),
        ({"extra": {"a": deep(100_000)}}, "expected plain JSON ("),
        ({"extra": {"a": deep(100)}}, "expected plain JSON (nested more than 100 deep)"),
        ({"extra": {"a": "\ud800"}}, "extra['a']='\\ud800': expected plain JSON"),
        ({"extra": {"a": {1: 2, "1": 3}}}, "two keys are the same as text"),
        ({"extra": {3: 1}}, "a key of extra=3: expected text"),
        ({"process_state": "text"}, "process_state='text': expected bytes"),
        ({"process_state": np.zeros(3, np.uint8)}, "process_state=array([0, 0, 0], dtype=uint8): expected bytes"),
    ],
)
def test_what_a_save_is_given_beside_the_state_is_checked_before_anything_is_written(
    root: Path, given: Any, said: str
) -> None:
    with oc.Agent(root, options=now()) as agent:
        before = snapshot(root)
        rejected(lambda: agent.save(1, state(1), **given), said)
        assert snapshot(root) == before
        assert agent.save(1, state(1)) and agent.all_steps() == [1]


def test_the_other_hosts_hear_at_once_that_this_one_was_given_nonsense(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(0, state(0))
        for number, given in enumerate([{"metrics": 3}, {"state": {"f": print}}], 1):
            rejecting: Any = {"state": state(1), **given}
            with pytest.raises(oc.UsageError):
                agent.save(1, **rejecting)
            vote = agent._participants.context.signals.votes(AttemptId.of(1, 1, number))[0]
            assert vote and vote.failure and vote.failure.cause.startswith(("UsageError: ", "UnsupportedLeaf: "))


def test_numbers_that_json_has_not_and_what_is_longer_than_a_machine_word_come_back(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        extra = {
            "n": 2**70,
            "five": Number.FIVE,
            "best": [{"loss": math.inf}],
            "$number": "NaN",
            "a": {"$number": "NaN"},
        }
        scalars = {"bad": np.float32("nan"), "bf16": jnp.bfloat16(1.5).item(), "n": np.int8(3), "yes": np.bool_(True)}
        agent.save(1, state(1), metrics={"nan": math.nan, "up": True, "low": -math.inf}, extra={**extra, "np": scalars})
        restored = agent.restore(state(0))
    assert restored is not None
    assert (restored.metrics["up"], restored.metrics["low"]) == (1.0, -math.inf) and math.isnan(restored.metrics["nan"])
    assert math.isnan(restored.extra["np"].pop("bad"))
    assert restored.extra.pop("np") == {"bf16": 1.5, "n": 3, "yes": True}
    del restored.extra["timestamp"]
    assert restored.extra == {**extra, "five": 5}


def test_process_state_may_be_overwritten_when_save_returns(root: Path) -> None:
    buffer = bytearray(b"before")
    with oc.Agent(root) as agent:
        agent.save(1, state(1), process_state=buffer)  # type: ignore[arg-type]
        buffer[:] = b"after!"
        restored = agent.restore(state(0))
    assert restored is not None and restored.process_states == {0: b"before"}


def test_metrics_and_steps_that_are_traced_say_so(root: Path) -> None:
    with oc.Agent(root) as agent:
        rejected(lambda: jax.jit(lambda x: agent.save(x, state(1)))(3), "it is being traced: call this outside")
        rejected(lambda: jax.jit(lambda x: agent.save(1, state(1), metrics={"l": x}))(3.0), "metrics['l']=", "traced")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("async_save", value) for value in ("no", 1, None)),
        *(("on_save_failure", value) for value in ([], None)),
        *(("save_timeout_s", value) for value in ("5", math.inf, 1e300, None, True, [])),
        *(("rendezvous_timeout_s", value) for value in ("5", math.inf, math.nan, -1)),
        *(("preemption_grace_s", value) for value in ("5", math.inf)),
        *(("compression", value) for value in ("zstd", 1)),
        *(("quarantine_keep_s", value) for value in ("5", math.inf, 0, True)),
        *((name, value) for name in ("host_bytes_max", "restore_bytes_max") for value in ("1", 1.5, math.nan, True, 0)),
        *(("attest", value) for value in (True, None)),
        *(("metrics_port", value) for value in ("80", 1.5, True, 70000)),
        *((name, 3) for name in ("metrics_address", "events_dir", "metrics_file")),
        *((name, "gs://bucket/x") for name in ("events_dir", "metrics_file")),
        ("other_tree", "no"),
        ("traces", "no"),
        ("when_full", 3),
    ],
)
def test_an_option_of_the_wrong_kind_is_rejected_by_name(name: str, value: Any) -> None:
    rejected(lambda: oc.Options(**{name: value}), f"{name}=", "expected")


@pytest.mark.parametrize(
    "make",
    [
        lambda: oc.every("3"),  # type: ignore[arg-type]
        lambda: oc.every(True),
        lambda: oc.every(1.5),  # type: ignore[arg-type]
        lambda: oc.every_seconds("3"),  # type: ignore[arg-type]
        lambda: oc.every_seconds(math.inf),
        lambda: oc.every_seconds(math.nan),
        lambda: oc.auto(math.inf),
        lambda: oc.auto("3"),  # type: ignore[arg-type]
        lambda: oc.at(3),  # type: ignore[arg-type]
        lambda: oc.at("12"),  # type: ignore[arg-type]
        lambda: oc.at([1.0]),  # type: ignore[list-item]
        lambda: oc.at([-1]),
        lambda: oc.last(2.5),  # type: ignore[arg-type]
        lambda: oc.best(3),  # type: ignore[arg-type]
        lambda: oc.best("loss", "2"),  # type: ignore[arg-type]
        lambda: oc.within("3"),  # type: ignore[arg-type]
        lambda: oc.within(math.nan),
        lambda: oc.within(-1),
        lambda: oc.every(3) | 3,  # type: ignore[arg-type]
        lambda: oc.every(3) | oc.last(3),  # type: ignore[arg-type]
        lambda: oc.last(3) | oc.every(3),  # type: ignore[arg-type]
    ],
)
def test_a_policy_of_the_wrong_kind_is_rejected_when_it_is_made(make: Callable[[], Any]) -> None:
    rejected(make, "expected")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"save": 100}, "save=100: expected a policy that says when to save, such as oc.every(100)"),
        ({"save": oc.every}, "expected a policy that says when to save"),
        ({"save": oc.last(3)}, "save=last(3): expected a policy that says when to save"),
        ({"keep": 3}, "keep=3: expected a policy that says what to keep, such as oc.last(5)"),
        ({"keep": oc.every(3)}, "expected a policy that says what to keep"),
        ({"options": {"async_save": False}}, "options={'async_save': False}: expected orchestrator.Options(...)"),
    ],
)
def test_policies_and_options_of_the_wrong_kind_are_rejected_before_a_run_is_opened(
    root: Path, given: Any, said: str
) -> None:
    rejected(lambda: oc.Agent(root, **given), said)
    assert not root.exists()


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        3,
        b"run",
        ["run"],
        "a\0b",
        "a\ud800b",
        "file://",
        "file://host/run",
        Path("gs://bucket/run"),
        "s3://b/c",
    ],
    ids=repr,
)
def test_what_is_no_root_is_rejected_and_nothing_is_made(
    tmp_path: Path, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (lambda: oc.Agent(given), lambda: oc.open_run(given)):
        rejected(act)
    assert list(tmp_path.iterdir()) == []


def test_how_many_steps_to_step_back_must_be_a_number(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(root, 1)
    monkeypatch.setenv("ORCHESTRATOR_STEP_BACK", "two")
    with oc.Agent(root) as agent:
        rejected(lambda: agent.restore(state(0)), "ORCHESTRATOR_STEP_BACK='two'")


def test_watching_with_times_that_are_none_is_rejected(root: Path) -> None:
    fill(root, 1)
    for given in ({"poll_s": 0}, {"poll_s": "1"}, {"timeout_s": math.nan}):
        rejected(lambda given=given: next(oc.open_run(root).watch(**given)), "_s=")  # type: ignore[misc]


# Threads, and an agent that is closed.


def test_a_closed_agent_says_so_and_may_be_closed_again(root: Path) -> None:
    agent = oc.Agent(root, options=now())
    agent.save(1, state(1))
    agent.close()
    agent.close()
    agent.wait_until_finished()
    before = snapshot(root)
    for name, act in (
        ("save", lambda: agent.save(2, state(2))),
        ("restore", lambda: agent.restore(state(0))),
    ):
        rejected(act, f"{name}: the agent of file://{root} is closed; open another one")
    assert agent.latest_step() == 1 and snapshot(root) == before


def test_two_threads_cannot_save_at_once(root: Path) -> None:
    entered, go_on = threading.Event(), threading.Event()

    class Slow(dict[str, Any]):
        pass

    def flatten(tree: Slow) -> Any:
        entered.set()
        assert go_on.wait(10)
        return (tree["w"],), None

    jax.tree_util.register_pytree_node(Slow, flatten, lambda aux, values: Slow(w=values[0]))
    with oc.Agent(root, options=now()) as agent:
        first = threading.Thread(target=agent.save, args=(1, Slow(w=jnp.zeros(3))))
        first.start()
        assert entered.wait(10)
        for act in (lambda: agent.save(2, state(2)), lambda: agent.restore(state(0))):
            rejected(act, "another thread is using the agent of")
        go_on.set()
        first.join(10)
        assert agent.save(2, Slow(w=jnp.zeros(3))) and agent.all_steps() == [1, 2]


# Ctrl-C.


def test_a_ctrl_c_while_the_state_is_taken_leaves_an_agent_that_can_save_that_step(root: Path) -> None:
    class Rude(dict[str, Any]):
        pass

    interrupt = [True]

    def flatten(tree: Rude) -> Any:
        if interrupt:
            interrupt.clear()
            raise KeyboardInterrupt
        return (tree["w"],), None

    jax.tree_util.register_pytree_node(Rude, flatten, lambda aux, values: Rude(w=values[0]))
    with oc.Agent(root, options=now()) as agent:
        with pytest.raises(KeyboardInterrupt):
            agent.save(1, Rude(w=jnp.zeros(3)))
        assert agent.in_flight is None
        assert agent.save(1, Rude(w=jnp.zeros(3))) and agent.all_steps() == [1]


@pytest.mark.parametrize("moment", ["stage", "told"])
def test_a_ctrl_c_in_the_middle_of_a_save_leaves_it_whole_or_not_at_all(
    root: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = oc.Agent(root)

    def rude(*given: Any) -> None:
        if moment == "stage" or isinstance(given[0], SaveStarted):
            monkeypatch.undo()
            raise KeyboardInterrupt

    if moment == "stage":
        monkeypatch.setattr(agent._participants.context.writer, "stage", rude)
    else:
        context = replace(agent._participants.context, tell=rude)
        monkeypatch.setattr(agent._participants, "context", context)
    with pytest.raises(KeyboardInterrupt):
        agent.save(1, state(1))
    agent.wait_until_finished()
    saved = moment == "told"  # it had begun
    assert agent.all_steps() == ([1] if saved else [])
    assert agent.save(1, state(1)) is not saved
    agent.close()
    assert oc.open_run(root).all_steps() == [1]


def test_a_ctrl_c_while_the_agent_waits_leaves_the_save_to_the_next_wait(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = oc.Agent(root)
    agent.save(1, state(1))
    (save,) = agent._saves._begun
    monkeypatch.setattr(save, "join", lambda timeout_s: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        while save.running:
            agent.wait_until_finished()
        raise KeyboardInterrupt  # it was quicker than we
    monkeypatch.undo()
    agent.close()
    assert agent.all_steps() == [1]


def test_a_loop_that_fails_inside_with_keeps_the_save_in_flight_and_raises_its_own_error(root: Path) -> None:
    with pytest.raises(ZeroDivisionError), oc.Agent(root) as agent:
        agent.save(1, state(1))
        _ = 1 // 0
    assert oc.open_run(root).all_steps() == [1]
    rejected(lambda: agent.save(2, state(2)), "is closed")
