"""The agent: what a training loop holds. One per JAX process; all processes call it in the same order.

A facade. Which steps are due is in `job/schedule`, one save after another in `job/save_sequence`, what a save does in
the background in `job/participant`, opening the epoch in `job/opening`, restoring in `job/restore`, deleting in
`run/deletion`. `save`, `restore`, `should_save`, `reached_preemption`, `wait_until_finished` and `close` belong to the
main thread; background threads never run a collective.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from absl import logging

from orchestrator import arrays, environment, failpoints
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.errors import OrchestratorError
from orchestrator.job import leaving, peer_failure
from orchestrator.job.coordinator import Coordinator
from orchestrator.job.holding import Holding
from orchestrator.job.opening import Opening
from orchestrator.job.participant import ParticipantFactory
from orchestrator.job.read_step import ReadOptions, Restored
from orchestrator.job.rendezvous import Rendezvous, connect, listen
from orchestrator.job.restore import RestoreOptions, restore_together
from orchestrator.job.save_sequence import Given, SaveSequence
from orchestrator.job.schedule import SaveSchedule
from orchestrator.job.signals import Signals
from orchestrator.job.startup import agree_at_start
from orchestrator.job.takeover import Holder, Takeover
from orchestrator.job.voter import GRACE_S
from orchestrator.observe import heartbeat
from orchestrator.observe.events import Closed, EpochOpened, emit
from orchestrator.observe.telemetry import Telemetry
from orchestrator.options import Options
from orchestrator.policy import KeepPolicy, SavePolicy, every, keeps, saves
from orchestrator.rules import arguments, configuration
from orchestrator.rules.records import Json
from orchestrator.rules.save_interval import Cadence
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory
from orchestrator.run.deletion import BackgroundDeletion
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from orchestrator.storage.port import Storage
from orchestrator.versions import warn_of_newer


class Agent:
    """Saves and restores the state of one job in the run at `root`. Making it writes nothing: the first `save` or
    `restore` opens a new epoch (incarnation), if nothing speaks against it, and takes over from an older agent of this
    process, whose save in flight is waited for before. All processes of the job make one alike.

    root: a directory, or gs://bucket/path; one place for all hosts. Made when something is saved.
    save: when `save` saves: every(n), every_seconds(s), at([..]), auto(s), continuous(s), combined by |; None: always.
    keep: which steps stay: last(n), every_nth(n), best("metric", n), within(s), combined by |; None: all of them.
    tiers: [memory(every=n)] also holds every n-th step in this machine's memory, for a quick `restore`: docs/tiers.md.
    options: how it behaves, see Options; None: Options().
    rendezvous: how the processes meet; None: by jax.distributed, if it is initialised, else this process is alone.
    storage: where records are stored; None: what `root` names. This and `rendezvous` are for tests and embedding.

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
        tiers: Sequence[MemoryTier] = (),
        options: Options | None = None,
        rendezvous: Rendezvous | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.options, policy = _checked(options, save, keep)
        tier = self._tier = tier_directory.chosen(tiers)
        store = storage or open_storage(root)  # before any barrier: what is no root is rejected at once
        warn_of_newer()
        timeout_s = self.options.rendezvous_timeout_s
        me = self._rendezvous = rendezvous or connect(timeout_s)
        peer_failure.register(self, self.options.failure_grace_s)
        failpoints.configure(os.environ, me.process)
        self._store = JournalStore(store, writer=f"{me.hosts[me.process]}/process-{me.process}/pid-{os.getpid()}")
        given = configuration.of_agent(policy, keep, self.options, tier.common if tier else None)
        self._takeover = Takeover(store, me).wait()
        incarnation_id = agree_at_start(self._store, me, "open the run", given, timeout_s)
        take_over, other_tree = self._takeover.take_over, self.options.other_tree
        self._opening = Opening(self._store, me, timeout_s, self._opened, other_tree=other_tree, take_over=take_over)
        self._schedule = SaveSchedule(policy, me, timeout_s)
        self._deletion = BackgroundDeletion(self._store)
        signals = Signals(me, incarnation_id)
        self._writer = _array_writer(self.options, me.process)
        coordinator = _coordinator(self._store, me, signals, keep, self.options) if me.process == 0 else None
        shared = (self._store, self._writer, me, signals, coordinator, self.options)
        self._participants = ParticipantFactory(*shared, committed=self._committed)
        self._saves = SaveSequence(self._participants, self._schedule, self._opening, self.options)
        self._holding = Holding(
            tier, self._store, me, incarnation_id, self._opening, self.options, _array_writer, self._participants
        )
        self._telemetry = Telemetry(self.options, self._store.url, process=me.process, host=me.hosts[me.process])
        self._listening = listen(me)
        self._lifetime = leaving.Lifetime(self, self._store.url, self._listening.stop, self._telemetry.close)
        heartbeat.record("opened", None)

    def _opened(self, epoch: int) -> None:
        failpoints.note(epoch=epoch)
        self._participants.opened(epoch)
        self._schedule.opened(self._store)
        self._telemetry.opened(epoch)
        self._takeover.opened(Holder(self._lifetime, self._saves, self.finish))
        emit(EpochOpened(epoch, self._store.url, self._rendezvous.count))
        self._holding.opened(epoch)

    def _committed(self) -> None:
        # A method: so the thread of a save in flight keeps a dropped agent, and the program's end waits for that save.
        if self._rendezvous.process == 0:
            self._deletion.start(self.epoch)

    def __repr__(self) -> str:
        return _described(self, self._rendezvous, closed=self._lifetime.closed)

    # Questions.

    @property
    def epoch(self) -> int | None:
        """This incarnation's number; None until the first `save` or `restore` has opened it."""
        return self._opening.epoch

    @property
    def failures(self) -> int:
        """How many saves have failed, or could not even begin, as far as they are known to have ended."""
        return self._saves.failures

    def should_save(self, step: int) -> bool:
        """Whether `save(step, ...)` would save or hold now: `save=` or `tiers=` says so, or hosts are being preempted.

        The same answer on all processes; a policy that depends on time is decided by process 0 (a collective).
        """
        step = arguments.step(step)
        heartbeat.record("training", step)
        self._saves.note_outcome(raise_now=False)
        return self._schedule.due(step) or self._holding.due(step)

    def reached_preemption(self, step: int) -> bool:
        """True, on all hosts at the same step, once any host got SIGTERM: `save` has saved it; leave the loop."""
        step = arguments.step(step)
        heartbeat.record("training", step)
        return self._schedule.reached_preemption(step)

    def latest_step(self) -> int | None:
        """The newest step in the store; None in a new run. Raises NothingToRestore if all are quarantined."""
        live = self._store.find(None)
        return live.step if live else None

    def all_steps(self) -> list[int]:
        """All restorable steps, ascending."""
        head = self._store.head()
        return sorted(live.step for live in head.live if live.restorable) if head else []

    @property
    def cadence(self) -> Cadence | None:
        """What `save=oc.auto()` has chosen, and why; None before the first commit, and on processes other than 0."""
        return self._schedule.cadence

    @property
    def saved_step(self) -> int | None:
        """The step that was saved last, or is being saved; None once that save has failed."""
        self._saves.note_outcome(raise_now=False)
        return self._schedule.saved_step

    @property
    def failed_step(self) -> int | None:
        """The step whose save has failed last; None once it was begun again."""
        self._saves.note_outcome(raise_now=False)
        return self._schedule.failed_step

    @property
    def in_flight(self) -> int | None:
        """The step that is being saved in the background, None if none is."""
        return self._saves.in_flight

    # Saving and restoring.

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
        """Save `state` as `step` if it is due (or `force`), hold it if a tier is. True if a save to the store started.

        `metrics`: numbers that retention policies see. `extra`: the user's JSON. `process_state`: this process's own
        bytes. When it returns, every array may be donated or overwritten. Waits for the save before it, if any.
        Raises UnsupportedLeaf and OtherJob before anything is written, Fenced if a newer incarnation has taken over,
        SaveFailed of an earlier save with on_save_failure="raise". The first save opens the epoch: whatever keeps this
        job from that (StorageError without the right to write, JournalLost) is raised, whatever on_save_failure says.
        """
        with self._lifetime.used_by_one("save"), self._holding.beside(step):
            self._saves.note_outcome(raise_now=True)
            if not (self.should_save(step) or force):
                return False
            self._takeover.wait()
            step, given = arguments.step(step), Given(metrics, extra, process_state)
            memory = None if self._schedule.direct else self._holding
            started = (force or self._schedule.was_due) and self._saves.save(step, state, given, memory)
            self._holding.hold(step, state, given, preempted=self._schedule.preempted)
            return started

    def restore(
        self, like: Any, *, step: int | None = None, partial: bool = False, cast: bool = False, strict: bool = False
    ) -> Restored | None:
        """The newest good step, or `step`, in the structure and on the shardings of `like`. None in a new run.

        `like`: a pytree of jax.ShapeDtypeStruct (with shardings) or arrays; numpy leaves come back as numpy. Any mesh,
        device count and process count. `partial`: `like` may be a subtree. `cast`: convert dtypes. A damaged newest
        step is quarantined and the one before is taken, unless `strict` or a given `step`. A supervisor may ask, by
        ORCHESTRATOR_STEP_BACK=N, to leave out the N newest. With `tiers`, a newer step that is held whole is taken.
        Raises Mismatch (path, expected, got; nothing read), StepNotFound, NothingToRestore, Damaged.
        """
        with self._lifetime.used_by_one("restore"):
            self.wait_until_finished()
            self._takeover.wait()
            self._holding.settle()
            options, opening = _restore_options(self.options, step, strict, partial, cast), self._opening.by_restore
            restored = restore_together(self._store, self._rendezvous, like, options, opening, self._tier)
            self._writer.prepare(like if restored is None else restored.state)
            return restored

    # Waiting and leaving.

    def wait_until_finished(self) -> None:
        """Return when no save is in flight: the last one is committed or has failed.

        Raises Fenced, and SaveFailed with on_save_failure="raise". Bounded by save_timeout_s.
        """
        self._saves.wait()

    def close(self) -> None:
        """Wait for the save in flight, leave together with the other processes, end background work. Idempotent.
        Raises what the last save raised, as `wait_until_finished`. Called again after a Ctrl-C, it waits again."""
        if not self._lifetime.close():
            self._saves.settle()
            return self._leave()
        try:
            self._saves.wait()
            self._holding.close()
            self._deletion.wait(self.options.rendezvous_timeout_s)
            self._rendezvous.gather("leave together", None, self.options.rendezvous_timeout_s)
        finally:
            emit(Closed(self.failures, self._schedule.asked_step))
            self._leave()

    def finish(self, state: str = leaving.CLOSED) -> OrchestratorError | None:
        """`close`, for a program that is failing or ends: finishes this process's save, but waits at no barrier for
        others, who may not come. Returns why that save, or an earlier one of which nobody has heard yet, is lost."""
        if not self._lifetime.close(state):
            return None
        try:
            self._deletion.stop()
            error = self._saves.finish()
            self._holding.finish()
            self._deletion.wait(GRACE_S)  # what it leaves is deleted by the next incarnation
            return error
        finally:
            self._leave()

    def _leave(self) -> None:
        self._writer.close(GRACE_S)
        self._holding.leave()
        self._listening.stop(leaving=self._schedule.preempted)
        self._telemetry.close()
        self._lifetime.over(self.in_flight)

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._saves.hurry()
        if value is not None:
            peer_failure.block_left(value)
        if error := self.finish():
            logging.warning("while leaving: %s", error)


