"""What `orchestrator report` has to say about a run, out of its journal, its records and its events."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace

from orchestrator.cli import render
from orchestrator.cli.command import Result
from orchestrator.cli.log import reason_and_causes
from orchestrator.errors import OrchestratorError
from orchestrator.observe.timeline import Timeline
from orchestrator.rules import journal, save_interval
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.json_numbers import Stored
from orchestrator.rules.records import Head, LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes, partition
from orchestrator.run.journal_store import JournalStore

_LEAVES = 12  # of which the sharding is drawn: the largest
_RECENT = 200  # saves that what-if figures go by


class SavePart(Result, frozen=True, array_like=True, forbid_unknown_fields=False):
    """One process's part of a save. Each phase's beginning, and the end, in seconds after the save began; -1: not."""

    process: int
    began: float
    writing: float
    sealing: float
    waiting: float
    committing: float
    ended: float
    blocked: float
    bytes: int


class ReportedSave(Result, frozen=True):
    """`outcome`: committed, aborted, or unknown (the job died). `state`: live, retired or gone, of a committed one."""

    step: int
    attempt: str
    epoch: int
    began: float
    outcome: str
    decided: float | None
    bytes: int
    reason: str = ""
    state: str = ""
    trust: str = ""
    pins: tuple[str, ...] = ()
    metrics: dict[str, Stored] = msgspec.field(default_factory=dict)
    parts: tuple[SavePart, ...] = ()


class ReportedEpoch(Result, frozen=True):
    """An incarnation. `lost_s`: from the newest durable state to this start, and the restore: what the restart cost."""

    epoch: int
    opened: float
    by: str
    processes: int | None
    from_step: int | None
    restore_s: float | None
    lost_s: float


class Incident(Result, frozen=True):
    time: float
    kind: str
    step: int | None
    attempt: str | None
    text: str
    by: str


class Goodput(Result, frozen=True):
    """Seconds of the run's `wall_s` that were not training. `share`: of the rest; None where the run is empty."""

    wall_s: float
    blocked_s: float
    restarts_s: float
    share: float | None


class IntervalGoodput(Result, frozen=True):
    """What saving every `interval_s` would have as goodput, by Daly's model and what this run has measured. `mark`:
    `optimum`, or `this run` (the median between its saves)."""

    interval_s: float
    share: float
    mark: str


class LeafSharding(Result, frozen=True):
    """`split`: mesh axes that split each dimension; None if it is not a sharded array."""

    label: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    split: tuple[tuple[str, ...], ...] | None


class ReportedMesh(Result, frozen=True):
    step: int
    axes: dict[str, int]
    devices: int
    processes: int
    leaves: tuple[LeafSharding, ...]
    leaf_count: int


class RunReport(Result, frozen=True):
    """`report`: all that the page shows. Times are seconds since 1970."""

    root: str
    made: float
    epoch: int
    version: int
    newest: int | None
    newest_time: float | None
    hosts: dict[str, str]
    saves: tuple[ReportedSave, ...]
    epochs: tuple[ReportedEpoch, ...]
    incidents: tuple[Incident, ...]
    goodput: Goodput
    mesh: ReportedMesh | None
    intervals: tuple[IntervalGoodput, ...] = ()


def build(store: JournalStore, timeline: Timeline, now: float) -> RunReport:
    """The report that `timeline` and the run's journal make at `now` (seconds since 1970)."""
    head = store.require_head()
    entries = []
    with render.progress() as display:
        bar = render.Bar(display, "journal", head.version + 1)
        for each in store.entries():
            entries.append(_Entry.of(each))
            bar.add(1)
    saves = _saves(entries, head, timeline)
    epochs = _epochs(entries, timeline)
    newest = journal.newest(head)
    return RunReport(
        root=store.url,
        made=now,
        epoch=head.epoch,
        version=head.version,
        newest=newest.step if newest else None,
        newest_time=newest.time if newest else None,
        hosts={str(save.process): save.host for save in timeline.saves.values()},
        saves=saves,
        epochs=epochs,
        incidents=_incidents(entries, timeline),
        goodput=_goodput(entries, saves, epochs, timeline),
        mesh=_mesh(store, newest),
        intervals=_intervals(entries, saves),
    )


