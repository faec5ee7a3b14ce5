"""The rules of a supervisor: what to do when processes exit, hang, or an operator's signal comes. Pure.

A launcher (local, Slurm, ...) holds a `State`, feeds it what it sees and carries out the effects it gets back:

    running --a process fails or hangs--> ending (the others are signalled to end) --all exited--> Restart or Finish
    running --a process leaves preempted--> leaving (the others are saving the same step) --all exited--> Restart
    running --operator's signal--> stopping (the signal goes to all) --all exited--> Finish
    between two incarnations --operator's signal--> Finish(the last failure's code)
    running --all exited with 0--> Finish(0)

`JobHistory` is what is known across incarnations: the restart budget, and whether the job dies at the same step each
time.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from launch.contract import EXIT_PREEMPTED
from orchestrator.rules import stalls

# A second start cannot fix these: wrong usage stays wrong, what was found damaged or lost stays so, a fenced job would
# fence its own successor in turn, and where nothing can be restored nothing will be.
FINAL_CODES = frozenset({2, 4, 5, 6})
# Signals that a process brings upon itself.
CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})
_OWN_DOING = CRASHES | {signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS, signal.SIGPIPE}


@dataclass(frozen=True)
class Exit:
    """Process `index` has ended. `returncode` is `subprocess`'s: a negative number is the signal that ended it. `sent`:
    signals that its supervisor had sent it."""

    index: int
    returncode: int
    sent: frozenset[int] = field(default=frozenset(), compare=False)

    @property
    def failed(self) -> bool:
        return self.returncode not in (0, EXIT_PREEMPTED)

    @property
    def code(self) -> int:
        """What a shell would show: 128 + signal for a signal."""
        return self.returncode if self.returncode >= 0 else 128 - self.returncode

    @property
    def from_outside(self) -> bool:
        """Whether it died as a process does whose machine is lost: of a signal that neither it itself nor its
        supervisor has sent. A shell, or another program that has started it, shows the signal in its code."""
        signum = self.code - 128
        return 0 < signum <= signal.NSIG and signum not in _OWN_DOING | self.sent

    def describe(self) -> str:
        if self.returncode >= 0:
            return f"exited with code {self.returncode}"
        return f"was ended by {signal_name(-self.returncode)}"


@dataclass(frozen=True)
class RestartPolicy:
    """What the user chose. `end_grace_s` is between SIGTERM and SIGKILL for the others of a failed process;
    `stop_grace_s` between an operator's signal and SIGKILL, long enough for a last save. `hang_after_s`: a process
    whose newest heartbeat is so old is taken for hung, if it is the one that holds the others up (0: never).
    `backoff_s` before the first restart, doubled up to `backoff_max_s` for each further one that came no further than
    one before it.
    `step_back_after`: after so many deaths at the same step the job resumes one step earlier. Preemptions count
    against `max_preemptions`, not against `max_restarts`. `elastic` (least, most): hosts of a restart, as many as are
    there."""

    max_restarts: int = 0
    max_preemptions: int = 100
    end_grace_s: float = 5.0
    stop_grace_s: float = 60.0
    hang_after_s: float = 900.0
    backoff_s: float = 0.5
    backoff_max_s: float = 60.0
    step_back_after: int = 3
    elastic: tuple[int, int] | None = None
    final_codes: frozenset[int] = FINAL_CODES


@dataclass(frozen=True)
class JobHistory:
    """What is known across incarnations. `same_step` deaths in a row came at `last_step`; the next incarnation leaves
    out the `step_back` newest steps; `hosts` are there for it; it starts after `delay_s`. `furthest`: the newest step
    that any failed incarnation reached, if that is known; `fruitless`: failures in a row that came no further;
    `last`: the failure that ended the last incarnation. `notices`: for the operator."""

    hosts: int
    restarts: int = 0
    failures: int = 0
    preemptions: int = 0
    last_step: int | None = None
    same_step: int = 0
    step_back: int = 0
    furthest: int | None = None
    fruitless: int = 0
    delay_s: float = 0.0
    last: Exit | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """One incarnation of the job as its supervisor sees it. `cause`: the first failure; `final`: the first exit that a
    restart cannot fix, whenever it came; `preempted`: processes that left with EXIT_PREEMPTED."""

    policy: RestartPolicy
    running: frozenset[int]
    history: JobHistory
    cause: Exit | None = None
    final: Exit | None = None
    stop_signal: int | None = None
    preempted: frozenset[int] = frozenset()
    hung: frozenset[int] = frozenset()
    steps: Mapping[int, int] = field(default_factory=dict)  # process -> the step of its newest heartbeat
    heard: frozenset[int] = frozenset()  # processes that ever recorded a heartbeat: they have an agent


@dataclass(frozen=True)
class SendSignal:
    """Send `signum` to these processes; SIGKILL those that are still there after `grace_s`."""

    processes: frozenset[int]
    signum: int
    grace_s: float


@dataclass(frozen=True)
class Restart:
    """All have ended: start the job again as `history` says."""

    history: JobHistory


@dataclass(frozen=True)
class Finish:
    """All have ended: the launcher leaves with this code. `about` says why, for the operator."""

    code: int
    about: str = field(default="", compare=False)


Effect = SendSignal | Restart | Finish


def signal_name(signum: int) -> str:
    """`SIGKILL` for 9; `signal 99` for a number without a name."""
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def first_cause(exits: Sequence[Exit], final_codes: Set[int] = FINAL_CODES) -> Exit | None:
    """The failure among exits seen at the same moment that most likely caused the others; None if all are 0."""

    def rank(exit_: Exit) -> tuple[int, bool, int]:
        # A process ended by a signal from outside was the lost peer, and so was one that crashed. Survivors raise, or
        # JAX's client aborts them ("another task died"): that is the least likely cause. A code that says what was
        # wrong (fenced, damage) does not come from the loss of a peer.
        signum = -exit_.returncode
        order = 3 if signum == signal.SIGABRT else 2 if signum < 0 else 1 if signum in CRASHES else 0
        return order, exit_.returncode not in final_codes, exit_.index

    return min((exit_ for exit_ in exits if exit_.failed), key=rank, default=None)


def on_exits(state: State, exits: Sequence[Exit]) -> tuple[State, tuple[Effect, ...]]:
    """Processes have ended, all seen at the same moment. Returns the new state and what to do now."""
    if not exits:
        return state, ()
    ending, stopped_before = state.cause is not None or state.stop_signal is not None, state.cause is not None
    leaving = bool(state.preempted)
    finals = [exit_ for exit_ in exits if exit_.returncode in state.policy.final_codes]
    state = replace(
        state,
        running=state.running - {exit_.index for exit_ in exits},
        cause=state.cause or first_cause(exits, state.policy.final_codes),
        final=state.final or min(finals, key=lambda exit_: exit_.index, default=None),
        preempted=state.preempted | {exit_.index for exit_ in exits if exit_.returncode == EXIT_PREEMPTED},
    )
    if not state.running:
        return state, (_after_the_last(state),)
    if state.stop_signal == signal.SIGINT and not stopped_before and not state.heard & state.running:
        # They have nothing to save, and may never end by themselves: some wait for the one that has ended, and a
        # Ctrl-C that comes while Python imports, or collects garbage, may be lost.
        return state, (SendSignal(state.running, 0, state.policy.end_grace_s),)
    if ending:
        return state, ()
    if state.cause is not None:
        return state, (SendSignal(state.running, signal.SIGTERM, state.policy.end_grace_s),)
    if (
        state.preempted and not leaving
    ):  # they are saving the same step: time for that, then they are signalled once more
        return state, (SendSignal(state.running, 0, state.policy.stop_grace_s),)
    return state, ()


def on_signal(state: State, signum: int) -> tuple[State, tuple[Effect, ...]]:
    """The operator sent `signum` to the launcher: pass it on, and at the second one kill.

    A closed terminal (SIGHUP) is a preemption, and nobody's impatience: the hosts get SIGTERM, and it never counts as a
    second signal. Nor does what comes first after it, as the end of a session sends both.
    """
    if state.stop_signal is None:
        passed = signal.SIGTERM if signum == signal.SIGHUP else signum
        return replace(state, stop_signal=signum), (SendSignal(state.running, passed, state.policy.stop_grace_s),)
    if signum == signal.SIGHUP:
        return state, ()
    if state.stop_signal == signal.SIGHUP:
        return replace(state, stop_signal=signum), ()
    return state, (SendSignal(state.running, signal.SIGKILL, 0.0),)


def describe_signal(signum: int, effects: Sequence[Effect]) -> str:
    """A signal and what came of it, in words for the operator."""
    name = signal_name(signum)
    match effects:
        case [SendSignal(processes, signal.SIGKILL, _)]:
            return f"{name} received again: SIGKILL to {len(processes)} hosts"
        case [SendSignal(processes, passed, _)] if passed != signum:
            return f"{name} received, passing it to {len(processes)} hosts as {signal_name(passed)}: save and leave"
        case [SendSignal(processes, _, _)]:
            return f"{name} received, passing it to {len(processes)} hosts"
    return f"{name} received: the hosts are stopping already"


def stopped_between(history: JobHistory) -> Finish:
    """The operator stops a job of which nothing runs, as it was about to start again: it ends as it last ended."""
    if history.last is None:  # each host saved, and left to be started again
        return Finish(EXIT_PREEMPTED, "stopped before the restart; the job had saved, and was preempted")
    code = history.last.code
    return Finish(code, f"stopped before the restart; the job ends with {code}: {_named(history.last)}")


def on_silence(state: State, signs: Mapping[int, stalls.Sign]) -> tuple[State, tuple[Effect, ...]]:
    """`signs`: of the hosts that recorded a heartbeat. Kills the hung, and not those that wait for them; their end ends
    the job."""
    limit_s = state.policy.hang_after_s
    if not limit_s or state.cause is not None or state.stop_signal is not None:
        return state, ()
    hung = stalls.hung({index: sign for index, sign in signs.items() if index in state.running}, limit_s)
    if not hung:
        return state, ()
    return replace(state, hung=hung), (SendSignal(hung, signal.SIGKILL, 0.0),)


def _named(exit_: Exit) -> str:
    return f"host-{exit_.index} {exit_.describe()}"


def _after_the_last(state: State) -> Effect:
    rules, history = state.policy, state.history
    if state.cause is None and not state.preempted:
        return Finish(0)
    code = EXIT_PREEMPTED if state.cause is None else state.cause.code
    if state.stop_signal is not None:
        return _finish(state, code, f"stopped by {signal_name(state.stop_signal)}")
    if state.final is not None:
        return _finish(state, state.final.code, "a restart cannot fix that")
    next_history = _preempted(state) if state.cause is None else _failed(state, state.cause)
    if next_history.failures > rules.max_restarts:
        return _finish(state, code, _no_restart(rules.max_restarts))
    if next_history.preemptions > rules.max_preemptions:
        return _finish(state, code, f"preempted {next_history.preemptions} times, which is the limit")
    least = rules.elastic[0] if rules.elastic else 1
    if next_history.hosts < least:
        return _finish(state, code, f"{next_history.hosts} hosts are left, and {least} are required")
    return Restart(replace(next_history, restarts=history.restarts + 1, last=state.cause))


def _no_restart(max_restarts: int) -> str:
    return f"--max_restarts={max_restarts} is used up" if max_restarts else "not restarted: --max_restarts is 0"


def _finish(state: State, code: int, why: str) -> Finish:
    """Says which host failed first, and which one's code is the job's if that is another."""
    if state.cause is None:
        return Finish(code, f"the job ends with {code}: {why}")
    about = f"{_named(state.cause)} first"
    if state.final is not None and state.final != state.cause and state.final.code == code:
        about += f", then {_named(state.final)}"
    return Finish(code, f"the job ends with {code}: {about}; {why}")


def _preempted(state: State) -> JobHistory:
    history = replace(state.history, preemptions=state.history.preemptions + 1, delay_s=0.0)
    return replace(history, notices=("preempted: the job has saved and resumes",))


def _failed(state: State, cause: Exit) -> JobHistory:
    """The history after an incarnation that failed. Dying at the same step again and again is a crash loop: the state
    that leads there is at fault, so a step before it is tried."""
    rules, old = state.policy, state.history
    reached = max(state.steps.values(), default=None)
    again = reached is not None and reached == old.last_step
    same_step = old.same_step + 1 if again else 1
    step_back = old.step_back if again else 0
    notices: tuple[str, ...] = ()
    if again and same_step >= rules.step_back_after:
        step_back, same_step = step_back + 1, 0
        notices = (
            f"crash loop: {rules.step_back_after} deaths in a row at step {reached}; "
            f"resuming from {step_back} restorable steps before the newest",
        )
    further = reached is not None and (old.furthest is None or reached > old.furthest)
    fruitless = 0 if further or not old.failures else old.fruitless + 1
    delay_s = min(rules.backoff_max_s, rules.backoff_s * 2 ** min(fruitless, 30))
    hosts = old.hosts
    if rules.elastic and (cause.returncode == -signal.SIGKILL or state.hung):
        hosts -= max(1, len(state.hung))  # a host that dies of SIGKILL or hangs is taken for lost
        notices = (*notices, f"elastic: {old.hosts} hosts -> {hosts}")
    return replace(
        old,
        hosts=hosts,
        failures=old.failures + 1,
        last_step=reached,
        same_step=same_step,
        step_back=step_back,
        furthest=reached if further else old.furthest,
        fruitless=fruitless,
        delay_s=delay_s,
        notices=notices,
    )
