"""How a process ends when it fails, and how the others of its job learn of it: within seconds, with the cause.

Without this, one host's uncaught exception shows only after minutes: JAX's exit handler waits for the other processes
at a barrier, they wait for this one in a collective, and at last all are ended by SIGABRT. Here instead

1. the one that fails reports it on the job's board (`failure_board`): who it is, what happened, its exit code;
2. it runs the program's own exit handlers, but not JAX's barrier, and ends with its exit code;
3. the others print who failed and why, let a save in flight end, and end with that same exit code: so whichever of
   them a supervisor sees first, it learns the right one. Process 0 is the last, since it holds the board.

What counts as failing: an exception that nothing caught (Python prints its traceback as ever; `sys.excepthook`s of
others are called), `sys.exit` with a code other than 0 and 75 (told to stop), and the end of a program that has left an
agent's `with` block by an exception and has been at no barrier with the others since. A program that merely ends waits
for the others as it always did, and ends nobody.

An uncaught error of this package ends any program with the error's documented exit code, alone or in a job. Never in
an interactive interpreter, a notebook or a test runner: those handle exceptions themselves.

Every wait here is bounded, and no step of it may raise: a process that is failing must not fail at that.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn, Protocol

from orchestrator.errors import EXIT_FAILED, EXIT_PREEMPTED, OrchestratorError
from orchestrator.job import bounded_calls, ignored_interrupts
from orchestrator.job.exit_codes import describe, exit_code
from orchestrator.job.failure_board import Board, FailureBoard, ProcessFailure
from orchestrator.job.mistakes import without_our_frames
from orchestrator.job.poll import Pause, poll
from orchestrator.texts import printable

POLL_S = 0.5  # from one poll of the board to the next, in jobs of up to 500 processes
FIRST_S = 2.0  # for the process that failed to end before the others do, so that a supervisor sees it first
TOGETHER_S = 5.0  # for the others to reach their end, too, before JAX's barrier is given up
BARRIER_S = 300.0  # JAX's own patience at exit
LINGER_S = 15.0  # of process 0 for the others' ends: JAX aborts whoever loses the board's service
GRACE_S = 30.0  # Options.failure_grace_s's default: for a save in flight, and for the program's exit handlers
_PAUSE = Pause(0.01, POLL_S, growth=0.5)
_STEADY = Pause(0.05, 0.05)


class SavingAgent(Protocol):
    """An agent, as far as it matters here. `in_flight`: the step that it is saving."""

    @property
    def in_flight(self) -> int | None: ...


# What an uncaught exception does, in any process.


def install_excepthook() -> None:
    """From now on uncaught errors of this package end the program with their own exit codes, and a Ctrl-C that Python
    ignores comes again. Idempotent; any hook that is there, or comes later and calls the one before it, stays in
    use."""
    ignored_interrupts.install()
    if getattr(sys.excepthook, "reports_failures", False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        try:
            if _shown_elsewhere(error):
                print(kind.__name__, file=sys.stderr, flush=True)
            else:
                before(kind, error, without_our_frames(error, trace))
        finally:
            _uncaught(error)

    hook.reports_failures = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _uncaught(error: BaseException) -> None:
    # The interpreter sets `last_value` when it gives up; a program that calls the hook to show an error goes on.
    given_up = getattr(sys, "last_value", None) is error and threading.current_thread() is threading.main_thread()
    if not given_up or _interactive():
        return
    if _job and joined():
        _job.failed(error)
    elif isinstance(error, OrchestratorError) and error.exit_code != EXIT_FAILED:
        raise SystemExit(error.exit_code)  # by Python's rules: from here, and silently


def _shown_elsewhere(error: BaseException) -> bool:
    """Ctrl-C reaches all processes of a job at once: process 0's traceback is enough, and one line of each other."""
    others = _job is not None and joined() and _job.board.process != 0
    return others and isinstance(error, KeyboardInterrupt) and not _interactive()


