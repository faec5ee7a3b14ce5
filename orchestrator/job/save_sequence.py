"""The saves of one agent, one after another: each begins on the main thread, ends on a thread of its own, and is waited
for, within its bounds, before the next one begins.

Main thread only. What a save does in the background is in `participant`; which steps are due is in `schedule`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator import gc_pause
from orchestrator.arrays import Flat, flatten
from orchestrator.errors import Damaged, OrchestratorError, SaveFailed, StorageError, UsageError, WaitTimeout
from orchestrator.job.finalize import UserData
from orchestrator.job.opening import Opening
from orchestrator.job.participant import FATAL, GRACE_S, Participant, ParticipantFactory
from orchestrator.job.schedule import SaveSchedule
from orchestrator.observe import heartbeat
from orchestrator.observe.events import SaveNotCommitted
from orchestrator.options import Options
from orchestrator.rules import arguments
from orchestrator.rules.records import Cause, Json


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


class SaveSequence:
    """failures: how many saves have failed, or could not even begin."""

    def __init__(
        self, participants: ParticipantFactory, schedule: SaveSchedule, opening: Opening, options: Options
    ) -> None:
        self._participants, self._schedule, self._opening, self._options = participants, schedule, opening, options
        self.failures = 0
        self._current: Participant | None = None
        self._pending_error: OrchestratorError | None = None  # of a save that has ended; not raised yet, or for good
        self._raised: OrchestratorError | None = None  # last
        self._hurry_s: float | None = None  # since when, on the monotonic clock, the program is failing

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved in the background, None if none is."""
        return self._current.step if self._current and self._current.running else None

    # Beginning one.

    def save(self, step: int, state: Any, given: Given) -> bool:
        """Begin to save `step`, which is due, unless it is saved or being saved already. True if a save has begun.

        Waits for the save before it. The first one opens the epoch. Raises as `Agent.save` says.
        """
        if step == self._schedule.saved_step:
            self.finished()  # if that save fails, another host may know already: then all save it again
        if step == self._schedule.saved_step:
            return False
        described: list[Flat] = []  # for the first save, `state` is taken apart before the epoch is open
        if self._opening.epoch is None and not self._open(step, state, given, described):
            return False
        try:
            user, process_state = given.checked()
        except UsageError as error:  # of this process alone, perhaps: the others must not wait for it
            self._participants.begin(step, UserData({}, {}, 0.0), None).reject("arguments", error)
            raise
        entered_s = time.monotonic()
        finished = self.finished()
        save = self._participants.begin(step, user, process_state)
        self._schedule.begin(save.started_s)
        if not finished:
            self._skip(save)
            return False
        self._start(save, state, described)
        save.blocked_s = time.monotonic() - entered_s
        if not self._options.async_save:
            self.wait()
        return True

    def _open(self, step: int, state: Any, given: Given, described: list[Flat]) -> bool:
        """Open the epoch for the first save; False if another process cannot take part, which is a failed save. Leaves
        the state, taken apart, in `described`."""

        def describe() -> Flat:
            given.checked()
            described.append(self._flat(state))
            return described[0]

        rejection = self._opening.by_save(step, describe)
        if rejection:
            self._not_begun(step, "", f"step {step} was not saved: {rejection}", Cause.REJECTED)
        return not rejection

    def _flat(self, state: Any) -> Flat:
        return flatten(state, tiled=self._options.chunks == "tiles")

    def skip(self, step: int, reason: str) -> None:
        """Save no `step`, and tell the others, who may have begun: nobody waits for this process."""
        save = self._participants.begin(step, UserData({}, {}, 0.0), None)
        save.reject("wait", WaitTimeout(reason), Cause.HUNG)
        self._not_begun(step, save.id.name, f"{save.label}: {reason}", Cause.HUNG)

    def _skip(self, save: Participant) -> None:
        """The save before still hangs in the store. Tell the others, count it, let training go on."""
        assert self._current is not None
        reason = f"{self._current.label} still hangs on this process: the store does not answer"
        save.reject("wait", WaitTimeout(reason), Cause.HUNG)
        self._not_begun(save.step, save.id.name, f"{save.label} was not saved: {reason}", Cause.HUNG)

    def _not_begun(self, step: int, attempt: str, reason: str, cause: Cause) -> None:
        """Count a save that could not even begin, and raise it where failed saves are to be raised."""
        self.failures += 1
        self._participants.context.tell(SaveNotCommitted(step, attempt, reason, cause))
        if self._options.on_save_failure == "raise":
            raise SaveFailed(reason, step=step, attempt=attempt)

    def _start(self, save: Participant, state: Any, described: list[Flat]) -> None:
        with gc_pause.paused():
            try:
                flat = described[0] if described else self._flat(state)
                try:
                    self._opening.check_tree(flat)
                except (StorageError, Damaged) as error:  # a failed save, not a failed training
                    save.fail("check", error)
                save.start(flat)
            except BaseException as error:  # of this process alone, perhaps: the others must not wait for it
                if save.begun:
                    self._started(save)
                else:
                    save.reject("check", error)
                raise
        self._started(save)

    def _started(self, save: Participant) -> None:
        self._current = save
        self._schedule.started(save.step)

    # Waiting for its end.

    def wait(self) -> None:
        """Return when none is in flight. Raises WaitTimeout if one hangs beyond its bounds, and as `note_outcome`."""
        if not self.finished():
            assert self._current is not None
            raise WaitTimeout(
                f"{self._current.label}: this process's save thread did not end within "
                f"{self._bound_s():g} s; the store does not answer"
            )

    def finish(self) -> OrchestratorError | None:
        """`wait`, for a program that ends. Returns why the save in flight is lost, or an earlier one of which nobody
        knows yet."""
        save, raised = self._current, self._raised
        try:
            self.wait()
        except OrchestratorError as error:
            return None if error is raised else error
        return save.error if save else None

    def finished(self) -> bool:
        """Wait until none is in flight; False if one hangs beyond its bounds. Raises as `note_outcome`."""
        settled = self.settle()
        if settled:
            self.note_outcome(raise_now=True)
        return settled

    def settle(self) -> bool:
        """Wait as `finished`, and raise nothing. Any thread."""
        save = self._current
        while save and save.running:
            left_s = self._wait_from_s(save) + self._bound_s() - time.monotonic()
            if left_s <= 0:
                return False
            heartbeat.record("waiting for a save", save.step)
            save.join(min(1.0, left_s))
        return True

    def hurry(self) -> None:
        """The program is failing: from now on a save in flight has `failure_grace_s` at most."""
        self._hurry_s = time.monotonic()

    def note_outcome(self, *, raise_now: bool) -> None:
        """Note how a save that has ended went, without waiting. With `raise_now` raises what is to be raised: Fenced
        and JournalLost each time; SaveFailed once, where failed saves are to be raised."""
        save = self._current
        if save and not save.running:
            self._current = None
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
            return
        self.failures += 1
        self._schedule.failed(save.step)
        if isinstance(save.error, FATAL) or self._options.on_save_failure == "raise":
            self._pending_error = save.error

    def _bound_s(self) -> float:
        """How long a save may take as the main thread sees it: its own bounds, and the grace of a preemption or of a
        failure."""
        bound_s = self._options.save_timeout_s + 2 * GRACE_S
        if self._hurry_s is not None:
            bound_s = min(bound_s, self._options.failure_grace_s or bound_s)
        return min(bound_s, self._options.preemption_grace_s) if self._schedule.preempted else bound_s

    def _wait_from_s(self, save: Participant) -> float:
        """From when `_bound_s` counts."""
        preempted_s = self._schedule.preempted_s if self._schedule.preempted else 0.0
        return max(save.started_s, self._hurry_s or 0.0, preempted_s)
