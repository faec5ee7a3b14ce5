"""The local launcher's pure part: the supervisor's rules."""

from __future__ import annotations

import signal
from dataclasses import replace
from typing import Any

import pytest

from launch import supervise
from launch.supervise import Exit, Finish, JobHistory, Restart, RestartPolicy, SendSignal, State
from orchestrator.rules.stalls import Sign


def running(count: int, **rules: Any) -> State:
    return State(RestartPolicy(**rules), frozenset(range(count)), JobHistory(count))


def dies(history: JobHistory, at_step: int | None, returncode: int = 1, **rules: Any) -> JobHistory | Finish:
    """What comes after an incarnation whose process 0 ends with `returncode` at a step, and the others with it."""
    steps = {} if at_step is None else {0: at_step, 1: at_step - 1}
    state = State(RestartPolicy(**{"max_restarts": 99, **rules}), frozenset(range(history.hosts)), history, steps=steps)
    others = [Exit(index, -15) for index in range(1, history.hosts)]
    state, _ = supervise.on_exits(state, [Exit(0, returncode)])
    effect = supervise.on_exits(state, others)[1][0] if others else supervise._after_the_last(state)
    assert isinstance(effect, Restart | Finish)
    return effect.history if isinstance(effect, Restart) else effect


def test_the_first_failure_ends_the_others_once() -> None:
    state, effects = supervise.on_exits(running(3), [Exit(1, 1)])
    assert effects == (SendSignal(frozenset({0, 2}), signal.SIGTERM, state.policy.end_grace_s),)
    state, effects = supervise.on_exits(state, [Exit(0, -15)])
    assert effects == ()
    _, effects = supervise.on_exits(state, [Exit(2, -9)])
    assert effects == (Finish(1),), "the cause's code, not that of those who were ended for it"


def test_a_killed_peer_is_the_cause_among_survivors_that_abort_or_raise() -> None:
    assert supervise.first_cause([Exit(0, 1), Exit(1, -signal.SIGABRT), Exit(2, -9), Exit(3, 0)]) == Exit(2, -9)
    assert supervise.first_cause([Exit(3, 0)]) is None