def _interactive() -> bool:
    """Whether somebody sits there, at a prompt or a notebook (IPython sets `ps1`, too), who goes on after an error."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive or sys.flags.inspect)


# What the processes of a job do together.

_job: _Job | None = None


def join(board: Board, host: str) -> None:
    """Report to the others of this job should this process fail, and notice when they do. Once per job; later calls do
    nothing. Main thread."""
    global _job
    install_excepthook()
    if not joined():
        _job = _Job(board, host)


def joined() -> bool:
    """Whether a failure of this process is reported to others, and its end waits for nobody."""
    return _job is not None and _job.mine() and _job.board.connected


def leave(code: int) -> NoReturn:
    """End this process with `code`, at once if it failed.

    After 0 and EXIT_PREEMPTED all processes leave together, and JAX may wait for them. One that fails must not: JAX's
    exit handler would wait minutes for the others, who wait for this one, and no launcher would learn of the failure.
    Where the others can learn of it, this module does all that at `sys.exit`.
    """
    if code in (0, EXIT_PREEMPTED) or joined():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def register(agent: SavingAgent, grace_s: float | None) -> None:
    """Once another process has failed, let `agent`'s save in flight take `grace_s` at most; None: stay, whoever fails.
    Errors of this package that nothing catches end the program with their own exit codes from now on."""
    install_excepthook()
    if _job and _job.mine():
        _job.grace_s = grace_s
        _job.agents.add(agent)


def passed_barrier() -> None:
    """All processes have just been at a barrier: what this one has caught before did not end it."""
    if _job:
        _job.caught = _job.exits = None


def block_left(error: BaseException) -> None:
    """An agent's block is being left by `error`. The program may catch it yet."""
    if _job and _job.mine() and exit_code(error) not in (0, EXIT_PREEMPTED) and not _interactive():
        _job.catch(error)


