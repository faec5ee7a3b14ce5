"""The launcher's pure parts: the supervisor's rules and the environment contract."""

from __future__ import annotations

import signal

import pytest

from launch import contract, supervise
from launch.supervise import Exit, Finish, Restart, Rules, Signal, State


def running(count: int, **rules: int) -> State:
    return State(Rules(**rules), frozenset(range(count)))


def test_the_first_failure_ends_the_others_once() -> None:
    state, effects = supervise.on_exits(running(3), [Exit(1, 1)])
    assert effects == (Signal(frozenset({0, 2}), signal.SIGTERM, state.rules.end_grace_s),)
    state, effects = supervise.on_exits(state, [Exit(0, -15)])
    assert effects == ()
    _, effects = supervise.on_exits(state, [Exit(2, -9)])
    assert effects == (Finish(1),), "the cause's code, not that of those who were ended for it"


def test_a_killed_peer_is_the_cause_among_survivors_that_abort_or_raise() -> None:
    assert supervise.first_cause([Exit(0, 1), Exit(1, -signal.SIGABRT), Exit(2, -9), Exit(3, 0)]) == Exit(2, -9)
    assert supervise.first_cause([Exit(3, 0)]) is None


def test_processes_that_end_well_leave_the_others_running() -> None:
    state, effects = supervise.on_exits(running(2), [Exit(0, 0)])
    assert (state.running, effects) == (frozenset({1}), ())
    assert supervise.on_exits(state, [Exit(1, 0)])[1] == (Finish(0),)


def test_restarts_are_counted_and_run_out() -> None:
    assert supervise.on_exits(running(1, max_restarts=1), [Exit(0, 3)])[1] == (Restart(1),)
    spent = State(Rules(max_restarts=1), frozenset({0}), restart_count=1)
    assert supervise.on_exits(spent, [Exit(0, 3)])[1] == (Finish(3),)


def test_after_an_operators_signal_nothing_is_restarted_and_the_second_one_kills() -> None:
    state, effects = supervise.on_signal(running(2, max_restarts=9), signal.SIGTERM)
    assert effects == (Signal(frozenset({0, 1}), signal.SIGTERM, state.rules.stop_grace_s),)
    assert supervise.on_signal(state, signal.SIGINT)[1] == (Signal(frozenset({0, 1}), signal.SIGKILL, 0.0),)
    state, effects = supervise.on_exits(state, [Exit(0, -15)])
    assert effects == (), "the others have the signal already, and their time to save"
    assert supervise.on_exits(state, [Exit(1, 0)])[1] == (Finish(143),)


def test_the_contract_survives_the_environment() -> None:
    given = contract.JobContract("127.0.0.1:1", 4, 3, 2, 1, "host-3")
    assert contract.from_environment(given.to_environment()) == given
    assert contract.from_environment({"PATH": "/bin"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({contract.PROCESS_INDEX: "4"}, "ORCHESTRATOR_PROCESS_INDEX=4: wanted less than ORCHESTRATOR_PROCESS_COUNT=4"),
        ({contract.PROCESS_COUNT: "zwei"}, "ORCHESTRATOR_PROCESS_COUNT='zwei': wanted a whole number of at least 1"),
        ({contract.LOCAL_DEVICES: "0"}, "ORCHESTRATOR_LOCAL_DEVICES='0'"),
        ({contract.COORDINATOR_ADDRESS: "here"}, "ORCHESTRATOR_COORDINATOR_ADDRESS='here': wanted host:port"),
    ],
)
def test_a_broken_contract_names_the_variable(change: dict[str, str], message: str) -> None:
    environ = contract.JobContract("127.0.0.1:1", 4, 3, 2, 1, "host-3").to_environment() | change
    with pytest.raises(contract.ContractError, match="^" + message.replace("[", r"\[")):
        contract.from_environment(environ)