def _described(agent: Agent, me: Rendezvous, *, closed: bool) -> str:
    parts = ["not opened yet" if agent.epoch is None else f"epoch {agent.epoch}"]
    parts += [] if agent.in_flight is None else [f"saving step {agent.in_flight}"]
    parts += [f"{agent.failures} failed saves"] if agent.failures else []
    parts += ["closed"] if closed else []
    return f"<Agent {agent._store.url}: process {me.process} of {me.count}, {', '.join(parts)}>"


def _checked(options: object, save: SavePolicy | None, keep: KeepPolicy | None) -> tuple[Options, SavePolicy]:
    """What an agent was given, or what holds instead. Raises UsageError."""
    options = Options() if options is None else options
    if not isinstance(options, Options):
        raise arguments.rejection("options", options, "orchestrator.Options(...)")
    saves("save", policy := every(1) if save is None else save)
    if keep is not None:
        keeps("keep", keep)
    return options, policy


def _array_writer(options: Options, process: int) -> ArrayWriter:
    return ArrayWriter(
        ArrayOptions(
            tiled=options.chunks == "tiles",
            compression=options.compression,
            host_bytes_max=options.host_bytes_max,
            skip_when_full=options.when_full == "skip",
            timeout_s=options.save_timeout_s,
            compare_own=options.host_local != "ignore",
            stage=options.stage,
            stage_margin=options.stage_margin,
        ),
        process,
    )


def _coordinator(
    journal_store: JournalStore, me: Rendezvous, signals: Signals, keep: KeepPolicy | None, options: Options
) -> Coordinator:
    return Coordinator(
        journal_store,
        me,
        signals,
        keep=keep,
        quarantine_keep_s=options.quarantine_keep_s,
        host_local=options.host_local,
    )


def _restore_options(options: Options, step: int | None, strict: bool, partial: bool, cast: bool) -> RestoreOptions:
    reader = functools.partial(arrays.load, host_bytes_max=options.restore_bytes_max)
    return RestoreOptions(
        options.rendezvous_timeout_s,
        step=step,
        back=environment.step_back(),
        strict=strict,
        load_once=options.load_once,
        read=ReadOptions(partial=partial, cast=cast, attest=options.attest == "full", reader=reader),
    )