class _Job:
    """This process's part in reporting and noticing. `failure`: nothing has caught it. `caught`: it has left an agent's
    block, and the program may be over it. `exits`: `sys.exit`, which hardly a program catches; likewise."""

    def __init__(self, board: Board, host: str) -> None:
        self.board, self.host = FailureBoard(board), host
        self.grace_s: float | None = GRACE_S
        self.agents: weakref.WeakSet[Any] = weakref.WeakSet()
        self.failure: ProcessFailure | None = None
        self.caught: ProcessFailure | None = None
        self.exits: ProcessFailure | None = None
        self._process_id = os.getpid()
        self._shown = False
        self._at_exit = threading.Event()
        self._ending = threading.Lock()
        self._exit = sys.exit
        sys.exit = self._noting_exit
        atexit.register(self.leave)
        bounded_calls.prepare()  # `leave` runs when Python 3.12 starts no thread any more
        threading.Thread(target=self._watch, name="peer-failure", daemon=True).start()

    def mine(self) -> bool:
        """False in a forked child, which inherits all this and is no part of the job."""
        return os.getpid() == self._process_id

    # This process fails.

    def failed(self, error: BaseException) -> None:
        """The program ends by `error`: nothing has caught it."""
        signum = signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0
        first = self.board.first_failure()
        if first:  # most likely this one failed because that one had
            self._show(first)
            self.failure = replace(first, signum=0)
        else:
            self.failure = ProcessFailure(self.board.process, self.host, describe(error), exit_code(error), signum)
            self.board.report(self.failure)
        self._leave_first()

    def catch(self, error: BaseException) -> None:
        failure = ProcessFailure(self.board.process, self.host, describe(error), exit_code(error))
        if not isinstance(error, SystemExit):
            self.caught = failure
        elif self.caught:  # why the program exits
            self.exits = replace(failure, text=f"{self.caught.text}; then {failure.text}")
        else:
            self.exits = failure
        self._leave_first()

    def _noting_exit(self, status: Any = None, /) -> NoReturn:
        """`sys.exit`. The interpreter does not say, not even to its exit handlers, with which code it ends."""
        error = SystemExit(status)
        if threading.current_thread() is threading.main_thread():
            self.exits = None
            if self.mine():
                block_left(error)
        self._exit(status)

    def _leave_first(self) -> None:
        """Before all other exit handlers, so that `_end` can run those that are left."""
        atexit.unregister(self.leave)
        atexit.register(self.leave)

    # The program ends.

    def leave(self) -> None:
        """Exit handler. Returns if the interpreter may end as ever; ends the process itself if it must wait for
        nobody."""
        self._at_exit.set()
        if not self.mine() or not self.board.connected:
            return
        if self.failure:
            self._end(self.failure)
        failure = self.exits or self.caught
        if failure:
            self.board.report(failure)
        if self.exits:
            self._end(self.exits)
        self.board.leave()
        if self._others_leave(failure):
            return  # JAX's barrier holds nobody up
        self._linger(natural=True)
        self.board.skip_exit_barrier()
        self.board.go()

    def _others_leave(self, failure: ProcessFailure | None) -> bool:
        """Wait until the program of every other process has ended as well. False once it is known that one's will not,
        as it has failed. True, too, if they take longer than JAX would wait: that is for JAX to decide."""
        if not failure:
            found = poll(self._left_or_failed, BARRIER_S, lambda: True, pause=_PAUSE)
            if not isinstance(found, ProcessFailure):
                return True
            self._show(found, leaves=True)
        return poll(self._left_or_gone, TOGETHER_S, lambda: False, pause=_PAUSE)

    def _left_or_failed(self) -> bool | ProcessFailure | None:
        return self.board.first_failure() if self._missing() else True

    def _left_or_gone(self) -> bool | None:
        missing = self._missing()
        if not missing:
            return True
        return False if missing <= self.board.gone() else None

    def _missing(self) -> frozenset[int]:
        """The other processes whose programs have not ended."""
        return self.board.others - self.board.leaving()

    def _end(self, failure: ProcessFailure) -> NoReturn:
        """End this process as `failure` says, on any thread: run what the program wants to be run at exit, wait for
        nobody but, on process 0, those who need it."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread ends the process
        with contextlib.suppress(BaseException):
            atexit.unregister(self.leave)
            self.board.skip_exit_barrier()
            bounded_calls.within(GRACE_S if self.grace_s is None else self.grace_s, atexit._run_exitfuncs)
            bounded_calls.within(1.0, _flush)
            self._linger()
            self.board.go()
            if failure.signum and threading.current_thread() is threading.main_thread():
                signal.signal(failure.signum, signal.SIG_DFL)
                os.kill(os.getpid(), failure.signum)
        os._exit(failure.code)

    def _linger(self, *, natural: bool = False) -> None:
        """Process 0 ends last: the others would be aborted with it. For those that have died nobody waits long.
        `natural`: some end as Python does, which takes longer than `os._exit`."""
        if self.board.process != 0:
            return
        started = time.monotonic()

        def gone() -> bool | None:
            others = self.board.others
            if time.monotonic() - started > FIRST_S:
                others &= self.board.ending()
            return others <= self.board.gone() or None

        poll(gone, LINGER_S, lambda: False, pause=_STEADY)
        time.sleep(1.0 if natural else 0.5)  # from a process's last sign to its end

    # Another process fails.

    def _watch(self) -> None:
        """A thread of its own, for the life of the process."""
        pause_s = POLL_S * max(1.0, self.board.count / 500)
        while not self._at_exit.wait(pause_s):
            if not self.board.connected:
                return
            if self.failure:
                return self._hurry(self.failure)
            if self.grace_s is not None and not _interactive() and (first := self.board.first_failure()):
                return self._follow(first)

    def _hurry(self, failure: ProcessFailure) -> None:
        """The program has failed. Until its exit handlers run, the interpreter waits for its threads."""
        if not self._at_exit.wait(GRACE_S if self.grace_s is None else self.grace_s):
            self._end(failure)

    def _follow(self, first: ProcessFailure) -> None:
        """Another process has failed: end this one, once it has finished what it is saving."""
        self._show(first)
        poll(self._saved, self.grace_s or 0.0, lambda: False, pause=_STEADY)
        if first.process:  # it ends first; a collective that has lost a process may then raise, and all ends by itself
            poll(lambda: first.process in self.board.gone() or None, FIRST_S, lambda: False, pause=_STEADY)
            self._at_exit.wait(FIRST_S / 2)
        if self._at_exit.is_set() or self.failure:
            self._hurry(self.failure or first)
        else:
            self._end(replace(first, signum=0))

    def _saved(self) -> bool | None:
        return None if any(agent.in_flight is not None for agent in list(self.agents)) else True

    def _show(self, first: ProcessFailure, *, leaves: bool = False) -> None:
        if self._shown:
            return
        self._shown = True
        self.board.acknowledge()
        line = f"orchestrator: process {first.process} ({first.host}) has failed: {first.text}"
        if not leaves:
            line += f"; process {self.board.process} ({self.host}) ends with it, with exit code {first.code}"
        saving = [agent.in_flight for agent in list(self.agents) if agent.in_flight is not None]
        if saving and self.grace_s and not leaves:
            line += f", once step {max(saving)} is saved, in {self.grace_s:g} s at most"
        bounded_calls.within(1.0, lambda: print(printable(line), file=sys.stderr, flush=True))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