@pytest.mark.parametrize("crash", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_survivor_that_crashes_is_not_the_cause_if_a_peer_was_killed(crash: int) -> None:
    assert supervise.first_cause([Exit(0, -crash), Exit(1, -signal.SIGKILL)]) == Exit(1, -signal.SIGKILL)
    assert supervise.first_cause([Exit(0, -crash), Exit(1, 0)]) == Exit(0, -crash)
    assert supervise.on_exits(running(2), [Exit(0, -crash), Exit(1, -signal.SIGKILL)])[1] == (Finish(137),)


def test_a_crash_is_the_cause_among_survivors_that_raise_and_an_abort_is_not() -> None:
    """What a job did whose host 2 crashed: JAX's client aborted the others."""
    aborted = [Exit(0, -signal.SIGABRT), Exit(1, 1), Exit(3, -signal.SIGABRT)]
    assert supervise.first_cause([*aborted, Exit(2, -signal.SIGSEGV)]) == Exit(2, -signal.SIGSEGV)
    assert supervise.first_cause(aborted) == Exit(1, 1)


@pytest.mark.parametrize(
    ("moments", "finish"),
    [
        # A fenced host is the cause beside one that lost it, and whenever it is seen: a restart would fence it again.
        ([[(0, 1), (1, 5)]], Finish(5)),
        ([[(0, 1)], [(1, 5)]], Finish(5)),
        ([[(0, -9)], [(1, 4)]], Finish(4)),
        ([[(1, 6)], [(0, -15)]], Finish(6)),
        ([[(1, 2), (0, -6)]], Finish(2)),
        ([[(0, 1)], [(1, -15)]], None),
        ([[(0, 3), (1, 1)]], None),
    ],
)
def test_a_code_that_a_restart_cannot_fix_is_the_jobs(
    moments: list[list[tuple[int, int]]], finish: Finish | None
) -> None:
    state, effect = running(2, max_restarts=9), None
    for exits in moments:
        state, effects = supervise.on_exits(state, [Exit(*exit_) for exit_ in exits])
        effect = effects[-1]
    assert effect == finish if finish else isinstance(effect, Restart)


@pytest.mark.parametrize(
    ("moments", "rules", "about"),
    [
        ([[(0, 1), (1, 5)]], {}, "the job ends with 5: host-1 exited with code 5 first; a restart cannot fix that"),
        (
            [[(1, 1)], [(0, -15)]],
            {},
            "the job ends with 1: host-1 exited with code 1 first; not restarted: --max_restarts is 0",
        ),
        (
            [[(1, 1)], [(0, 5)]],
            {},
            "the job ends with 5: host-1 exited with code 1 first, then host-0 exited with code 5; ",
        ),
        (
            [[(1, -9)], [(0, -6)]],
            {"elastic": (2, 2), "max_restarts": 1},
            "was ended by SIGKILL first; 1 hosts are left",
        ),
        ([[(0, 75), (1, 75)]], {"max_preemptions": 0}, "the job ends with 75: preempted 1 times, which is the limit"),
    ],
)
def test_the_end_names_the_host_that_failed_first(
    moments: list[list[tuple[int, int]]], rules: dict[str, Any], about: str
) -> None:
    state, effect = running(2, **rules), None
    for exits in moments:
        state, (effect,) = supervise.on_exits(state, [Exit(*exit_) for exit_ in exits])
    assert isinstance(effect, Finish) and about in effect.about, effect


@pytest.mark.parametrize(
    ("max_restarts", "about"), [(0, "; not restarted: --max_restarts is 0"), (3, "; --max_restarts=3 is used up")]
)
def test_the_end_says_why_the_job_is_not_restarted(max_restarts: int, about: str) -> None:
    effect = dies(JobHistory(2, failures=max_restarts), None, max_restarts=max_restarts)
    assert isinstance(effect, Finish) and effect.about.endswith(about), effect


@pytest.mark.parametrize(
    ("signum", "heard", "shorter"),
    [
        (signal.SIGINT, {0}, True),  # the one that has an agent has ended
        (signal.SIGINT, {0, 1}, False),  # it may be saving
        (signal.SIGTERM, {0}, False),
    ],
)
def test_after_a_ctrl_c_a_host_without_an_agent_that_stays_behind_has_a_short_grace(
    signum: int, heard: set[int], shorter: bool
) -> None:
    state, _ = supervise.on_signal(replace(running(2, end_grace_s=3.0), heard=frozenset(heard)), signum)
    state, effects = supervise.on_exits(state, [Exit(0, -signum)])
    assert effects == ((SendSignal(frozenset({1}), 0, 3.0),) if shorter else ())


def test_processes_that_end_well_leave_the_others_running() -> None:
    state, effects = supervise.on_exits(running(2), [Exit(0, 0)])
    assert (state.running, effects) == (frozenset({1}), ())
    assert supervise.on_exits(state, [Exit(1, 0)])[1] == (Finish(0),)


def test_restarts_are_counted_and_run_out() -> None:
    (effect,) = supervise.on_exits(running(1, max_restarts=1), [Exit(0, 3)])[1]
    assert isinstance(effect, Restart) and (effect.history.restarts, effect.history.failures) == (1, 1)
    spent = State(RestartPolicy(max_restarts=1), frozenset({0}), effect.history)
    assert supervise.on_exits(spent, [Exit(0, 3)])[1] == (Finish(3),)


def test_after_an_operators_signal_nothing_is_restarted_and_the_second_one_kills() -> None:
    state, effects = supervise.on_signal(running(2, max_restarts=9), signal.SIGTERM)
    assert effects == (SendSignal(frozenset({0, 1}), signal.SIGTERM, state.policy.stop_grace_s),)
    assert supervise.on_signal(state, signal.SIGINT)[1] == (SendSignal(frozenset({0, 1}), signal.SIGKILL, 0.0),)
    state, effects = supervise.on_exits(state, [Exit(0, -15)])
    assert effects == (), "the others have the signal already, and their time to save"
    assert supervise.on_exits(state, [Exit(1, 0)])[1] == (Finish(143),)


@pytest.mark.parametrize(
    ("signals", "passed"),
    [
        ([signal.SIGHUP], [signal.SIGTERM]),
        ([signal.SIGHUP, signal.SIGHUP, signal.SIGTERM], [signal.SIGTERM]),  # a terminal, and then its session, ends
        ([signal.SIGTERM, signal.SIGHUP, signal.SIGHUP], [signal.SIGTERM]),
        ([signal.SIGHUP, signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGKILL]),
        ([signal.SIGINT, signal.SIGTERM], [signal.SIGINT, signal.SIGKILL]),
    ],
)
def test_a_closed_terminal_is_a_preemption_and_never_a_second_signal(signals: list[int], passed: list[int]) -> None:
    state, sent = running(2), []
    for signum in signals:
        state, effects = supervise.on_signal(state, signum)
        sent += [effect.signum for effect in effects if isinstance(effect, SendSignal)]
        assert supervise.signal_name(signum) in supervise.describe_signal(signum, effects)
    assert sent == passed
    assert supervise.on_exits(state, [Exit(0, 75), Exit(1, 75)])[1] == (Finish(75),)


def test_a_job_stopped_while_it_waits_to_start_again_ends_as_it_last_ended() -> None:
    failed = dies(JobHistory(1), at_step=None, returncode=-signal.SIGKILL)
    assert isinstance(failed, JobHistory) and supervise.stopped_between(failed) == Finish(137)
    preempted = dies(failed, at_step=3, returncode=75)
    assert isinstance(preempted, JobHistory) and supervise.stopped_between(preempted) == Finish(75)


def test_a_preempted_job_resumes_for_free_and_its_hosts_get_time_to_save() -> None:
    state, effects = supervise.on_exits(running(2, max_restarts=0), [Exit(1, 75)])
    assert effects == (SendSignal(frozenset({0}), 0, state.policy.stop_grace_s),), "no signal: they are saving already"
    (effect,) = supervise.on_exits(state, [Exit(0, 75)])[1]
    assert isinstance(effect, Restart)
    assert (effect.history.failures, effect.history.preemptions, effect.history.delay_s) == (0, 1, 0.0)
    worn = State(RestartPolicy(max_preemptions=1), frozenset({0}), effect.history)
    assert supervise.on_exits(worn, [Exit(0, 75)])[1] == (Finish(75),), "even this is bounded"


def test_when_the_operator_stops_the_job_preempted_is_its_code() -> None:
    state, _ = supervise.on_signal(running(1, max_restarts=9), signal.SIGTERM)
    assert supervise.on_exits(state, [Exit(0, 75)])[1] == (Finish(75),)


def test_only_a_host_whose_heartbeats_have_stopped_is_killed() -> None:
    state = running(3, hang_after_s=10.0)
    assert supervise.on_silence(state, {0: Sign(9.0), 1: Sign(10.0)})[1] == ()
    state, effects = supervise.on_silence(state, {0: Sign(9.0), 1: Sign(10.1), 7: Sign(99.0)})
    assert (state.hung, effects) == (frozenset({1}), (SendSignal(frozenset({1}), signal.SIGKILL, 0.0),))
    assert supervise.on_silence(running(1, hang_after_s=0.0), {0: Sign(1e9)})[1] == ()


def test_those_that_wait_for_a_frozen_host_are_not_ended_and_an_elastic_job_loses_only_that_one() -> None:
    state = running(3, hang_after_s=10.0, elastic=(1, 3), max_restarts=1)
    waiting = Sign(10.5, pulse_age_s=1.0, step=9, steps=9)
    frozen = replace(waiting, pulse_age_s=16.0)
    assert supervise.on_silence(state, {0: waiting, 1: waiting, 2: replace(frozen, idle_s=9.9)})[1] == ()
    state, effects = supervise.on_silence(state, {0: waiting, 1: waiting, 2: frozen})
    assert effects == (SendSignal(frozenset({2}), signal.SIGKILL, 0.0),)
    state, _ = supervise.on_exits(state, [Exit(2, -9)])
    (effect,) = supervise.on_exits(state, [Exit(0, -6), Exit(1, -6)])[1]
    assert isinstance(effect, Restart) and effect.history.hosts == 2


def test_a_crash_loop_at_one_step_is_named_and_stepped_back_from() -> None:
    history = JobHistory(2)
    for deaths in range(1, 3):
        history = dies(history, at_step=41, step_back_after=3)
        assert isinstance(history, JobHistory) and (history.same_step, history.step_back) == (deaths, 0)
    history = dies(history, at_step=41, step_back_after=3)
    assert isinstance(history, JobHistory) and history.step_back == 1
    assert history.notices[0].startswith("crash loop: 3 deaths in a row at step 41; resuming from 1 ")
    history = dies(history, at_step=45, step_back_after=3)
    assert isinstance(history, JobHistory) and history.step_back == 0, "it got past: the newest step counts again"


def test_deaths_at_other_steps_are_no_crash_loop() -> None:
    history = JobHistory(1)
    for step in (10, 20, 10, 20, 10, 20):
        history = dies(history, at_step=step, step_back_after=2)
        assert isinstance(history, JobHistory) and history.step_back == 0
    unknown = dies(dies(JobHistory(1), None, step_back_after=1), None, step_back_after=1)
    assert isinstance(unknown, JobHistory) and unknown.step_back == 0, (
        "a job without a heartbeat has no step to compare"
    )


def test_the_pause_before_a_restart_doubles_without_progress_up_to_a_bound() -> None:
    history, delays = JobHistory(1), []
    for _ in range(8):
        history = dies(history, at_step=5, backoff_s=1.0, backoff_max_s=20.0, step_back_after=99)
        assert isinstance(history, JobHistory)
        delays.append(history.delay_s)
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 20.0, 20.0, 20.0]
    history = dies(history, at_step=6, backoff_s=1.0)
    assert isinstance(history, JobHistory) and history.delay_s == 1.0


