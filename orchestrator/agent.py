"""The agent: what a training loop holds. One per JAX process; all processes call it in the same order.

`save`, `restore`, `reached_preemption`, `wait_until_finished` and `close` belong to the main thread. What a save does
in the background is in `saving`. Background threads never run a collective.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from absl import logging

from orchestrator import failpoints, gc_pause
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import Flat, flatten
from orchestrator.errors import (
    Damaged,
    OrchestratorError,
    SaveFailed,
    StorageError,
    UsageError,
    WaitTimeout,
)
from orchestrator.job import last_words, leaving
from orchestrator.job.coordinator import Coordinator, UserData
from orchestrator.job.opening import Opening, check_tree
from orchestrator.job.pacing import Looks, Pacing
from orchestrator.job.participant import FATAL, GRACE_S, Save, Saver
from orchestrator.job.read_step import ReadOptions, Restored
from orchestrator.job.rendezvous import Rendezvous, connect, listen
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.job.startup import meet
from orchestrator.observe import heartbeat
from orchestrator.observe.events import Closed, EpochOpened, SaveNotCommitted, emit
from orchestrator.observe.telemetry import Telemetry
from orchestrator.options import Options
from orchestrator.policy import Adaptive, KeepPolicy, Patient, SavePolicy, every, keeps, saves
from orchestrator.rules import arguments, configuration
from orchestrator.rules.records import Json
from orchestrator.rules.save_interval import Cadence
from orchestrator.run.deletion import Collector
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import open_storage
from orchestrator.storage.port import Storage

STEP_BACK = "ORCHESTRATOR_STEP_BACK"  # set by a supervisor that has recognised a crash loop


class Agent:
    """Saves and restores the state of one job in the run at `root`. Making it writes nothing: the first `save` or
    `restore` opens a new epoch (incarnation), once nothing speaks against it.

    Raises Damaged or NewerFormat if the root holds a journal that cannot be trusted, JournalLost if it holds steps and
    no journal, StorageError if it cannot be read, WaitTimeout naming the processes that did not come. UsageError, the
    same on all hosts, if their roots are not one place, or if they were given different policies or options.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        options: Options | None = None,
        rendezvous: Rendezvous | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.options = Options() if options is None else options
        if not isinstance(self.options, Options):
            raise arguments.rejection("options", options, "orchestrator.Options(...)")
        self.failures = 0
        self._policy = every(1) if save is None else save
        saves("save", self._policy)
        if keep is not None:
            keeps("keep", keep)
        store = storage or open_storage(root)  # before the others are met: a root that is none is rejected at once
        self._using = threading.RLock()
        self._rendezvous = rendezvous or connect(self.options.rendezvous_timeout_s)
        last_words.serve(self, self.options.failure_grace_s)
        me = self._rendezvous
        failpoints.configure(os.environ, me.process)
        signature = f"{me.hosts[me.process]}/process-{me.process}/pid-{os.getpid()}"
        self._catalog = Catalog(store, writer=signature)
        given = configuration.of_agent(self._policy, keep, self.options)
        run = meet(self._catalog, me, "open the run", given, self.options.rendezvous_timeout_s)
        self._opening = Opening(self._catalog, me, self.options.rendezvous_timeout_s, self._opened)
        self._saver = self._make_saver(run, keep)
        self._collector = Collector(self._catalog)
        self._looks = Looks()
        self._pacing: Pacing | None = None
        self._current: Save | None = None
        self._pending_error: OrchestratorError | None = None
        self._raised: OrchestratorError | None = None
        self._last_save_s: float | None = None
        self._preempted: tuple[int, bool] = (-1, False)
        self._preempted_s = 0.0  # when, on the monotonic clock
        self._failing_s = 0.0  # likewise: when an exception left the agent's block
        self._last_saved_step: int | None = None
        self._failed_step: int | None = None
        self._tree_checked = False
        self._closed = False
        self._telemetry = Telemetry(self.options, self._catalog.url, process=me.process, host=me.hosts[me.process])
        self._listening = listen(me)
        self._life = leaving.Life(self, self._catalog.url, self._listening.stop, self._telemetry.close)
        heartbeat.record("opened", None)

    def _make_saver(self, run: str, keep: KeepPolicy | None) -> Saver:
        me = self._rendezvous
        writer = ArrayWriter(
            ArrayOptions(
                compression=self.options.compression,
                host_bytes_max=self.options.host_bytes_max,
                skip_when_full=self.options.when_full == "skip",
                timeout_s=self.options.save_timeout_s,
                compare_own=self.options.host_local != "ignore",
            ),
            me.process,
        )
        coordinator = None
        if me.process == 0:
            keep_s = self.options.quarantine_keep_s
            coordinator = Coordinator(
                self._catalog, me, run=run, keep=keep, quarantine_keep_s=keep_s, host_local=self.options.host_local
            )
        return Saver(
            self._catalog,
            writer,
            me,
            coordinator,
            self.options,
            run=run,
            attest=self.options.attest != "off",
            committed=self._committed,
        )

    def _opened(self, epoch: int) -> None:
        failpoints.note(epoch=epoch)
        self._saver.opened(epoch)
        if self._rendezvous.process == 0 and isinstance(self._policy, Adaptive):
            self._pacing = Pacing(self._catalog)
        self._telemetry.opened(epoch)
        emit(EpochOpened(epoch, self._catalog.url, self._rendezvous.count))

    # Questions.

    @property
    def epoch(self) -> int | None:
        """This incarnation's number; None until the first `save` or `restore` has opened it."""
        return self._opening.epoch

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would save now: the policy says so, or hosts are being preempted.

        The same answer on all processes; a policy that depends on time is decided by process 0 (a collective).
        """
        step = arguments.step(step)
        heartbeat.record("training", step)
        elapsed = None if self._last_save_s is None else time.monotonic() - self._last_save_s
        if not self._policy.timed:
            due = self._policy.due(step, elapsed)
        elif step < self._looks.next:  # by time nothing is due, on any host; by step perhaps
            due = self._policy.due(step, 0.0)
        else:
            answer = self._rendezvous.broadcast(
                f"save step {step}?", self._look(step, elapsed), self.options.rendezvous_timeout_s
            )
            due, self._looks.next = bool(answer["due"]), int(answer["next"])
        return self.reached_preemption(step) or due

    def _look(self, step: int, elapsed: float | None) -> Json:
        """Whether a timed policy is due, and when to ask again. Only process 0's answer counts."""
        if self._rendezvous.process != 0:
            return None
        policy = self._policy
        if self._pacing and isinstance(policy, Adaptive):
            policy = self._pacing.informed(policy)
        due = policy.due(step, elapsed)
        quiet_s = policy.quiet_s(elapsed) if isinstance(policy, Patient) and not due else 0.0
        return {"due": due, "next": self._looks.plan(step, quiet_s)}

    def reached_preemption(self, step: int) -> bool:
        """True, on all hosts at the same step, once any host got SIGTERM: `save` has saved it; leave the loop."""
        step = arguments.step(step)
        heartbeat.record("training", step)
        if self._preempted[0] != step and not self._preempted[1]:
            self._preempted = (step, self._rendezvous.preempted(step))
            self._preempted_s = time.monotonic()
        return self._preempted[1]

    def latest_step(self) -> int | None:
        """The step that `restore` would choose: the newest restorable one. None in a new run. Raises NothingToRestore
        where all steps are quarantined."""
        live = self._catalog.find(None)
        return live.step if live else None

    def all_steps(self) -> list[int]:
        """All restorable steps, ascending."""
        head = self._catalog.head()
        return sorted(live.step for live in head.live if live.restorable) if head else []

    @property
    def cadence(self) -> Cadence | None:
        """What `save=oc.auto()` has chosen, and why; None before the first commit, and on processes other than 0."""
        return self._pacing.chosen if self._pacing else None

    @property
    def saved_step(self) -> int | None:
        """The step that was saved last, or is being saved; None once that save has failed."""
        self._settle(raise_now=False)
        return self._last_saved_step

    @property
    def failed_step(self) -> int | None:
        """The step whose save has failed last; None once it was begun again."""
        self._settle(raise_now=False)
        return self._failed_step

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved in the background, None if none is."""
        return self._current.step if self._current and self._current.running else None

    # Saving.

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        extra: Mapping[str, Json] | None = None,
        process_state: bytes | None = None,
        force: bool = False,
    ) -> bool:
        """Save `state` as `step` if it is due (or `force`). True if a save started; it goes on in the background.

        `metrics`: numbers that retention policies see. `extra`: the user's JSON. `process_state`: this process's own
        bytes. When it returns, every array may be donated or overwritten. Waits for the save before it, if any.
        Raises UnsupportedLeaf and OtherJob before anything is written, Fenced if a newer incarnation has taken over,
        SaveFailed of an earlier save with on_save_failure="raise". The first save opens the epoch: whatever keeps this
        job from that (StorageError without the right to write, JournalLost) is raised, whatever on_save_failure says.
        """
        with self._used_by_one("save"):
            self._settle(raise_now=True)
            step = arguments.step(step)
            due = self.should_save(step) or force
            if due and step == self._last_saved_step:
                self._finished()  # perhaps it fails, and another host knows already: then all save it again
            if not due or step == self._last_saved_step:
                return False
            if self.epoch is None and not self._open(step, state, metrics, extra, process_state):
                return False
            try:
                user = UserData(arguments.metrics(metrics), arguments.extra(extra), timestamp=time.time())
                mine = arguments.own_bytes(process_state)
            except UsageError as error:  # of this process alone, perhaps: the others must not wait for it
                self._saver.reject(self._saver.begin(step, UserData({}, {}, 0.0), None), "arguments", error)
                raise
            return self._save(step, state, user, mine)

    def _open(self, step: int, state: Any, *given: Any) -> bool:
        """Open the epoch for the first save; False if another process cannot take part, which is a failed save."""

        def describe() -> Flat:
            metrics, extra, process_state = given
            arguments.metrics(metrics), arguments.extra(extra), arguments.own_bytes(process_state)
            with gc_pause.paused():
                return flatten(state)

        rejected = self._opening.by_save(step, describe, other_tree=self.options.other_tree)
        self._tree_checked = not rejected
        if rejected:
            self._not_saved(step, "", f"step {step} was not saved: {rejected}", "refused")
        return not rejected

    def _not_saved(self, step: int, attempt: str, reason: str, cause: str) -> None:
        """Count a save that was not even begun, and raise it if that is wanted."""
        self.failures += 1
        emit(SaveNotCommitted(step, attempt, reason, cause))
        if self.options.on_save_failure == "raise":
            raise SaveFailed(reason, step=step, attempt=attempt)

    def _save(self, step: int, state: Any, user: UserData, process_state: bytes | None) -> bool:
        entered = time.monotonic()
        finished = self._finished()
        save = self._saver.begin(step, user, process_state)
        self._last_save_s = save.started
        if not finished:
            self._skip(save)
            return False
        with gc_pause.paused():
            try:
                flat = flatten(state)
                self._check_tree(flat, save)
                self._saver.start(save, flat)
            except BaseException as error:  # ours alone, perhaps: the others must not wait for us
                if save.thread:
                    self._started(save)
                else:
                    self._saver.reject(save, "check", error)
                raise
        self._started(save)
        save.blocked_s = time.monotonic() - entered
        if not self.options.async_save:
            self.wait_until_finished()
        return True

    def _started(self, save: Save) -> None:
        self._current, self._last_saved_step = save, save.step
        if self._failed_step == save.step:
            self._failed_step = None

    def _skip(self, save: Save) -> None:
        """The save before still hangs in the store. Tell the others, count it, let training go on."""
        assert self._current is not None
        reason = f"{self._current.shown} still hangs on this process: the store does not answer"
        self._saver.reject(save, "wait", WaitTimeout(reason))
        self._not_saved(save.step, save.attempt, f"{save.shown} was not saved: {reason}", "hung")

    def _check_tree(self, flat: Flat, save: Save) -> None:
        """The first save of an incarnation must be of the run's own job. Raises OtherJob."""
        if self._tree_checked or self.options.other_tree:
            return
        try:
            check_tree(self._catalog, self._catalog.require_head(), flat)
        except (StorageError, Damaged) as error:  # a failed save, not a failed training
            save.failure = ("check", error)
            return
        self._tree_checked = True

    def _committed(self) -> None:
        if self._rendezvous.process == 0 and not self._life.ending:
            self._collector.start(self.epoch)

    # Waiting and leaving.

    @contextmanager
    def _used_by_one(self, what: str) -> Iterator[None]:
        """One thread at a time: two saves at once would take each other's place, and hosts meet in one order."""
        if self._closed:
            raise UsageError(f"{what}: the agent of {self._catalog.url} is closed; open another one")
        if self._life.elsewhere:
            raise UsageError(
                f"{what}: the agent of {self._catalog.url} was opened before the fork; open another one here"
            )
        if not self._using.acquire(blocking=False):
            raise UsageError(f"{what}: another thread is using the agent of {self._catalog.url}; wait until it is done")
        try:
            yield
        finally:
            self._using.release()

    def wait_until_finished(self) -> None:
        """Return when no save is in flight: the last one is committed or has failed.

        Raises Fenced, and SaveFailed with on_save_failure="raise". Bounded by save_timeout_s.
        """
        if not self._finished():
            assert self._current is not None
            raise WaitTimeout(
                f"{self._current.shown}: this process's save thread did not end within "
                f"{self._patience_s():g} s; the store does not answer"
            )

    def _patience_s(self) -> float:
        """How long a save may take as the main thread sees it: its own bounds, and the grace of a preemption or of a
        failure."""
        bound_s = self.options.save_timeout_s + 2 * GRACE_S
        if self._failing_s:
            bound_s = min(bound_s, self.options.failure_grace_s or bound_s)
        return min(bound_s, self.options.preemption_grace_s) if self._preempted[1] else bound_s

    def _finished(self) -> bool:
        """Wait, within the save's bound, until none is in flight; False if one hangs beyond it. Raises as `_settle`."""
        save = self._current
        while save and save.running:
            since = max(save.started, self._failing_s, self._preempted_s if self._preempted[1] else 0.0)
            left_s = since + self._patience_s() - time.monotonic()
            if left_s <= 0:
                return False
            heartbeat.record("waiting for a save", save.step)
            assert save.thread is not None
            save.thread.join(min(1.0, left_s))
        self._settle(raise_now=True)
        return True

    def _settle(self, *, raise_now: bool) -> None:
        """Take note of a save that has ended."""
        save = self._current
        if save and not save.running:
            self._current = None
            if self._pacing and not save.error:
                blocked_s = max(save.blocked_s, save.stage_s) if self.options.async_save else save.durable_s
                self._pacing.saved(blocked_s, save.durable_s)
            if save.error:
                self.failures += 1
                self._last_saved_step, self._failed_step = None, save.step
                if isinstance(save.error, FATAL) or self.options.on_save_failure == "raise":
                    self._pending_error = save.error
        if raise_now and self._pending_error:
            error = self._raised = self._pending_error
            if not isinstance(error, FATAL):  # fenced is for good: every later call says so
                self._pending_error = None
            raise error

    def close(self) -> None:
        """Wait for the save in flight, leave together with the other processes, end background work. Idempotent.

        Raises what the last save raised, as `wait_until_finished`.
        """
        if self._closed or self._life.elsewhere:
            return
        self._closed = True
        try:
            self.wait_until_finished()
            self._collector.wait(self.options.rendezvous_timeout_s)
            self._rendezvous.gather("leave together", None, self.options.rendezvous_timeout_s)
        finally:
            emit(Closed(self.failures))
            self._leave()

    def finish(self) -> OrchestratorError | None:
        """`close`, for a program that is failing or ends: finishes this process's save, but meets nobody, who may not
        come. Returns why that save, or an earlier one of which nobody has heard yet, is lost."""
        if self._closed or self._life.elsewhere:
            return None
        self._closed = self._life.ending = True
        save, raised = self._current, self._raised
        try:
            self.wait_until_finished()
        except OrchestratorError as error:
            return None if error is raised else error
        finally:
            self._collector.wait(GRACE_S)  # what it leaves is deleted by the next incarnation
            self._leave()
        return save.error if save else None

    def _leave(self) -> None:
        self._life.over(self.in_flight)
        self._listening.stop(leaving=self._preempted[1])
        self._telemetry.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._failing_s = time.monotonic()
        if value is not None:
            last_words.left(value)
        if error := self.finish():
            logging.warning("while leaving: %s", error)

    # Restoring.

    def restore(
        self, like: Any, *, step: int | None = None, partial: bool = False, cast: bool = False, strict: bool = False
    ) -> Restored | None:
        """The newest good step, or `step`, in the structure and on the shardings of `like`. None in a new run.

        `like`: a pytree of jax.ShapeDtypeStruct (with shardings) or arrays; numpy leaves come back as numpy. Any mesh,
        device count and process count. `partial`: `like` may be a subtree. `cast`: convert dtypes. A damaged newest
        step is quarantined and the one before is taken, unless `strict` or a given `step`. A supervisor may ask, by
        ORCHESTRATOR_STEP_BACK=N, to leave out the N newest.
        Raises Mismatch (path, expected, got; nothing read), StepNotFound, NothingToRestore, Damaged.
        """
        with self._used_by_one("restore"):
            return self._restore(like, step, partial=partial, cast=cast, strict=strict)

    def _restore(self, like: Any, step: int | None, *, partial: bool, cast: bool, strict: bool) -> Restored | None:
        self.wait_until_finished()
        text = os.environ.get(STEP_BACK) or "0"
        if not text.isdecimal():
            raise UsageError(f"{STEP_BACK}={text!r}: expected how many of the newest steps to leave out")
        options = RestoreOptions(
            self.options.rendezvous_timeout_s,
            step=step,
            back=int(text),
            strict=strict,
            load_once=self.options.load_once,
            read=ReadOptions(partial=partial, cast=cast, attest=self.options.attest == "full"),
        )
        return restore_together(self._catalog, self._rendezvous, like, options, self._opening.by_restore)