class _Entry(msgspec.Struct):
    """What a report keeps of a journal entry: a long run has many, and each is complete. `about`: the step it is of."""

    head: Head
    about: LiveStep | None
    newest: LiveStep | None

    @classmethod
    def of(cls, head: Head) -> _Entry:
        about = journal.find(head, head.event.step) if head.event.step is not None else None
        return cls(msgspec.structs.replace(head, live=(), retired=(), aside=()), about, journal.newest(head))


def _saves(entries: Iterable[_Entry], head: Head, timeline: Timeline) -> tuple[ReportedSave, ...]:
    parts = _parts(timeline)
    states = {one.id: "retired" for one in head.retired}
    states |= {one.id: "live" for one in (*head.live, *head.aside)}
    saves: dict[AttemptId, ReportedSave] = {}
    for entry in entries:
        event = entry.head.event
        if event.step is None or event.attempt is None:
            continue
        key = AttemptId(event.step, event.attempt)
        if key in saves and entry.about:
            saves[key] = replace(saves[key], trust=entry.about.trust, pins=entry.about.pins)
        if event.kind in ("committed", "aborted"):
            began = min((part.began for part in parts.get(key, [])), default=entry.head.time)
            saves[key] = _decided(entry, key, began, states.get(key, "gone"))
    for key, mine in parts.items():
        if key not in saves:
            began = min(part.began for part in mine)
            saves[key] = ReportedSave(*key, key.epoch, began, "unknown", None, 0, "no decision was journalled")
        saves[key] = replace(saves[key], parts=tuple(sorted(mine, key=lambda part: part.process)))
    return tuple(sorted(saves.values(), key=lambda save: save.began))


def _parts(timeline: Timeline) -> dict[AttemptId, list[SavePart]]:
    parts: dict[AttemptId, list[SavePart]] = {}
    for save in timeline.saves.values():
        part = SavePart(
            process=save.process,
            began=save.began,
            writing=save.phases.get("writing", -1.0),
            sealing=save.phases.get("sealing", -1.0),
            waiting=save.phases.get("waiting", -1.0),
            committing=save.phases.get("committing", -1.0),
            ended=-1.0 if save.ended_s is None else save.ended_s,
            blocked=save.blocked_s,
            bytes=save.written_bytes,
        )
        parts.setdefault(save.id, []).append(part)
    return parts


def _decided(entry: _Entry, key: AttemptId, began: float, state: str) -> ReportedSave:
    """A save that the journal calls committed or aborted."""
    head, about = entry.head, entry.about
    save = ReportedSave(*key, head.epoch, began, head.event.kind, head.time, 0)
    if head.event.kind == "aborted":
        return replace(save, reason=reason_and_causes(head.event))
    if about is None:
        return replace(save, state=state)
    return replace(
        save, state=state, bytes=about.bytes, metrics=about.stored_metrics, trust=about.trust, pins=about.pins
    )


def _epochs(entries: Iterable[_Entry], timeline: Timeline) -> tuple[ReportedEpoch, ...]:
    restored = {(each.epoch, each.process): each for each in timeline.restores}
    epochs: list[ReportedEpoch] = []
    for entry in entries:
        if entry.head.event.kind == "opened-epoch":
            epoch = entry.head.epoch
            mine = restored.get((epoch, 0))
            _, processes = timeline.opened.get(epoch, (0.0, None))
            since = entry.head.time - entry.newest.time if entry.newest else 0.0
            if epoch > 1 and not entry.newest and epochs:  # nothing was durable: all since the first start is lost
                since = entry.head.time - epochs[-1].opened
            lost_s = max(0.0, since) + (mine.seconds if mine else 0.0) if epoch > 1 else 0.0
            from_step = mine.step if mine else None
            restore_s = mine.seconds if mine else None
            opened, by = entry.head.time, entry.head.writer
            epochs.append(ReportedEpoch(epoch, opened, by, processes, from_step, restore_s, lost_s))
    return tuple(epochs)


