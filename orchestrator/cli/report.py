"""`orchestrator report`: one self-contained page about a run, out of its journal, records and events."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
import uuid
from collections.abc import Iterable
from importlib import resources
from typing import Any

import msgspec

from orchestrator.cli import render
from orchestrator.cli.commands import Flags, open_catalog
from orchestrator.errors import EXIT_OK, OrchestratorError, StorageError
from orchestrator.observe.event_log import directory_of, read
from orchestrator.observe.timeline import Story
from orchestrator.rules import journal, save_interval
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.json_numbers import Stored
from orchestrator.rules.records import Head, LeafSpec, LiveStep
from orchestrator.rules.restore_cost import leaf_bytes, partition
from orchestrator.run.journal_store import Catalog
from orchestrator.texts import printable

_LEAVES = 12  # of which the sharding is drawn: the largest
_RECENT = 200  # saves that what-if figures go by
_PLACE = "/*REPORT*/null"


class Part(msgspec.Struct, array_like=True):
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


class SaveOf(msgspec.Struct, forbid_unknown_fields=True):
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
    pins: list[str] = []
    metrics: dict[str, Stored] = {}
    parts: list[Part] = []


class EpochOf(msgspec.Struct, forbid_unknown_fields=True):
    """An incarnation. `lost_s`: from the newest durable state to this start, and the restore: what the restart cost."""

    epoch: int
    opened: float
    by: str
    processes: int | None
    from_step: int | None
    restore_s: float | None
    lost_s: float


class Incident(msgspec.Struct, forbid_unknown_fields=True):
    time: float
    kind: str
    step: int | None
    attempt: str | None
    text: str
    by: str


class Goodput(msgspec.Struct, forbid_unknown_fields=True):
    """Seconds of the run's `wall_s` that were not training. `share`: of the rest; None where the run is empty."""

    wall_s: float
    blocked_s: float
    restarts_s: float
    share: float | None


class IntervalOf(msgspec.Struct, forbid_unknown_fields=True):
    """What saving every `interval_s` would have as goodput, by Daly's model and what this run has measured. `mark`:
    `optimum`, or `this run` (the median between its saves)."""

    interval_s: float
    share: float
    mark: str


class LeafOf(msgspec.Struct, forbid_unknown_fields=True):
    """`split`: mesh axes that split each dimension; None if it is not a sharded array."""

    label: str
    shape: list[int]
    dtype: str
    bytes: int
    split: list[list[str]] | None