@pytest.mark.parametrize(
    ("reached", "delays"),
    [
        ([None, None, None, None], [1, 2, 4, 8]),  # dies before its agent was ever heard of
        ([None, None, 0, None, None], [1, 2, 1, 2, 4]),
        ([10, 9, 10, 3], [1, 2, 4, 8]),  # comes back and gets no further
        ([10, 20, 30], [1, 1, 1]),
        ([10, 10, 10, 11, 11], [1, 2, 4, 1, 2]),
    ],
)
def test_the_pause_doubles_for_each_start_that_came_no_further(reached: list[int | None], delays: list[int]) -> None:
    history: JobHistory | Finish = JobHistory(1)
    for step, delay_s in zip(reached, delays, strict=True):
        assert isinstance(history, JobHistory)
        history = dies(history, at_step=step, backoff_s=1.0, step_back_after=99)
        assert isinstance(history, JobHistory) and history.delay_s == delay_s


def test_an_elastic_job_comes_back_without_its_lost_host_until_too_few_are_left() -> None:
    history = dies(JobHistory(3), at_step=5, returncode=-signal.SIGKILL, elastic=(2, 4))
    assert isinstance(history, JobHistory) and history.hosts == 2 and history.notices == ("elastic: 3 hosts -> 2",)
    assert dies(history, at_step=9, returncode=-signal.SIGKILL, elastic=(2, 4)) == Finish(137)
    same = dies(JobHistory(3), at_step=5, returncode=1, elastic=(2, 4))
    assert isinstance(same, JobHistory) and same.hosts == 3, "a program that fails has not lost its host"
