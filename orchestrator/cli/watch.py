"""`orchestrator watch`: what a run does now. Reads the journal and the events of its processes; writes nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.command import EVENTS, Command, Flag, Flags, Result, open_store
from orchestrator.observe.event_log import Tail, directory_of
from orchestrator.observe.events import PHASES
from orchestrator.observe.heartbeat import EVENT_INTERVAL_S
from orchestrator.observe.timeline import HostSave, Timeline
from orchestrator.rules import arguments, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head

SILENT_S = 3 * EVENT_INTERVAL_S
_COMMITS = 5
_HOSTS_SHOWN = 40


class HostNow(Result, frozen=True):
    """`state`: a save's phase, training, restored, starting or left; `silent`: its newest event is
    more than SILENT_S old, which `heard_s` says."""

    process: int
    host: str
    state: str
    step: int | None
    since_s: float
    heard_s: float
    silent: bool
    written_bytes: int
    bytes_per_s: float | None


class CommitNow(Result, frozen=True):
    step: int
    attempt: str
    time: float
    bytes: int
    save_s: float | None


class SlowestHost(Result, frozen=True):
    """Of the newest save in which hosts can be compared: `seconds` of this host, and of the median one."""

    process: int
    host: str
    step: int
    seconds: float
    median_s: float


class RunNow(Result, frozen=True):
    """`watch`: a run at one moment. `loss_s`: age of the newest restorable state: what is lost if the job dies now."""

    root: str
    time: float
    epoch: int
    version: int
    processes: int | None
    newest: int | None
    loss_s: float | None
    hosts: tuple[HostNow, ...]
    commits: tuple[CommitNow, ...]
    slowest: SlowestHost | None


def run(root: str, flags: Flags) -> RunNow:
    return next(follow(root, flags))


def follow(root: str, flags: Flags) -> Iterator[RunNow]:
    """The run again and again, `interval_s` apart, for as long as somebody asks for more."""
    arguments.seconds("--interval_s", flags["interval_s"])
    store = open_store(root)
    tail = Tail(directory_of(store.url, flags["events_dir"]))
    timeline = Timeline()
    while True:
        head = store.require_head()
        yield summarize(store.url, head, timeline.add(tail.more()), time.time())
        time.sleep(flags["interval_s"])


def summarize(url: str, head: Head, timeline: Timeline, now: float) -> RunNow:
    """The run as `timeline` and `head` have it at `now` (seconds since 1970)."""
    newest = journal.newest(head)
    current = timeline.epoch == head.epoch  # events of an older incarnation say nothing about this one's hosts
    hosts = tuple(
        HostNow(
            process=host.process,
            host=host.host,
            state=host.doing,
            step=host.step if host.step >= 0 else None,
            since_s=max(0.0, now - host.since),
            heard_s=max(0.0, now - host.last_seen),
            silent=not host.left and now - host.last_seen > SILENT_S,
            written_bytes=host.written_bytes if host.doing in PHASES else 0,
            bytes_per_s=host.rate if host.doing in PHASES else None,
        )
        for host in sorted(timeline.hosts.values(), key=lambda host: host.process)
        if current
    )
    seconds = {save.id: save.ended_s for save in timeline.saves.values() if save.process == 0}
    commits = tuple(
        CommitNow(live.step, live.attempt, live.time, live.bytes, seconds.get(live.id))
        for live in head.live[-_COMMITS:]
    )
    return RunNow(
        root=url,
        time=now,
        epoch=head.epoch,
        version=head.version,
        processes=timeline.opened[head.epoch][1] if head.epoch in timeline.opened else None,
        newest=newest.step if newest else None,
        loss_s=max(0.0, now - newest.time) if newest else None,
        hosts=hosts,
        commits=commits,
        slowest=slowest(timeline),
    )


def slowest(timeline: Timeline) -> SlowestHost | None:
    """The host that took longest, until its part was durable, in the newest save that two or more have finished."""
    together: dict[AttemptId, list[HostSave]] = {}
    for save in timeline.saves.values():
        if "waiting" in save.phases:
            together.setdefault(save.id, []).append(save)
    for attempt, saves in reversed(together.items()):
        if len(saves) > 1:
            worst = max(saves, key=lambda save: save.phases["waiting"])
            median_s = statistics.median(save.phases["waiting"] for save in saves)
            return SlowestHost(worst.process, worst.host, attempt.step, worst.phases["waiting"], median_s)
    return None


def show(now: RunNow, flags: Flags) -> Iterator[render.Shown]:
    yield f"{now.root}  epoch {now.epoch}, journal version {now.version}, {render.moment(now.time)}"
    yield render.words(_loss(now), style="bold")
    yield ""
    if now.hosts:
        yield _hosts(now)
        yield from _notes(now)
    else:
        yield "no events of this incarnation: see --events_dir, or the job runs without them"
    yield ""
    rows = [
        [
            str(commit.step),
            commit.attempt,
            render.size(commit.bytes),
            render.moment(commit.time),
            "" if commit.save_s is None else render.duration(commit.save_s),
        ]
        for commit in reversed(now.commits)
    ]
    if rows:
        columns = ["step", "attempt", "size", "state of", "save took"]
        yield render.table(columns, rows, right=["step", "size", "save took"])


def _loss(now: RunNow) -> str:
    if now.loss_s is None:
        return "no step is durable yet: if the job dies now, all is lost"
    return f"if the job dies now, you lose {render.duration(now.loss_s)} (back to step {now.newest})"


def _hosts(now: RunNow) -> render.Shown:
    # Those in trouble first, where there are more than fit on a screen.
    order = sorted(now.hosts, key=lambda host: (not host.silent, host.process))[:_HOSTS_SHOWN]
    rows = [
        [
            str(host.process),
            host.host,
            f"SILENT; was {host.state}" if host.silent else host.state,
            "" if host.step is None else str(host.step),
            render.duration(host.since_s),
            render.size(host.written_bytes) if host.written_bytes else "",
            f"{render.size(host.bytes_per_s)}/s" if host.bytes_per_s else "",
            render.duration(host.heard_s),
        ]
        for host in sorted(order, key=lambda host: host.process)
    ]
    columns = ["process", "host", "state", "step", "for", "written", "rate", "heard"]
    return render.table(columns, rows, right=["process", "step", "for", "written", "rate", "heard"])


def _notes(now: RunNow) -> Iterator[render.Shown]:
    if len(now.hosts) > _HOSTS_SHOWN:
        yield f"... and {len(now.hosts) - _HOSTS_SHOWN} more"
    missing = sorted(set(range(now.processes or 0)) - {host.process for host in now.hosts})
    if missing:
        yield render.words(f"not heard of: processes {', '.join(map(str, missing[:20]))}", style="bold")
    if slow := now.slowest:
        yield (
            f"slowest in step {slow.step}: process {slow.process} ({slow.host}), {render.duration(slow.seconds)} until "
            f"its part was durable; median {render.duration(slow.median_s)}"
        )


COMMAND = Command(
    run,
    show,
    "what a run does now, and what would be lost if it died",
    flags=(
        Flag("once", bool, False, "one look; the same where the output is no terminal"),
        Flag("interval_s", float, 1.0, "seconds from one look to the next"),
        EVENTS,
    ),
    examples=("orchestrator watch /data/run", "orchestrator watch /data/run --json | jq .loss_s"),
    follow=follow,
)
