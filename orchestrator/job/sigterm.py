"""SIGTERM in this process: one owner, for all agents in it.

The rule. While an agent that can save is open, SIGTERM means "save, and leave": every open agent notices it at its
next step, and a second SIGTERM ends the process at once. Before and after, in readers, and in children that the process
forks, SIGTERM does what it did without us. A handler of the program's own stays in force: it is called after ours, each
time. Once SIGTERM has come, an agent that is opened later notices it, too: the machine goes away all the same.

In a job of several processes JAX's preemption service listens, from C++, and all hosts agree on a step. Its handler is
left in place while an agent is open, put aside when the last one is closed (nobody would act on it), and never left to
a forked child, which `multiprocessing` could then not end.

SIGINT and SIGHUP are left to Python and to the program. `listen` and `stop`: any thread; but Python lets only the main
thread install a handler, so where an agent is opened on another one, that is said and SIGTERM is not heard.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from absl import logging

from orchestrator.job import sigaction


class Listening:
    """An open agent that can save. `stop` when it is closed."""

    def stop(self, *, leaving: bool = False) -> None:
        """`leaving`: the job is being preempted, so a host that has not had its own SIGTERM yet may still get it: JAX's
        handler stays. Idempotent."""
        with _owner.lock:
            if self in _owner.listening:
                _owner.listening.remove(self)
                if not _owner.listening:
                    _owner.give_back(leaving)


def listen(*, jax_agrees: bool) -> Listening:
    """From now until `stop` SIGTERM means "save, and leave". `jax_agrees`: it is JAX's preemption service that hears it
    and has all processes agree on a step."""
    listening = Listening()
    with _owner.lock:
        _owner.listening.add(listening)
        _owner.take(jax_agrees)
    return listening


def asked() -> bool:
    """Whether SIGTERM has come since an agent was first opened here."""
    if _owner.taken and not _owner.asked and signal.getsignal(signal.SIGTERM) is not _heard:
        _say(
            "the program has installed a handler of its own after the agent was opened: the agent hears only if that "
            "one calls the handler that it replaced"
        )
    return _owner.asked


def forget() -> None:
    """For a program that goes on after a SIGTERM: agents that are opened from now on start afresh."""
    _owner.asked = False


def _say(why: str) -> None:
    """Once for each reason."""
    if why not in _owner.said:
        _owner.said.add(why)
        logging.warning("SIGTERM: %s", why)


class _Owner:
    """taken: our handler is installed. former: what Python had before. jaxs: JAX's handler, where it was ever seen.
    aside: the same, while no agent is open."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.listening: set[Listening] = set()
        self.asked = self.taken = self.forks = False
        self.former: Any = signal.SIG_DFL
        self.jaxs: sigaction.SigAction | None = None
        self.aside: sigaction.SigAction | None = None
        self.said: set[str] = set()
        self.mask = threading.local()

    def take(self, jax_agrees: bool) -> None:
        if not self.forks:
            self.forks = True
            os.register_at_fork(before=self._before_fork, after_in_parent=self._unmask, after_in_child=self._in_child)
        if self.taken and signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # else the program has put us aside
            return
        former, action = self._former(), sigaction.action()
        if self.aside and action and not action.handler:  # since the last agent was closed
            sigaction.set_action(self.aside)
            action, self.aside = self.aside, None
        if is_jaxs := sigaction.is_jaxs(action):
            self.jaxs = action
        on_main_thread = threading.current_thread() is threading.main_thread()
        if jax_agrees and not (callable(former) and self.jaxs and on_main_thread):
            if is_jaxs:
                sigaction.reset_after_first()
            elif callable(former):
                _say(
                    "the program's own handler has taken the place of JAX's, and this host cannot tell the others when "
                    "it is preempted; install it before jax.distributed.initialize"
                )
        elif former is signal.SIG_IGN:
            _say("it is ignored in this process, and stays so: a preemption is not noticed")
        elif former is None or (former is signal.SIG_DFL and action and action.handler and not is_jaxs):
            _say("another library has a handler for it that Python does not know: a preemption is not noticed")
        elif not on_main_thread:
            _say("the agent was not opened on the main thread, which alone may listen: a preemption is not noticed")
        elif callable(former) or not self.asked:  # after the first one, the second has its usual effect
            self.former, self.taken = former, True
            signal.signal(signal.SIGTERM, _heard)
            if not callable(former):  # the program's own wants to hear them all
                sigaction.reset_after_first()

    def _former(self) -> Any:
        former = signal.getsignal(signal.SIGTERM)
        return self.former if former is _heard else former

    def give_back(self, leaving: bool) -> None:
        action = sigaction.action()
        if self.taken and signal.getsignal(signal.SIGTERM) is _heard:  # else the program has another by now
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, self.former)
            elif action and self.former is signal.SIG_DFL:  # `_heard` passes on what it gets all the same
                sigaction.set_action(sigaction.SigAction())
        elif sigaction.is_jaxs(action) and not leaving:
            self.aside = action
            sigaction.set_action(sigaction.SigAction())
        self.taken = False

    # Children.

    def _before_fork(self) -> None:
        # A child that is ended at once must not lose that signal to our handler: it waits until that is gone.
        self.mask.former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _unmask(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask.former)

    def _in_child(self) -> None:
        self.lock = threading.RLock()  # another thread may have held it
        if self.taken or signal.getsignal(signal.SIGTERM) is _heard or sigaction.is_jaxs(sigaction.action()):
            former = self._former()
            signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)
        self.listening.clear()
        self.asked = self.taken = False
        self.jaxs = self.aside = None
        self._unmask()


def _heard(number: int, frame: FrameType | None) -> None:
    """Our handler, on the main thread."""
    former = _owner.former
    if _owner.listening:
        _owner.asked = True
        if _owner.jaxs and _owner.jaxs.handler:
            sigaction.call_handler(_owner.jaxs, number)
    elif not callable(former):  # somebody has kept us, though no agent is open
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    if callable(former):
        former(number, frame)


_owner = _Owner()
