"""The saves of one agent, one after another: each begins on the main thread, ends on a thread of its own, and is waited
for, within its bounds, before the next one begins. Only what goes to the store from memory (`promotion`) is not waited
for: the next such save queues behind it, and takes the place of one that is queued already.

Main thread only. What a save does in the background is in `participant`; which steps are due is in `schedule`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orchestrator import gc_pause
from orchestrator.arrays import Flat, flatten
from orchestrator.errors import Damaged, OrchestratorError, SaveFailed, StorageError, UsageError, WaitTimeout
from orchestrator.job.finalize import UserData
from orchestrator.job.opening import Opening
from orchestrator.job.participant import FATAL, Participant, ParticipantFactory
from orchestrator.job.promotion import Source, Upload
from orchestrator.job.schedule import SaveSchedule
from orchestrator.job.voter import GRACE_S
from orchestrator.observe import heartbeat
from orchestrator.observe.events import SaveNotCommitted
from orchestrator.options import Options
from orchestrator.rules import arguments
from orchestrator.rules.records import Cause, Json
from orchestrator.storage.port import Storage

_QUEUED_MAX = 4  # uploads at a time: one that goes on, one that waits, and those that are being given up


@dataclass(frozen=True)
class Given:
    """What a save is given beside the state, as the user gave it."""

    metrics: Mapping[str, float] | None
    extra: Mapping[str, Json] | None
    process_state: bytes | None

    def checked(self) -> tuple[UserData, bytes | None]:
        """Raises UsageError naming what cannot be stored."""
        user = UserData(arguments.metrics(self.metrics), arguments.extra(self.extra), timestamp=time.time())
        return user, arguments.own_bytes(self.process_state)


class Memory(Protocol):
    """Where a step may be held on its way to the store."""

    def due(self, step: int) -> bool:
        """Whether `step` is to be held. The same on all processes."""

    def carry(self, save: Participant, flat: Flat, process_state: bytes | None) -> Source | None:
        """Take `flat`, the state of `save`, into memory; None if this process cannot. Whether others can is theirs."""


class SaveSequence:
    """failures: how many saves have failed, or could not even begin."""

    def __init__(
        self, participants: ParticipantFactory, schedule: SaveSchedule, opening: Opening, options: Options
    ) -> None:
        self._participants, self._schedule, self._opening, self._options = participants, schedule, opening, options
        self.failures = 0
        self._begun: list[Participant] = []  # in this order, until it is noted how they ended; mostly one
        self._pending_error: OrchestratorError | None = None  # of a save that has ended; not raised yet, or for good
        self._raised: OrchestratorError | None = None  # last
        self._hurry_s: float | None = None  # since when, on the monotonic clock, the program is failing

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved in the background, None if none is; of several the oldest."""
        return next((save.step for save in tuple(self._begun) if save.running), None)

    # Beginning one.

    def save(self, step: int, state: Any, given: Given, memory: Memory | None = None) -> bool:
        """Begin to save `step`, which is due, unless it is saved or being saved already. True if a save has begun.
        memory: where it may be held on its way.

        Waits for the save before it. The first one opens the epoch. Raises as `Agent.save` says.
        """
        if step == self._schedule.saved_step:
            self.finished()  # if that save fails, another host may know already: then all save it again
        if step == self._schedule.saved_step:
            return False
        if self._opening.epoch is None and not self._open(step, state, given):
            return False
        if memory and memory.due(step) and self._options.on_save_failure == "warn":
            self._schedule.watch()  # here, where all processes come by; one that raises does not ask at the same steps
        try:
            user, process_state = given.checked()
        except UsageError as error:  # of this process alone, perhaps: the others must not wait for it
            self._participants.begin(step, UserData({}, {}, 0.0), None).reject("arguments", error)
            raise
        entered_s = time.monotonic()
        carries = memory if memory and memory.due(step) and self._may_queue() else None
        finished = bool(carries) or self.finished(f"step {step} is due")
        save = self._participants.begin(step, user, process_state)
        self._schedule.begin(save.started_s)
        if not finished:
            return self._skip(save)
        try:
            if not self._start(save, state, process_state, carries):
                return False
        except Exception as error:  # of which the others have been told
            if (reason := _failed_save(save, error)) is None:
                raise
            return self._not_begun(step, save.id.name, reason, Cause.FAILED)
        self._begun[-1].blocked_s = time.monotonic() - entered_s
        if not self._options.async_save:
            self.wait()
        return True

    def _open(self, step: int, state: Any, given: Given) -> bool:
        """Open the epoch for the first save; False if another process cannot take part, which is a failed save."""

        def describe() -> Flat:
            given.checked()
            return _flat(state, self._options)

        rejection = self._opening.by_save(step, describe)
        return not rejection or self._not_begun(step, "", f"step {step} was not saved: {rejection}", Cause.REJECTED)

    def skip(self, step: int, reason: str) -> None:
        """Save no `step`, and tell the others, who may have begun: nobody waits for this process."""
        save = self._participants.begin(step, UserData({}, {}, 0.0), None)
        save.reject("wait", WaitTimeout(reason), Cause.HUNG)
        self._not_begun(step, save.id.name, f"{save.label}: {reason}", Cause.HUNG)

    def _skip(self, save: Participant) -> bool:
        """The save before still hangs in the store. Tell the others, count it, let training go on."""
        reason = f"{self._hanging.label} still hangs on this process: the store does not answer"
        save.reject("wait", WaitTimeout(reason), Cause.HUNG)
        return self._not_begun(save.step, save.id.name, f"{save.label} was not saved: {reason}", Cause.HUNG)

    def _not_begun(self, step: int, attempt: str, reason: str, cause: Cause) -> bool:
        """Count a save that could not even begin, and raise it where failed saves are to be raised. Returns False."""
        self.failures += 1
        self._participants.context.tell(SaveNotCommitted(step, attempt, reason, cause))
        if self._options.on_save_failure == "raise":
            raise SaveFailed(reason, step=step, attempt=attempt)
        return False

    def _start(self, save: Participant, state: Any, process_state: bytes | None, memory: Memory | None) -> bool:
        """Begin it, by way of `memory` if that takes it. False if the save before hangs."""
        with self._telling(save), gc_pause.paused():
            flat = _flat(state, self._options)
            try:
                self._opening.check_tree(flat)
            except (StorageError, Damaged) as error:  # a failed save, not a failed training
                save.fail("check", error)
            source = memory.carry(save, flat, process_state) if memory and not save.problem else None
            if source is None and memory is None:
                save.start(flat)
        if source is not None:
            self._queue(save, source)
        elif memory is not None:  # not known before: what is on its way is waited for now
            with self._telling(save):
                if not self.finished(f"step {save.step} is due"):
                    return self._skip(save)
                save.start(flat)
        return True

    @contextlib.contextmanager
    def _telling(self, save: Participant) -> Iterator[None]:
        """What is raised within may be of this process alone: the others must not wait for it."""
        try:
            yield
        except BaseException as error:
            if save.begun:
                self._started(save)
            else:
                save.reject("check", error)
            raise
        if save.begun:
            self._started(save)

    def carry(self, step: int, user: UserData, flat: Flat, process_state: bytes | None, here: Storage) -> Participant:
        """Begin to save `flat` here, for a save elsewhere, too, which takes it from `here`. Raises as `save`."""
        save = self._participants.begin(step, user, process_state)
        self._schedule.begin(save.started_s)
        save.abandoned, save.here = lambda: False, here
        with self._telling(save):
            save.start(flat)
        return save

    def _may_queue(self) -> bool:
        """Whether nothing is in flight but what a save from memory can queue behind."""
        self.note_outcome(raise_now=False)
        return all(save.takes_long for save in self._begun) and len(self._begun) < _QUEUED_MAX

    def _queue(self, save: Participant, source: Source) -> None:
        """Have what is held now uploaded, after what is on its way."""
        before = _uploads(self._begun)
        for older in before:
            older.persistence.make_way(f"step {save.step} is due")
        queued = Upload(self._participants.context, save, source, before)
        with self._telling(queued), source.used_by(queued):
            queued.go_on()

    def _started(self, save: Participant) -> None:
        self._begun.append(save)
        self._schedule.started(save.step)

    # Waiting for its end.

    def wait(self) -> None:
        """Return when none is in flight. Raises WaitTimeout if one hangs beyond its bounds, and as `note_outcome`."""
        if not self.finished():
            raise WaitTimeout(
                f"{self._hanging.label}: this process's save thread did not end within "
                f"{self._bound_s():g} s; the store does not answer"
            )

    def finish(self) -> OrchestratorError | None:
        """`wait`, for a program that ends. Returns why the save in flight is lost, or an earlier one of which nobody
        knows yet."""
        save, raised = self._begun[-1] if self._begun else None, self._raised
        try:
            self.wait()
        except OrchestratorError as error:
            return None if error is raised else error
        return save.error if save else None

    @property
    def _hanging(self) -> Participant:
        return next(save for save in self._begun if save.running)

    def finished(self, newer: str = "") -> bool:
        """Wait until none is in flight; False if one hangs beyond its bounds. newer: what waits for that, if it is to
        be saved instead. Raises as `note_outcome`."""
        for save in _uploads(self._begun) if newer else ():
            save.persistence.make_way(newer)
        settled = self.settle()
        if settled:
            self.note_outcome(raise_now=True)
        return settled

    def settle(self) -> bool:
        """Wait as `finished`, and raise nothing. Any thread."""
        asked_s = time.monotonic()
        for save in tuple(self._begun):
            # An upload may have gone on for hours: the bound is for whoever waits.
            from_s = asked_s if save.takes_long else save.started_s
            if isinstance(save, Upload) and (self._hurry_s is not None or self._schedule.preempted):
                save.hurry()
            while save.running:
                left_s = max(from_s, self._wait_from_s()) + self._bound_s() - time.monotonic()
                if left_s <= 0 and not self._ended_at_last(save):
                    return False
                heartbeat.record("waiting for a save", save.step)
                save.join(min(1.0, left_s))
        return True

    def _ended_at_last(self, save: Participant) -> bool:
        """There is no more time: what can be given up is."""
        if save.takes_long:
            save.give_up(f"the store did not take it in {self._bound_s():g} s, and there is no more time")
            save.join(GRACE_S)
        return not save.running

    def hurry(self) -> None:
        """The program is failing: from now on a save in flight has `failure_grace_s` at most."""
        self._hurry_s = time.monotonic()

    def note_outcome(self, *, raise_now: bool) -> None:
        """Note how a save that has ended went, without waiting. With `raise_now` raises what is to be raised: Fenced
        and JournalLost each time; SaveFailed once, where failed saves are to be raised."""
        for save in [save for save in self._begun if not save.running]:
            self._begun.remove(save)
            self._note(save)
        if raise_now and self._pending_error:
            error = self._raised = self._pending_error
            if not isinstance(error, FATAL):  # those are for good: every later call says so
                self._pending_error = None
            raise error

    def _note(self, save: Participant) -> None:
        if not save.error:
            blocked_s = max(save.blocked_s, save.stage_s) if self._options.async_save else save.durable_s
            self._schedule.committed(blocked_s, save.durable_s)
        else:
            self._schedule.failed(save.step, in_memory=save.lost_in_memory)
        if self._begun:
            self._schedule.still_saving()
        if not save.error:
            return
        self.failures += 1
        if isinstance(save.error, FATAL) or self._options.on_save_failure == "raise":
            self._pending_error = save.error

    def _bound_s(self) -> float:
        """How long a save may take as the main thread sees it: its own bounds, and the grace of a preemption or of a
        failure."""
        bound_s = self._options.save_timeout_s + 2 * GRACE_S
        if self._hurry_s is not None:
            bound_s = min(bound_s, self._options.failure_grace_s or bound_s)
        return min(bound_s, self._options.preemption_grace_s) if self._schedule.preempted else bound_s

    def _wait_from_s(self) -> float:
        """From when `_bound_s` counts at the earliest."""
        return max(self._hurry_s or 0.0, self._schedule.preempted_s if self._schedule.preempted else 0.0)


def _flat(state: Any, options: Options) -> Flat:
    return flatten(state, tiled=options.chunks == "tiles")


def _failed_save(save: Participant, error: Exception) -> str | None:
    """Why a save has failed before it went on in the background, for want of threads or memory, say: training goes on
    without it. None for what the user is to hear of."""
    if save.begun or isinstance(error, OrchestratorError):
        return None
    return f"{save.label} was not saved: {type(error).__name__}: {error}"


def _uploads(begun: Sequence[Participant]) -> list[Upload]:
    return [save for save in tuple(begun) if isinstance(save, Upload) and save.running]
