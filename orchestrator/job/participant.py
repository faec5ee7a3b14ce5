"""One save on one process: stage on the main thread, then write, promise and learn the outcome on a thread of its own.

On process 0 that thread also runs the coordinator. It never runs a collective. Every wait in it is bounded by
`Options.save_timeout_s` (plus a few seconds' grace, so that the coordinator's own word comes first).
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial

import jax
from absl import logging
from msgspec.structs import replace

from orchestrator import arrays, failpoints
from orchestrator.arrays import ArrayWriter, PendingWrite
from orchestrator.arrays.tree import Flat
from orchestrator.errors import (
    Fenced,
    JournalLost,
    OrchestratorError,
    SaveFailed,
    StorageError,
    UsageError,
    WaitTimeout,
)
from orchestrator.job.agree import Agreement
from orchestrator.job.coordinator import (
    QUICK_POLL_S,
    Coordinator,
    Opened,
    UserData,
    describe,
    run_prefix,
    signal_prefix,
)
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.observe.events import Committed, SaveNotCommitted, SavePhase, SaveStarted, emit
from orchestrator.options import Options
from orchestrator.rules import journal
from orchestrator.rules import keys as layout
from orchestrator.rules.attempt import Phase, cause_of
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.records import FORMAT, Failure, FileEntry, Intent, Receipt
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun
from orchestrator.storage.port import Exists, check_root

DECISION_POLL_S = 0.01
STORAGE_POLL_S = 1.0
PROGRESS_S = 2.0  # from one event about a save that is writing to the next
FATAL = (Fenced, JournalLost)  # no later save can do better
GRACE_S = 5.0  # how much longer than the coordinator's deadline the others wait for its decision


@dataclass
class Save:
    """A save in flight. `error` is set, at the latest, when `thread` ends."""

    step: int
    attempt: str
    user: UserData
    process_state: bytes | None
    started: float = field(default_factory=time.monotonic)
    error: OrchestratorError | None = None
    failure: tuple[str, BaseException] | None = None  # phase and cause: this process will say NO
    committed_bytes: int = 0
    blocked_s: float = 0.0  # how long it kept this process's main thread, the wait for the save before included
    stage_s: float = 0.0  # of the slowest process, on process 0, once decided
    durable_s: float = 0.0  # from start to commit, once committed
    seconds: dict[str, float] = field(default_factory=dict)
    thread: threading.Thread | None = None
    apart: tuple[Phase, str] | None = None  # process 0 saves another step instead: the outcome, found out here
    told_s: float = 0.0  # when progress was last told, on the monotonic clock

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.step, self.attempt)

    @property
    def shown(self) -> str:
        return self.id.label

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Saver:
    """Runs this process's saves in epoch `epoch` (or the one that is `opened`), one at a time. `committed` is called,
    on the save's own thread, after each commit. `coordinator` is given on process 0 only."""

    def __init__(
        self,
        catalog: Catalog,
        writer: ArrayWriter,
        rendezvous: Rendezvous,
        coordinator: Coordinator | None,
        options: Options,
        *,
        epoch: int = 0,
        run: str,
        attest: bool,
        committed: Callable[[], None],
    ) -> None:
        self._catalog, self._writer, self._rendezvous = catalog, writer, rendezvous
        self._coordinator, self._options = coordinator, options
        self._epoch, self._run, self._attest, self._committed = epoch, run, attest, committed
        bound_s = min(options.rendezvous_timeout_s, options.save_timeout_s)
        self._agreement = Agreement(catalog, rendezvous, bound_s, together=jax.process_count() > 1)
        self._began: deque[str] = deque(maxlen=64)  # the attempts that this process has begun, latest last
        self._numbers: dict[int, int] = {}  # step -> attempts so far in this epoch; the same on all processes

    def opened(self, epoch: int) -> None:
        """Before the first save: the incarnation's epoch is open."""
        self._epoch = epoch
        if self._coordinator:
            self._coordinator.epoch = epoch

    def begin(self, step: int, user: UserData, process_state: bytes | None) -> Save:
        """Name the next attempt at `step`. Computed, not communicated: every process comes to the same name."""
        number = self._numbers[step] = self._numbers.get(step, 0) + 1
        failpoints.note(step=step, epoch=self._epoch)
        save = Save(*AttemptId.of(step, self._epoch, number), user, process_state)
        self._began.append(save.shown)
        return save

    def start(self, save: Save, flat: Flat) -> None:
        """Stage `flat` and go on in the background. Whatever fails from here on is this process's NO."""
        pending: PendingWrite | None = None
        self._enter(save, "staging")
        started = time.monotonic()
        if not save.failure:
            prefix = save.id.prefix
            try:
                check_root(self._catalog.storage)
                failpoints.hit("save.stage")
                signals = signal_prefix(self._run, save.id)
                held = self._agreement.settle(flat, save.id, signals, partial(self._apart, save))
                pending = self._writer.stage(f"{self._catalog.url}/{prefix}{layout.STATE}", flat, self._attest, held)
            except Exception as error:  # the other hosts must hear of it
                save.failure = ("stage", error)
        save.seconds["stage"] = time.monotonic() - started
        # Made here, not in the thread: that one must not keep the state's device buffers alive.
        intent = self._intent(save, flat) if self._coordinator else None
        left = threading.Event()
        run = partial(self._finish, save, intent, pending, left)
        thread = threading.Thread(target=run, name=f"save-{save.step}", daemon=True)
        try:  # a Ctrl-C may come between any two of these
            thread.start()
            save.thread = thread
            emit(SaveStarted(save.step, save.attempt, time.monotonic() - save.started))
        finally:
            left.set()

    def reject(self, save: Save, phase: str, cause: BaseException) -> None:
        """Tell the other processes, without touching storage, that this one does not take part in `save`."""
        no = self._receipt(save, failure=self._failure(phase, cause))
        prefix = signal_prefix(self._run, save.id)
        self._rendezvous.post(f"{prefix}receipt/{self._rendezvous.process}", encode(no).decode())
        if self._coordinator:  # nobody else could decide it
            self._coordinator.announce(prefix, Phase.ABORTED, f"process 0 in {phase}: {cause}")

    def _intent(self, save: Save, flat: Flat) -> Intent:
        return Intent(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=save.step,
            attempt=save.attempt,
            epoch=self._epoch,
            opened_by=self._catalog.writer,
            time=save.user.timestamp,
            process_count=self._rendezvous.count,
            device_count=jax.device_count(),
            mesh=flat.form.mesh,
            tree=self._writer.recorded(flat.spec),
            built_on=self._catalog.durable_version,
            held=self._agreement.account(flat),
        )

    def _finish(self, save: Save, intent: Intent | None, pending: PendingWrite | None, left: threading.Event) -> None:
        """Background: write, receipt, decision. Leaves the outcome in `save`."""
        left.wait()  # the interpreter's lock, once lost, comes back after 5 ms: training goes first
        try:
            opening = self._opening(self._coordinator, intent, save) if self._coordinator and intent else None
            if self._coordinator:
                self._rendezvous.post(f"{run_prefix(self._run)}saving/0", json.dumps([save.id]))
            mine = self._promise(save, pending, opening)
            if self._coordinator and intent and opening:
                wait([opening], GRACE_S)  # nothing of ours should appear in an attempt that is decided
                opened = opening.result() if opening.done() and not opening.exception() else ()
                phase, reason = self._decide(self._coordinator, intent, save, pending, opened, mine)
            else:
                phase, reason = self._await_decision(save)
            cause = save.failure[1] if save.failure else None
            if isinstance(cause, Fenced):  # final for this process, whatever the others decide
                save.error = cause
            elif phase is Phase.FENCED:
                save.error = Fenced(f"{save.shown}: {reason}; this process must stop")
            elif phase is not Phase.COMMITTED:
                save.error = SaveFailed(f"{save.shown} was not saved: {reason}", step=save.step, attempt=save.attempt)
        except FATAL as error:
            save.error = error
        except Exception as error:  # nothing may be lost silently on a background thread
            text = f"{save.shown} was not saved: {type(error).__name__}: {error}"
            save.error = SaveFailed(text, step=save.step, attempt=save.attempt)
        if save.error:
            self._agreement.doubt()
            kind = "fenced" if isinstance(save.error, Fenced) else cause_of(str(save.error))
            emit(SaveNotCommitted(save.step, save.attempt, str(save.error), kind))
        else:
            save.durable_s = time.monotonic() - save.started
            emit(Committed(save.step, save.attempt, save.durable_s, save.committed_bytes))
            self._committed()

    def _opening(self, coordinator: Coordinator, intent: Intent, save: Save) -> Future[Opened]:
        """The attempt's intent, written beside the arrays. A thread of its own, as a store may hang for ever."""
        opening: Future[Opened] = Future()

        def run() -> None:
            try:
                opening.set_result(coordinator.open(intent, save.user))
            except BaseException as error:
                opening.set_exception(error)

        threading.Thread(target=run, name=f"open-{save.step}", daemon=True).start()
        return opening

    # The receipt: this process's promise.

    def _promise(self, save: Save, pending: PendingWrite | None, opening: Future[Opened] | None) -> bytes | None:
        """Make this process's part durable and sign a receipt, or say NO with the cause. `opening`: what must have been
        written before. Returns the receipt if the store has acknowledged it."""
        me = self._rendezvous
        signal = signal_prefix(self._run, save.id) + f"receipt/{me.process}"
        key = save.id.receipt_key(me.process)
        phase = "write"
        own: Begun[None] | None = None
        try:
            if save.failure:
                phase = save.failure[0]
                raise save.failure[1]
            assert pending is not None
            started = time.monotonic()
            self._enter(save, "writing", pending)
            failpoints.hit("save.write")
            own = overlap.begin(partial(self._put_process_state, save)) if save.process_state is not None else None
            pending.wait(self._options.save_timeout_s, partial(self._another_said_no, save, pending))
            save.seconds["write"] = time.monotonic() - started
            phase, started = "seal", time.monotonic()
            self._enter(save, "sealing", pending)
            failpoints.hit("save.seal")
            if own:
                own.result()
            files = self._make_durable(save, pending)
            save.seconds["seal"] = time.monotonic() - started
            if opening:
                phase = "open"
                self._await_opening(opening, save)
            phase = "receipt"
            failpoints.hit("receipt.write")
            receipt = encode(self._receipt(save, files, pending))
            # Receipt after fsync: it is a promise that survives power loss.
            if isinstance(self._catalog.storage.create(key, receipt), Exists):
                raise StorageError(f"{self._catalog.url}/{key}: another writer was here; attempts are never reused")
            failpoints.hit("receipt.after")
            me.post(signal, "yes")
            self._enter(save, "waiting", pending)
            return receipt
        except arrays.WriteStopped:  # another's NO has decided: no word of ours, so that theirs is the cause
            logging.warning("%s: gave up writing, another process has said no", save.shown)
        except Exception as error:
            save.failure = (phase, error)
            no = self._receipt(save, failure=self._failure(phase, error))
            me.post(signal, encode(no).decode())
            try:
                self._catalog.storage.create(key, encode(no))
            except Exception as second:  # the signal has told already; a full disk cannot hold the receipt
                logging.warning("%s: the NO of process %d could not be stored: %s", key, me.process, second)
        finally:
            if own:  # nothing of ours should appear in an attempt that is decided
                own.wait(GRACE_S)
        return None

    def _await_opening(self, opening: Future[Opened], save: Save) -> None:
        left_s = save.started + self._options.save_timeout_s - time.monotonic()
        try:
            opening.result(timeout=max(0.0, left_s))
        except TimeoutError as error:
            where = f"{self._catalog.url}/{save.id.intent_key}"
            raise WaitTimeout(f"{where} was not written within {self._options.save_timeout_s:g} s") from error

    def _enter(self, save: Save, phase: str, pending: PendingWrite | None = None) -> None:
        save.told_s = time.monotonic()
        written_bytes = pending.written_bytes if pending else 0
        emit(SavePhase(save.step, save.attempt, phase, save.told_s - save.started, written_bytes))

    def _another_said_no(self, save: Save, pending: PendingWrite) -> bool:
        """Asked again and again while this process writes, so it tells the progress, too."""
        if time.monotonic() - save.told_s >= PROGRESS_S:
            self._enter(save, "writing", pending)
        posted = self._rendezvous.poll(signal_prefix(self._run, save.id) + "receipt/")
        return any(value.startswith("{") for value in posted.values())

    def _receipt(
        self,
        save: Save,
        files: tuple[FileEntry, ...] = (),
        pending: PendingWrite | None = None,
        failure: Failure | None = None,
    ) -> Receipt:
        me = self._rendezvous
        return Receipt(
            format=FORMAT,
            write_id=uuid.uuid4().hex,
            step=save.step,
            attempt=save.attempt,
            process=me.process,
            host=me.hosts[me.process],
            files=files,
            boxes=dict(pending.boxes) if pending else {},
            places=pending.places(files) if pending else {},
            small=pending.small if pending else {},
            prints=pending.fingerprints() if pending else {},
            seconds=save.seconds,
            failure=failure,
            built_on=self._catalog.durable_version,
            went_by=pending.went_by if pending else "",
            own=pending.own if pending else b"",
        )

    def _failure(self, phase: str, cause: BaseException) -> Failure:
        me = self._rendezvous
        # A file's name may be no UTF-8, and this record must not fail, too.
        text = f"{type(cause).__name__}: {cause}"[:2000].encode(errors="backslashreplace").decode()
        return Failure(process=me.process, host=me.hosts[me.process], phase=phase, cause=text)

    def _make_durable(self, save: Save, pending: PendingWrite) -> tuple[FileEntry, ...]:
        """Make the files that this process wrote durable, whoever else writes beside it."""
        prefix = save.id.prefix
        storage, process = self._catalog.storage, self._rendezvous.process
        keys = [] if save.process_state is None else [prefix + layout.process_state_name(process)]
        known = {prefix + layout.STATE + file.path: file for file in pending.files}
        sealed = storage.make_durable([*keys, *known], known)
        return tuple(replace(entry, path=entry.path.removeprefix(prefix)) for entry in sealed)

    def _put_process_state(self, save: Save) -> None:
        """Beside the arrays: a store far away takes as long for both as for one."""
        key = save.id.process_state_key(self._rendezvous.process)
        if isinstance(self._catalog.storage.create(key, save.process_state or b""), Exists):
            raise StorageError(f"{self._catalog.url}/{key}: another writer was here; attempts are never reused")

    # The decision.

    def _decide(
        self,
        coordinator: Coordinator,
        intent: Intent,
        save: Save,
        pending: PendingWrite | None,
        opened: Opened,
        mine: bytes | None,
    ) -> tuple[Phase, str]:
        spent = time.monotonic() - save.started
        left_s = max(0.0, self._options.save_timeout_s - spent)
        all_in = partial(self._enter, save, "committing", pending)
        state = coordinator.decide(intent, save.user, pending, opened, left_s, all_in, mine)
        save.committed_bytes, save.stage_s = coordinator.committed_bytes, coordinator.stage_s
        return state.phase, describe(state)

    def _await_decision(self, save: Save) -> tuple[Phase, str]:
        """What the coordinator decided: from its signal, or, if that is lost, from the journal. Bounded."""
        if save.apart:  # before it staged anything; what process 0 does next is no business of this one
            return save.apart
        prefix = signal_prefix(self._run, save.id) + "decision/"
        started = time.monotonic()
        deadline_s = self._options.save_timeout_s + GRACE_S
        look_at = started + STORAGE_POLL_S
        while (now := time.monotonic()) - started < deadline_s:
            said = self._rendezvous.poll(prefix).get("0")
            if said:
                outcome = json.loads(said)
                return Phase[outcome["phase"]], str(outcome["reason"])
            if now >= look_at:
                look_at = now + STORAGE_POLL_S
                decided = self._journalled(save) or self._apart(save)
                if decided:
                    return decided
            time.sleep(min(DECISION_POLL_S, QUICK_POLL_S + (now - started) / 10))
        raise WaitTimeout(
            f"no decision from the coordinator, process 0 ({self._rendezvous.hosts[0]}), after {deadline_s:g} s"
        )

    def _apart(self, save: Save) -> tuple[Phase, str] | None:
        """Whether process 0 saves another step instead: one that this process has not begun, though all save in one
        order. Neither could be committed; both hear of it now, and not at their deadlines."""
        said = self._rendezvous.poll(f"{run_prefix(self._run)}saving/").get("0")
        theirs = AttemptId(*json.loads(said)) if said else None
        if theirs is None or theirs.label in self._began:
            return None
        if self._rendezvous.poll(signal_prefix(self._run, save.id) + "decision/"):
            return None  # it has just decided this one, and gone on: a decision is posted before the next save is
        me = self._rendezvous
        reason = (
            f"process 0 ({me.hosts[0]}) saves step {theirs.step} where process {me.process} ({me.hosts[me.process]}) "
            f"saves step {save.step}; all must save the same steps in the same order"
        )
        no = self._receipt(save, failure=self._failure("agree", UsageError(reason)))
        for attempt in (theirs, save.id):
            signal = signal_prefix(self._run, attempt) + f"receipt/{me.process}"
            me.post(signal, encode(replace(no, step=attempt.step, attempt=attempt.name)).decode())
        save.apart = Phase.ABORTED, reason
        return save.apart

    def _journalled(self, save: Save) -> tuple[Phase, str] | None:
        try:
            head = self._catalog.durable_head()
        except StorageError as error:  # perhaps it passes: the deadline decides
            logging.warning("%s: the journal cannot be read yet: %s", save.shown, error)
            return None
        if journal.is_live(head, save.id):
            return Phase.COMMITTED, ""
        if head.epoch > self._epoch:
            return Phase.FENCED, f"fenced by epoch {head.epoch} ({head.writer})"
        if journal.is_retired(head, save.id):
            return Phase.ABORTED, f"journal version {head.version}: {head.event.reason or 'aborted'}"
        return None