class MeshOf(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    axes: dict[str, int]
    devices: int
    processes: int
    leaves: list[LeafOf]
    leaf_count: int


class Report(msgspec.Struct, forbid_unknown_fields=True):
    """All that the page shows. Times are seconds since 1970."""

    root: str
    made: float
    epoch: int
    version: int
    newest: int | None
    newest_time: float | None
    hosts: dict[str, str]
    saves: list[SaveOf]
    epochs: list[EpochOf]
    incidents: list[Incident]
    goodput: Goodput
    mesh: MeshOf | None
    intervals: list[IntervalOf] = []


def report(root: str, flags: Flags) -> int:
    catalog = open_catalog(root)
    made = build(catalog, Story().tell(read(directory_of(catalog.url, flags["events_dir"]))), time.time())
    if flags["json"]:
        render.give(msgspec.to_builtins(made))
        return EXIT_OK
    body = page(made)
    write_whole(flags["output"], body)
    where = os.path.abspath(flags["output"])
    render.say(f"{where}: {len(made.saves)} saves, {len(made.epochs)} incarnations, {render.size(len(body))}")
    return EXIT_OK


def page(made: Report) -> str:
    """The page, with everything in it."""
    template = resources.files("orchestrator.cli").joinpath("report.html").read_text("utf-8")
    # `<` is escaped, so that no text of a run can end the script.
    body = msgspec.json.encode(_printable(msgspec.to_builtins(made))).decode()
    return template.replace(_PLACE, body.replace("<", "\\u003c"))


def _printable(value: Any) -> Any:
    """A browser obeys no escape sequences, but bidirectional overrides; and what is copied out of it goes anywhere."""
    match value:
        case str():
            return printable(value)
        case dict():
            return {printable(name): _printable(each) for name, each in value.items()}
        case list():
            return [_printable(each) for each in value]
    return value


def write_whole(path: str, text: str) -> None:
    """Replace `path`; nobody sees half of it."""
    partial = f"{path}.{uuid.uuid4().hex[:8]}"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise StorageError(f"{path} cannot be written: {error.strerror}") from error


def build(catalog: Catalog, story: Story, now: float) -> Report:
    head = catalog.require_head()
    heads = []
    with render.progress() as display:
        bar = render.Bar(display, "journal", head.version + 1)
        for each in catalog.entries():
            heads.append(_Slim.of(each))
            bar.add(1)
    saves = _saves(heads, head, story)
    epochs = _epochs(heads, story)
    newest = journal.newest(head)
    return Report(
        root=catalog.url,
        made=now,
        epoch=head.epoch,
        version=head.version,
        newest=newest.step if newest else None,
        newest_time=newest.time if newest else None,
        hosts={str(save.process): save.host for save in story.saves.values()},
        saves=saves,
        epochs=epochs,
        incidents=_incidents(heads, story),
        goodput=_goodput(heads, saves, epochs, story),
        mesh=_mesh(catalog, newest),
        intervals=_intervals(heads, saves),
    )


class _Slim(msgspec.Struct):
    """What a report keeps of a journal entry: a long run has many, and each is complete. `about`: the step it is of."""

    head: Head
    about: LiveStep | None
    newest: LiveStep | None

    @classmethod
    def of(cls, head: Head) -> _Slim:
        about = journal.find(head, head.event.step) if head.event.step is not None else None
        return cls(msgspec.structs.replace(head, live=(), retired=(), aside=()), about, journal.newest(head))


def _saves(heads: Iterable[_Slim], head: Head, story: Story) -> list[SaveOf]:
    parts: dict[AttemptId, list[Part]] = {}
    for save in story.saves.values():
        part = Part(
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
    live = {one.id for one in (*head.live, *head.aside)}
    retired = {one.id for one in head.retired}
    saves: dict[AttemptId, SaveOf] = {}
    for slim in heads:
        event = slim.head.event
        if event.step is None or event.attempt is None:
            continue
        key = AttemptId(event.step, event.attempt)
        if key in saves and slim.about:
            saves[key].trust, saves[key].pins = slim.about.trust, list(slim.about.pins)
        if event.kind not in ("committed", "aborted"):
            continue
        began = min((part.began for part in parts.get(key, [])), default=slim.head.time)
        made = SaveOf(*key, slim.head.epoch, began, event.kind, slim.head.time, 0)
        if event.kind == "aborted":
            made.reason = why(slim.head)
        else:
            made.state = "live" if key in live else "retired" if key in retired else "gone"
            if slim.about:
                made.bytes, made.metrics, made.trust = slim.about.bytes, slim.about.stored_metrics, slim.about.trust
                made.pins = list(slim.about.pins)
        saves[key] = made
    for key, mine in parts.items():
        if key not in saves:
            began = min(part.began for part in mine)
            saves[key] = SaveOf(*key, key.epoch, began, "unknown", None, 0, "no decision was journalled")
        saves[key].parts = sorted(mine, key=lambda part: part.process)
    return sorted(saves.values(), key=lambda save: save.began)


def why(head: Head) -> str:
    """The causes of an abort, host by host."""
    causes = [f"process {one.process} ({one.host}) in {one.phase}: {one.cause}" for one in head.event.failures]
    return "; ".join([*([head.event.reason] if head.event.reason else []), *causes])


def _epochs(heads: Iterable[_Slim], story: Story) -> list[EpochOf]:
    restored = {(each.epoch, each.process): each for each in story.restores}
    epochs: list[EpochOf] = []
    for slim in heads:
        if slim.head.event.kind == "opened-epoch":
            epoch = slim.head.epoch
            mine = restored.get((epoch, 0))
            _, processes = story.opened.get(epoch, (0.0, None))
            since = slim.head.time - slim.newest.time if slim.newest else 0.0
            if epoch > 1 and not slim.newest and epochs:  # nothing was durable: all since the first start is lost
                since = slim.head.time - epochs[-1].opened
            lost_s = max(0.0, since) + (mine.seconds if mine else 0.0) if epoch > 1 else 0.0
            from_step = mine.step if mine else None
            restore_s = mine.seconds if mine else None
            opened, by = slim.head.time, slim.head.writer
            epochs.append(EpochOf(epoch, opened, by, processes, from_step, restore_s, lost_s))
    return epochs


def _incidents(heads: Iterable[_Slim], story: Story) -> list[Incident]:
    found = []
    epochs = 0
    for slim in heads:
        head, event = slim.head, slim.head.event
        if event.kind == "aborted":
            found.append(Incident(head.time, "save aborted", event.step, event.attempt, why(head), head.writer))
        elif event.kind in ("quarantined", "released", "recovered"):
            found.append(Incident(head.time, event.kind, event.step, event.attempt, event.reason, head.writer))
        elif event.kind == "opened-epoch":
            epochs += 1
            if epochs > 1:
                text = f"incarnation {head.epoch} took over from {head.epoch - 1}"
                found.append(Incident(head.time, "restart", None, None, text, head.writer))
    fenced = [save for save in story.saves.values() if save.outcome == "fenced"]
    for save in fenced:
        at, by = save.began + (save.ended_s or 0.0), f"process {save.process} ({save.host})"
        found.append(Incident(at, "fenced", save.step, save.attempt, save.reason, by))
    return sorted(found, key=lambda incident: incident.time)


def _goodput(heads: list[_Slim], saves: list[SaveOf], epochs: list[EpochOf], story: Story) -> Goodput:
    """Training waits for the slowest host of a save, and starts anew from the newest durable state after a restart."""
    heard = max((host.heard for host in story.hosts.values()), default=0.0)
    wall_s = max(heads[-1].head.time, heard) - heads[0].head.time if heads else 0.0
    blocked_s = sum(max((part.blocked for part in save.parts), default=0.0) for save in saves)
    restarts_s = sum(epoch.lost_s for epoch in epochs)
    share = max(0.0, 1 - (blocked_s + restarts_s) / wall_s) if wall_s > 0 else None
    return Goodput(wall_s, blocked_s, restarts_s, share)


def _intervals(heads: list[_Slim], saves: list[SaveOf]) -> list[IntervalOf]:
    """Expected goodput at the interval of this run, at the optimum and around it; [] before anything was measured."""
    told = [save for save in saves if save.outcome == "committed" and save.parts][-_RECENT:]
    if not told:
        return []
    blocked_s = [max(part.blocked for part in save.parts) for save in told]
    durable_s = [max(part.ended for part in save.parts) for save in told]
    costs = save_interval.costs(save_interval.history(slim.head for slim in heads), blocked_s, durable_s)
    best = save_interval.optimal_interval_s(costs.blocked_s, costs.mtbf_s)
    marks = {best * factor: "" for factor in (1 / 16, 1 / 4, 4, 16)} | {best: "optimum"}
    gaps = [after.began - before.began for before, after in itertools.pairwise(told) if before.epoch == after.epoch]
    if gaps and statistics.median(gaps) > 0:
        marks[statistics.median(gaps)] = "this run"
    return [IntervalOf(each, share, marks[each]) for each, share in save_interval.goodputs(costs, sorted(marks))]


def _mesh(catalog: Catalog, newest: LiveStep | None) -> MeshOf | None:
    if newest is None:
        return None
    try:
        intent = catalog.intent(newest, catalog.manifest(newest))
    except OrchestratorError:  # a report of a damaged run is wanted most of all
        return None
    leaves = sorted(intent.tree.leaves, key=leaf_bytes, reverse=True)
    drawn = [_leaf(leaf) for leaf in leaves[:_LEAVES] if leaf.in_store]
    count = sum(leaf.in_store for leaf in leaves)
    return MeshOf(newest.step, intent.mesh, intent.device_count, intent.process_count, drawn, count)


def _leaf(leaf: LeafSpec) -> LeafOf:
    split = partition(leaf)
    axes = None if split is None else [list(names) for names in split]
    return LeafOf(leaf.label, list(leaf.shape), leaf.dtype, leaf_bytes(leaf), axes)
