"""The agent: what a training loop holds. One per JAX process; all processes call it in the same order.

`save`, `restore`, `reached_preemption`, `wait_until_finished` and `close` belong to the main thread. Each save has one
background thread, which waits for this process's bytes, signs the receipt, and waits for the decision (on process 0 it
also runs the coordinator). Background threads never run a collective.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import jax
from absl import logging

from orchestrator import arrays, journal, layout, plan
from orchestrator.arrays import ArrayOptions, ArrayWriter, Flat, PendingWrite
from orchestrator.catalog import Catalog
from orchestrator.collect import collect
from orchestrator.coordinator import Coordinator, UserData, describe, signal_prefix
from orchestrator.errors import Damaged, Fenced, OrchestratorError, OtherJob, SaveFailed, UsageError, WaitTimeout
from orchestrator.events import Committed, EpochOpened, SaveNotCommitted, SaveStarted, emit
from orchestrator.policy import KeepPolicy, SavePolicy, every
from orchestrator.protocol import Phase
from orchestrator.records import FORMAT, Failure, FileEntry, Intent, Json, Receipt, encode
from orchestrator.rendezvous import Rendezvous, connect
from orchestrator.restore import RestoreArgs, Restored, agree, restore_together
from orchestrator.storage import open_storage
from orchestrator.storage.base import Exists

_DECISION_POLL_S = 0.01
_STORAGE_POLL_S = 1.0
_GRACE_S = 5.0  # how much longer than the coordinator's deadline the others wait for its decision


@dataclass(frozen=True)
class Options:
    """How an agent behaves.

    async_save: False makes `save` return only when the step is committed (or has failed).
    on_save_failure: "warn" logs and counts a failed save; "raise" raises SaveFailed at the next call.
    save_timeout_s: how long a save may take from staging to decision before silent hosts are named and it is aborted.
    rendezvous_timeout_s: how long to wait for other processes at collective points (start, restore, leaving).
    compression: zstd for array chunks. other_tree: allow saving a state tree that differs from the run's.
    """

    async_save: bool = True
    on_save_failure: Literal["warn", "raise"] = "warn"
    save_timeout_s: float = 600.0
    rendezvous_timeout_s: float = 300.0
    compression: bool = False
    other_tree: bool = False

    def __post_init__(self) -> None:
        if self.on_save_failure not in ("warn", "raise"):
            raise UsageError(f"on_save_failure={self.on_save_failure!r}: wanted 'warn' or 'raise'")
        if self.save_timeout_s <= 0 or self.rendezvous_timeout_s <= 0:
            raise UsageError("save_timeout_s and rendezvous_timeout_s must be positive numbers of seconds")


@dataclass
class _Save:
    """A save in flight. `error` is set, at the latest, when `thread` ends."""

    step: int
    attempt: str
    started: float
    timestamp: float
    error: OrchestratorError | None = None
    committed_bytes: int = 0
    thread: threading.Thread | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class Agent:
    """Saves and restores the state of one job in the run at `root`. Opening it opens a new epoch (incarnation).

    Raises Damaged or NewerFormat if the root holds a journal that cannot be trusted, StorageError if it cannot be
    written, WaitTimeout naming the processes that did not come. Then nothing was changed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        save: SavePolicy | None = None,
        keep: KeepPolicy | None = None,
        options: Options | None = None,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        self.options = options or Options()
        self.failures = 0
        self._policy = save or every(1)
        self._rendezvous = rendezvous or connect(self.options.rendezvous_timeout_s)
        me = self._rendezvous
        host = me.hosts[me.process]
        self._catalog = Catalog(open_storage(os.fspath(root)), writer=f"{host}/process-{me.process}/pid-{os.getpid()}")
        opened = agree(me, "open the run", self.options.rendezvous_timeout_s, self._open_epoch)
        self.epoch, self._run = int(opened["epoch"]), str(opened["run"])
        self._writer = ArrayWriter(ArrayOptions(compression=self.options.compression), me.process)
        self._coordinator = Coordinator(self._catalog, self._writer, me, epoch=self.epoch, run=self._run, keep=keep)
        self._numbers: dict[int, int] = {}  # step -> attempts so far in this epoch; the same on all processes
        self._current: _Save | None = None
        self._pending_error: OrchestratorError | None = None
        self._last_save_s: float | None = None
        self._preempted: tuple[int, bool] = (-1, False)
        self._last_saved_step: int | None = None
        self._tree_checked = False
        self._collector: threading.Thread | None = None
        self._swept = False
        self._closed = False
        emit(EpochOpened(self.epoch, self._catalog.url, me.count))

    def _open_epoch(self) -> Json:
        head = self._catalog.append(journal.open_epoch)
        assert head is not None
        return {"epoch": head.epoch, "run": uuid.uuid4().hex}

    # Questions.

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would save now: the policy says so, or hosts are being preempted.

        The same answer on all processes; a policy that depends on time is decided by process 0 (a collective).
        """
        elapsed = None if self._last_save_s is None else time.monotonic() - self._last_save_s
        if self._policy.timed:
            decide = self._policy.due(step, elapsed)
            due = bool(self._rendezvous.broadcast(f"save step {step}?", decide, self.options.rendezvous_timeout_s))
        else:
            due = self._policy.due(step, elapsed)
        return self.reached_preemption(step) or due

    def reached_preemption(self, step: int) -> bool:
        """True, on all hosts at the same step, once any host got SIGTERM: `save` has saved it; leave the loop."""
        if self._preempted[0] != step and not self._preempted[1]:
            self._preempted = (step, self._rendezvous.preempted(step))
        return self._preempted[1]

    def latest_step(self) -> int | None:
        """The step that `restore` would choose: the newest restorable one. None in a new run."""
        live = self._catalog.find(None)
        return live.step if live else None

    def all_steps(self) -> list[int]:
        """All restorable steps, ascending."""
        return sorted(live.step for live in self._catalog.require_head().live if live.restorable)

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
        SaveFailed of an earlier save with on_save_failure="raise".
        """
        self._settle(raise_now=True)
        if step < 0:
            raise UsageError(f"step {step}: steps are 0 or more")
        if not (self.should_save(step) or force) or step == self._last_saved_step:
            return False
        user = UserData(_metrics(metrics), _extra(extra), timestamp=time.time())
        self.wait_until_finished()
        flat = arrays.flatten(state)
        self._check_tree(flat)
        self._start(step, flat, user, process_state)
        if not self.options.async_save:
            self.wait_until_finished()
        return True

    def _check_tree(self, flat: Flat) -> None:
        """The first save of an incarnation must be of the run's own job."""
        if self._tree_checked or self.options.other_tree:
            return
        newest = self._catalog.find(None)
        if newest is not None and newest.tree != flat.spec.fingerprint():
            saved = self._catalog.intent(newest.step, newest.attempt).tree
            lines = plan.tree_differences(saved, flat.spec) or ["their trees differ"]
            detail = "\n".join(f"  {line}" for line in lines)
            raise OtherJob(
                f"{self._catalog.url} holds another job's state (step {newest.step}); use another root, or "
                f"Options(other_tree=True):\n{detail}"
            )
        self._tree_checked = True

    def _start(self, step: int, flat: Flat, user: UserData, process_state: bytes | None) -> None:
        number = self._numbers[step] = self._numbers.get(step, 0) + 1
        attempt = layout.attempt_name(self.epoch, number)
        save = _Save(step, attempt, time.monotonic(), user.timestamp)
        self._last_save_s, self._last_saved_step = save.started, step
        prefix = layout.attempt_prefix(step, attempt)
        pending: PendingWrite | None = None
        failure: tuple[str, BaseException] | None = None
        try:
            pending = self._writer.stage(f"{self._catalog.url}/{prefix}{layout.STATE}", flat)
        except Exception as error:  # the other hosts must hear of it: it goes out as this process's NO
            failure = ("stage", error)
        save.seconds["stage"] = time.monotonic() - save.started
        save.thread = threading.Thread(
            target=self._finish,
            args=(save, flat, pending, failure, user, process_state),
            name=f"save-{step}",
            daemon=True,
        )
        self._current = save
        save.thread.start()
        emit(SaveStarted(step, attempt, save.seconds["stage"]))

    def _finish(
        self,
        save: _Save,
        flat: Flat,
        pending: PendingWrite | None,
        failure: tuple[str, BaseException] | None,
        user: UserData,
        process_state: bytes | None,
    ) -> None:
        """Background: write, receipt, decision. Leaves the outcome in `save`."""
        try:
            intent = self._intent(save, flat) if self._rendezvous.process == 0 else None
            if intent:
                try:
                    self._coordinator.open(intent)
                except OrchestratorError as error:
                    failure = failure or ("open", error)
            self._promise(save, pending, failure, process_state)
            phase, reason = self._decide(intent, save, user) if intent else self._await_decision(save)
            if phase is Phase.FENCED:
                save.error = Fenced(f"{layout.shown(save.step, save.attempt)}: {reason}; this process must stop")
            elif phase is not Phase.COMMITTED:
                save.error = SaveFailed(
                    f"{layout.shown(save.step, save.attempt)} was not saved: {reason}",
                    step=save.step,
                    attempt=save.attempt,
                )
        except Fenced as error:
            save.error = error
        except Exception as error:  # nothing may be lost silently on a background thread
            text = f"{layout.shown(save.step, save.attempt)} was not saved: {type(error).__name__}: {error}"
            save.error = SaveFailed(text, step=save.step, attempt=save.attempt)
        if save.error:
            emit(SaveNotCommitted(save.step, save.attempt, str(save.error)))
        else:
            emit(Committed(save.step, save.attempt, time.monotonic() - save.started, save.committed_bytes))
            self._collect_in_background()

    def _intent(self, save: _Save, flat: Flat) -> Intent:
        return Intent(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=save.step,
            attempt=save.attempt,
            epoch=self.epoch,
            opened_by=self._catalog.writer,
            time=save.timestamp,
            process_count=self._rendezvous.count,
            device_count=jax.device_count(),
            mesh=flat.mesh,
            tree=flat.spec,
        )

    def _promise(
        self,
        save: _Save,
        pending: PendingWrite | None,
        failed: tuple[str, BaseException] | None,
        process_state: bytes | None,
    ) -> None:
        """Make this process's part durable and sign a receipt, or say NO with the cause."""
        me = self._rendezvous
        host = me.hosts[me.process]
        signal = signal_prefix(self._run, save.step, save.attempt) + f"receipt/{me.process}"
        phase = "write"
        try:
            if failed:
                phase = failed[0]
                raise failed[1]
            assert pending is not None
            started = time.monotonic()
            pending.wait(self.options.save_timeout_s)
            save.seconds["write"] = time.monotonic() - started
            phase, started = "seal", time.monotonic()
            files = self._seal(save, process_state)
            save.seconds["seal"] = time.monotonic() - started
            phase = "receipt"
            receipt = Receipt(
                format=FORMAT,
                write_id=uuid.uuid4().hex,
                step=save.step,
                attempt=save.attempt,
                process=me.process,
                host=host,
                files=files,
                boxes=dict(pending.boxes),
                seconds=save.seconds,
            )
            # Receipt after fsync: it is a promise that survives power loss.
            key = self._catalog.key(save.step, save.attempt, layout.receipt_name(me.process))
            self._catalog.storage.create(key, encode(receipt))
            me.post(signal, "yes")
        except Exception as error:
            failure = Failure(
                process=me.process, host=host, phase=phase, cause=f"{type(error).__name__}: {error}"[:2000]
            )
            no = Receipt(
                format=FORMAT,
                write_id=uuid.uuid4().hex,
                step=save.step,
                attempt=save.attempt,
                process=me.process,
                host=host,
                failure=failure,
            )
            me.post(signal, encode(no).decode())
            key = self._catalog.key(save.step, save.attempt, layout.receipt_name(me.process))
            try:
                self._catalog.storage.create(key, encode(no))
            except OrchestratorError as second:  # the signal has told already; a full disk cannot hold the receipt
                logging.warning("%s: the NO of process %d could not be stored: %s", key, me.process, second)

    def _seal(self, save: _Save, process_state: bytes | None) -> tuple[FileEntry, ...]:
        prefix = layout.attempt_prefix(save.step, save.attempt)
        storage, process = self._catalog.storage, self._rendezvous.process
        keys = []
        if process_state is not None:
            key = prefix + layout.process_state_name(process)
            if isinstance(storage.create(key, process_state), Exists):
                raise OrchestratorError(f"{self._catalog.url}/{key}: another writer was here")
            keys.append(key)
        for own in arrays.own_files(process):
            keys += [entry.key for entry in storage.list(prefix + layout.STATE + own)]
        return tuple(
            FileEntry(path=entry.path.removeprefix(prefix), bytes=entry.bytes, crc32c=entry.crc32c)
            for entry in storage.seal(keys)
        )

    def _decide(self, intent: Intent, save: _Save, user: UserData) -> tuple[Phase, str]:
        spent = time.monotonic() - save.started
        state = self._coordinator.decide(intent, user, max(0.0, self.options.save_timeout_s - spent))
        if state.phase is Phase.COMMITTED:
            live = journal.find(self._catalog.require_head(), save.step)
            save.committed_bytes = live.bytes if live else 0
        return state.phase, describe(state)

    def _await_decision(self, save: _Save) -> tuple[Phase, str]:
        """What the coordinator decided: from its signal, or, if that is lost, from the journal. Bounded."""
        prefix = signal_prefix(self._run, save.step, save.attempt) + "decision/"
        started = time.monotonic()
        deadline_s = self.options.save_timeout_s + _GRACE_S
        look_at = started + _STORAGE_POLL_S
        while (now := time.monotonic()) - started < deadline_s:
            said = self._rendezvous.poll(prefix).get("0")
            if said:
                outcome = json.loads(said)
                return Phase[outcome["phase"]], str(outcome["reason"])
            if now >= look_at:
                look_at = now + _STORAGE_POLL_S
                decided = self._journalled(save)
                if decided:
                    return decided
            time.sleep(_DECISION_POLL_S)
        raise WaitTimeout(
            f"no decision from the coordinator, process 0 ({self._rendezvous.hosts[0]}), after {deadline_s:g} s"
        )

    def _journalled(self, save: _Save) -> tuple[Phase, str] | None:
        head = self._catalog.require_head()
        if journal.is_live(head, save.step, save.attempt):
            return Phase.COMMITTED, ""
        if journal.is_retired(head, save.step, save.attempt):
            return Phase.ABORTED, f"journal version {head.version}: {head.event.reason or 'aborted'}"
        if head.epoch > self.epoch:
            return Phase.FENCED, f"fenced by epoch {head.epoch} ({head.writer})"
        return None

    def _collect_in_background(self) -> None:
        """Delete retired data without anybody waiting for it; one collection at a time, on process 0."""
        if self._rendezvous.process != 0 or (self._collector and self._collector.is_alive()):
            return

        def run() -> None:
            try:
                # Leftovers of older epochs need a listing of all steps: once per incarnation is enough.
                result = collect(self._catalog, orphans=not self._swept)
                self._swept = True
                for line in result.failed:
                    logging.warning("collect: %s", line)
            except OrchestratorError as error:
                logging.warning("collect: %s; tried again after the next save", error)

        self._collector = threading.Thread(target=run, name="collect", daemon=True)
        self._collector.start()

    # Waiting and leaving.

    def wait_until_finished(self) -> None:
        """Return when no save is in flight: the last one is committed or has failed.

        Raises Fenced, and SaveFailed with on_save_failure="raise". Bounded by save_timeout_s.
        """
        save = self._current
        if save and save.thread:
            save.thread.join(self.options.save_timeout_s + 2 * _GRACE_S)
            if save.thread.is_alive():
                raise WaitTimeout(
                    f"{layout.shown(save.step, save.attempt)}: this process's save thread did not end within "
                    f"{self.options.save_timeout_s + 2 * _GRACE_S:g} s; the store does not answer"
                )
        self._settle(raise_now=True)

    def _settle(self, *, raise_now: bool) -> None:
        """Take note of a save that has ended."""
        save = self._current
        if save and save.thread and not save.thread.is_alive():
            self._current = None
            if save.error:
                self.failures += 1
                self._last_saved_step = None
                if isinstance(save.error, Fenced) or self.options.on_save_failure == "raise":
                    self._pending_error = save.error
        if raise_now and self._pending_error:
            error = self._pending_error
            if not isinstance(error, Fenced):  # fenced is for good: every later call says so
                self._pending_error = None
            raise error

    def close(self) -> None:
        """Wait for the save in flight, leave together with the other processes, end background work. Idempotent.

        Raises what the last save raised, as `wait_until_finished`.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.wait_until_finished()
            if self._collector:
                self._collector.join(self.options.rendezvous_timeout_s)
            self._rendezvous.gather("leave together", None, self.options.rendezvous_timeout_s)
        finally:
            self._writer.close()

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        # The loop is failing: finish this process's save, but meet nobody, who may not come.
        self._closed = True
        try:
            self.wait_until_finished()
        except OrchestratorError as error:
            logging.warning("while leaving: %s", error)

    # Restoring.

    def restore(
        self, like: Any, *, step: int | None = None, partial: bool = False, cast: bool = False, strict: bool = False
    ) -> Restored | None:
        """The newest good step, or `step`, in the structure and on the shardings of `like`. None in a new run.

        `like`: a pytree of jax.ShapeDtypeStruct (with shardings) or arrays; numpy leaves come back as numpy. Any mesh,
        device count and process count. `partial`: `like` may be a subtree. `cast`: convert dtypes. A damaged newest
        step is quarantined and the one before is taken, unless `strict` or a given `step`.
        Raises Mismatch (path, wanted, got; nothing read), StepNotFound, NothingToRestore, Damaged.
        """
        self.wait_until_finished()
        args = RestoreArgs(partial=partial, cast=cast, strict=strict)
        return restore_together(self._catalog, self._rendezvous, like, step, args, self.options.rendezvous_timeout_s)


def _metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    plain = {}
    for name, value in (metrics or {}).items():
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"metrics[{name!r}]: {value!r} is not a number") from error
        # JSON has no NaN or infinity; a step without the metric is never the best, which is what NaN should mean.
        if math.isfinite(number):
            plain[str(name)] = number
    return plain


def _extra(extra: Mapping[str, Json] | None) -> dict[str, Json]:
    try:
        return dict(json.loads(json.dumps(dict(extra or {}), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"extra: {error}; it must be plain JSON") from error


__all__ = ["Agent", "Damaged", "Options"]
