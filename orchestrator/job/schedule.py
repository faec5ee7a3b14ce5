"""Which steps a job saves: those that its policy says, each one once its hosts are being preempted, again a step whose
save has failed, and the next one after a step that was lost in memory, on its way to the store.

All processes ask at the same steps and get the same answers. What depends on a clock is for process 0 to say, in a
broadcast; `PollSpacing` keeps those few. May do no I/O: the rendezvous, the measurements and the clock are given.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.job.pacing import Pacing
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.policy import Adaptive, PredictablePolicy, SavePolicy, YieldsToSaves
from orchestrator.rules.records import Json
from orchestrator.rules.save_interval import Cadence
from orchestrator.run.journal_store import JournalStore

_ASK_S = 0.5  # between two questions what has become of a save from memory, at first
POLL_STEPS_MAX = 64  # between two questions to process 0, however far away the next save is


class SaveSchedule:
    """`due` and `reached_preemption` may be collectives: main thread, all processes, at the same steps.

    asked_step: the newest that `due` was asked about; -1 if none. was_due: what it answered last. saved_step: the step
    that was saved last or is being saved; None once that save has failed. failed_step: the step whose save failed last;
    None once it is being saved again. preempted: hosts are being preempted, which is known since `preempted_s` on the
    clock (in seconds, `time.monotonic` but for tests).
    """

    def __init__(
        self, policy: SavePolicy, rendezvous: Rendezvous, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._policy, self._rendezvous, self._timeout_s, self._clock = policy, rendezvous, timeout_s, clock
        self.asked_step, self.was_due = -1, False
        self.saved_step: int | None = None
        self.failed_step: int | None = None
        self.preempted, self.preempted_s = False, 0.0
        self._preemption_step = -1  # for which the hosts have been asked; once a step is enough
        self._last_start_s: float | None = None
        self._saving = False  # as far as this process has noted
        self._spacing = PollSpacing(clock)
        self._pacing: Pacing | None = None
        self._watched: PollSpacing | None = None  # where to ask what has become of a save from memory; as all processes
        self._lost_in_memory = False  # on process 0, whose word counts
        self._again_step = -1  # which is saved instead

    # Questions.

    def due(self, step: int) -> bool:
        """Whether `step` is to be saved now. Raises WaitTimeout naming processes that do not ask at this step."""
        self.asked_step = max(self.asked_step, step)
        due = self._due_by_policy(step)
        self.was_due = self.reached_preemption(step) or due or self._due_again(step)
        return self.was_due

    @property
    def direct(self) -> bool:
        """Whether what is due now is to reach the store without a detour: memory is about to go, or has failed."""
        return self.preempted or self._again_step == self.asked_step

    def _due_again(self, step: int) -> bool:
        """Whether a save is owed for one that was lost in memory. While nobody knows, a collective now and then."""
        if self._watched is None or step < self._watched.next_step:
            return step == self._again_step
        answer = self._rendezvous.broadcast(f"save step {step} instead?", self._fate(step), self._timeout_s)
        self._watched.next_step = int(answer["next"])
        self._watched = self._watched if answer["open"] else None
        self._again_step = step if answer["lost"] else self._again_step
        return step == self._again_step

    def _fate(self, step: int) -> Json:
        """Process 0: what has become of the save from memory."""
        if self._rendezvous.process != 0 or self._watched is None:
            return None
        elapsed_s = self._clock() - (self._last_start_s or 0.0)
        known = self._lost_in_memory or not self._saving
        next_step = self._watched.plan(step, max(_ASK_S, elapsed_s / 4))
        return {"lost": self._lost_in_memory, "open": not known, "next": next_step}

    def _due_by_policy(self, step: int) -> bool:
        elapsed_s = None if self._last_start_s is None else self._clock() - self._last_start_s
        if not self._policy.timed:
            return self._policy.due(step, elapsed_s)
        if step < self._spacing.next_step:  # by time nothing is due, on any host; by step perhaps
            return self._policy.due(step, 0.0)
        answer = self._rendezvous.broadcast(f"save step {step}?", self._answer(step, elapsed_s), self._timeout_s)
        self._spacing.next_step = int(answer["next"])
        return bool(answer["due"])

    def _answer(self, step: int, elapsed_s: float | None) -> Json:
        """Process 0's, which counts: whether a timed policy is due, and at which step to ask again."""
        if self._rendezvous.process != 0:
            return None
        policy = self._policy
        if self._pacing and isinstance(policy, Adaptive):
            policy = self._pacing.informed(policy)
        if self._saving and isinstance(policy, YieldsToSaves):
            policy = policy.while_saving()
        due = policy.due(step, elapsed_s)
        quiet_s = policy.quiet_s(elapsed_s) if isinstance(policy, PredictablePolicy) and not due else 0.0
        return {"due": due, "next": self._spacing.plan(step, quiet_s)}

    def reached_preemption(self, step: int) -> bool:
        """True, on all hosts from the same step on, once any of them has got SIGTERM."""
        if self._preemption_step != step and not self.preempted:
            self._preemption_step = step
            self.preempted = self._rendezvous.preempted(step)
            self.preempted_s = self._clock()
        return self.preempted

    @property
    def cadence(self) -> Cadence | None:
        """What an adaptive policy has chosen, and why. None before the first commit, and on processes other than 0."""
        return self._pacing.chosen if self._pacing else None

    # What became of saves.

    def opened(self, store: JournalStore) -> None:
        """The epoch is open: process 0 measures from now on what an adaptive policy goes by."""
        if self._rendezvous.process == 0 and isinstance(self._policy, Adaptive):
            self._pacing = Pacing(store, self._clock)

    def begin(self, started_s: float) -> None:
        """A save begins, at `started_s` on the clock. Policies in seconds count from here, whatever becomes of it."""
        self._last_start_s = started_s

    def watch(self) -> None:
        """What is about to be saved goes to the store from memory, on some processes at least. All processes."""
        self._watched, self._lost_in_memory = PollSpacing(self._clock), False

    def started(self, step: int) -> None:
        """`step` is being saved in the background: it is not due again unless that fails."""
        self.saved_step, self._saving = step, True
        if self.failed_step == step:
            self.failed_step = None

    def failed(self, step: int, *, in_memory: bool = False) -> None:
        """The save of `step` has failed: it is due again. in_memory: it has got lost there, and the next step that
        `due` is asked about is saved instead."""
        self._lost_in_memory = self._lost_in_memory or in_memory
        self.saved_step = None if self.saved_step == step else self.saved_step
        self.failed_step, self._saving = step, False

    def still_saving(self) -> None:
        """Another save, begun later, goes on."""
        self._saving = True

    def forget(self, step: int) -> None:
        """`step` is no longer in the run: it may be saved again."""
        if self.saved_step == step:
            self.saved_step = None

    def committed(self, blocked_s: float, durable_s: float) -> None:
        """A save let training go on after `blocked_s`, on the slowest host, and was committed after `durable_s`."""
        self._saving = False
        if self._pacing:
            self._pacing.saved(blocked_s, durable_s)


class PollSpacing:
    """At which step all processes next ask process 0 whether a timed policy is due. The question is a collective, which
    may cost more than many saves do.

    Process 0 answers each time with the step of the next question: half-way, in time, to when a save can be due, by how
    long steps have taken; at most twice as far as the time before; and from one step on after each save. So steps that
    are suddenly slower do not make a save late. Main thread, all processes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.next_step = 0  # the same on all processes
        self._clock = clock
        self._polled: tuple[int, float] | None = None  # at which step, and when
        self._stride = 1

    def plan(self, step: int, quiet_s: float) -> int:
        """On process 0, asked at `step`: the step of the next question. `quiet_s`: nothing is due by time before."""
        now, before = self._clock(), self._polled
        if before is None or step > before[0]:
            self._polled = (step, now)
        if quiet_s <= 0:
            self._stride = 1
            return step
        if before is None or step <= before[0]:
            return step + 1
        step_s = max((now - before[1]) / (step - before[0]), 1e-6)
        stride = max(1, min(self._stride, POLL_STEPS_MAX, int(quiet_s / 2 / step_s)))
        self._stride = 2 * stride
        return step + stride
