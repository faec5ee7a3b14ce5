"""What `orchestrator report` has to say about a run, out of its journal, its records and its events."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from orchestrator.cli import render, report_findings, report_time
from orchestrator.cli.log import reason_and_causes
from orchestrator.cli.report_parts import (
    IntervalGoodput,
    LeafSharding,
    ReportedMesh,
    ReportedSave,
    RunReport,
    SavePart,
)
from orchestrator.cli.report_time import Entry
from orchestrator.errors import OrchestratorError
from orchestrator.observe.timeline import Timeline
from orchestrator.rules import journal, save_interval
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head, LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes, partition
from orchestrator.run.journal_store import JournalStore

_LEAVES = 12  # of which the sharding is drawn: the largest
_RECENT = 200  # saves that what-if figures go by


def build(
    store: JournalStore,
    timeline: Timeline,
    now: float,
    heard: float = 0.0,
    cut_at: Mapping[int, float] | None = None,
) -> RunReport:
    """The report that `timeline` and the run's journal make at `now` (seconds since 1970). `heard`: when a host last
    changed its events' file, which it does even where there is no room for an event. `cut_at`: process -> the time of
    its first event that was read, where it has more."""
    head = store.require_head()
    entries = []
    with render.bar("journal", head.version + 1) as bar:
        for each in store.entries():
            entries.append(Entry.of(each))
            bar.add(1)
    saves = _saves(entries, head, timeline)
    stretches = report_time.stretches(entries, timeline)
    epochs = report_time.epochs(entries, timeline, stretches)
    newest = journal.newest(head)
    made = RunReport(
        root=store.url,
        made=now,
        epoch=head.epoch,
        version=head.version,
        newest=newest.step if newest else None,
        newest_time=newest.time if newest else None,
        hosts={str(save.process): save.host for save in timeline.saves.values()},
        saves=saves,
        epochs=epochs,
        incidents=report_time.incidents(entries, timeline, stretches, now, heard),
        goodput=report_time.goodput(stretches, epochs),
        mesh=_mesh(store, newest),
        intervals=_intervals(entries, saves),
        spans=report_time.spans(stretches),
        utc_offset_s=(offset_s := time.localtime(now).tm_gmtoff),
        zone=render.zone(offset_s),
    )
    verdict, findings = report_findings.of(made, head, timeline, heard, cut_at or {})
    return replace(made, verdict=verdict, findings=findings)


def _saves(entries: Iterable[Entry], head: Head, timeline: Timeline) -> tuple[ReportedSave, ...]:
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
            saves[key] = _undecided(timeline, key, mine, began)
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


def _undecided(timeline: Timeline, key: AttemptId, parts: Iterable[SavePart], began: float) -> ReportedSave:
    """A save that the journal says nothing of. Where it could not be written, the hosts themselves say what became of
    the save."""
    step, attempt = key
    mine = [timeline.saves[step, attempt, process] for process in sorted(part.process for part in parts)]
    failed = next((save for save in mine if save.outcome not in ("", "committed")), None)
    if failed is None:
        return ReportedSave(*key, key.epoch, began, "unknown", None, 0, "no decision was journalled")
    return ReportedSave(*key, key.epoch, began, "aborted", None, 0, failed.reason)


def _decided(entry: Entry, key: AttemptId, began: float, state: str) -> ReportedSave:
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


def _intervals(entries: list[Entry], saves: Sequence[ReportedSave]) -> tuple[IntervalGoodput, ...]:
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