def _incidents(entries: Iterable[_Entry], timeline: Timeline) -> tuple[Incident, ...]:
    found = []
    epochs = 0
    for entry in entries:
        head, event = entry.head, entry.head.event
        if event.kind == "aborted":
            found.append(
                Incident(
                    head.time, "save aborted", event.step, event.attempt, reason_and_causes(head.event), head.writer
                )
            )
        elif event.kind in ("quarantined", "released", "recovered"):
            found.append(Incident(head.time, event.kind, event.step, event.attempt, event.reason, head.writer))
        elif event.kind == "opened-epoch":
            epochs += 1
            if epochs > 1:
                text = f"incarnation {head.epoch} took over from {head.epoch - 1}"
                found.append(Incident(head.time, "restart", None, None, text, head.writer))
    fenced = [save for save in timeline.saves.values() if save.outcome == "fenced"]
    for save in fenced:
        at, by = save.began + (save.ended_s or 0.0), f"process {save.process} ({save.host})"
        found.append(Incident(at, "fenced", save.step, save.attempt, save.reason, by))
    return tuple(sorted(found, key=lambda incident: incident.time))


def _goodput(
    entries: list[_Entry], saves: Sequence[ReportedSave], epochs: Sequence[ReportedEpoch], timeline: Timeline
) -> Goodput:
    """Training waits for the slowest host of a save, and starts again from the newest durable state after a restart."""
    last_seen = max((host.last_seen for host in timeline.hosts.values()), default=0.0)
    wall_s = max(entries[-1].head.time, last_seen) - entries[0].head.time if entries else 0.0
    blocked_s = sum(max((part.blocked for part in save.parts), default=0.0) for save in saves)
    restarts_s = sum(epoch.lost_s for epoch in epochs)
    share = max(0.0, 1 - (blocked_s + restarts_s) / wall_s) if wall_s > 0 else None
    return Goodput(wall_s, blocked_s, restarts_s, share)


def _intervals(entries: list[_Entry], saves: Sequence[ReportedSave]) -> tuple[IntervalGoodput, ...]:
    """Expected goodput at the interval of this run, at the optimum and around it; () before anything was measured."""
    measured = [save for save in saves if save.outcome == "committed" and save.parts][-_RECENT:]
    if not measured:
        return ()
    blocked_s = [max(part.blocked for part in save.parts) for save in measured]
    durable_s = [max(part.ended for part in save.parts) for save in measured]
    costs = save_interval.costs(save_interval.history(entry.head for entry in entries), blocked_s, durable_s)
    best = save_interval.optimal_interval_s(costs.blocked_s, costs.mtbf_s)
    marks = {best * factor: "" for factor in (1 / 16, 1 / 4, 4, 16)} | {best: "optimum"}
    gaps = [after.began - before.began for before, after in itertools.pairwise(measured) if before.epoch == after.epoch]
    if gaps and statistics.median(gaps) > 0:
        marks[statistics.median(gaps)] = "this run"
    return tuple(
        IntervalGoodput(each, share, marks[each]) for each, share in save_interval.goodputs(costs, sorted(marks))
    )


def _mesh(store: JournalStore, newest: LiveStep | None) -> ReportedMesh | None:
    if newest is None:
        return None
    try:
        intent = store.step(newest).intent
    except OrchestratorError:  # nobody needs a report more than who has a damaged run
        return None
    leaves = sorted(intent.tree.leaves, key=leaf_bytes, reverse=True)
    drawn = [_leaf(leaf) for leaf in leaves[:_LEAVES] if leaf.in_store]
    count = sum(leaf.in_store for leaf in leaves)
    return ReportedMesh(newest.step, intent.mesh, intent.device_count, intent.process_count, tuple(drawn), count)


def _leaf(leaf: LeafSpec) -> LeafSharding:
    return LeafSharding(leaf.label, leaf.shape, leaf.dtype, leaf_bytes(leaf), partition(leaf))
