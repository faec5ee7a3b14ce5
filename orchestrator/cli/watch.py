"""`orchestrator watch`: what a run does now. Reads the journal and the events of its processes; writes nothing."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import msgspec
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator.cli import render
from orchestrator.cli.commands import open_catalog
from orchestrator.errors import EXIT_OK
from orchestrator.observe.event_log import Tail, directory_of
from orchestrator.observe.events import PHASES
from orchestrator.observe.heartbeat import EVENT_INTERVAL_S
from orchestrator.observe.timeline import HostSave, Story
from orchestrator.rules import arguments, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head
from orchestrator.run.journal_store import Catalog

SILENT_S = 3 * EVENT_INTERVAL_S
_COMMITS = 5
_HOSTS_SHOWN = 40


class HostNow(msgspec.Struct, forbid_unknown_fields=True):
    """`state`: a save's phase, training, restored, starting or left; `silent`: no word for SILENT_S, by `heard_s`."""

    process: int
    host: str
    state: str
    step: int | None
    since_s: float
    heard_s: float
    silent: bool
    written_bytes: int
    bytes_per_s: float | None


class CommitNow(msgspec.Struct, forbid_unknown_fields=True):
    step: int
    attempt: str
    time: float
    bytes: int
    save_s: float | None


class Slowest(msgspec.Struct, forbid_unknown_fields=True):
    """Of the newest save in which hosts can be compared: `seconds` of this host, and of the median one."""

    process: int
    host: str
    step: int
    seconds: float
    median_s: float


class Now(msgspec.Struct, forbid_unknown_fields=True):
    """One look at a run. `loss_s`: age of the newest restorable state: what is lost if the job dies now."""

    root: str
    time: float
    epoch: int
    version: int
    processes: int | None
    newest: int | None
    loss_s: float | None
    hosts: list[HostNow]
    commits: list[CommitNow]
    slowest: Slowest | None


def watch(root: str, flags: dict[str, Any]) -> int:
    """Show the run again and again until Ctrl-C; once with --once, with --json, or where nobody looks at a terminal."""
    arguments.seconds("--interval_s", flags["interval_s"])
    catalog = open_catalog(root)
    tail = Tail(directory_of(catalog.url, flags["events_dir"]))
    looks = _looks(catalog, tail)
    if flags["json"]:
        render.give(msgspec.to_builtins(next(looks)))
    elif flags["once"] or not sys.stdout.isatty():
        render.console(sys.stdout).print(draw(next(looks)))
    else:
        with Live(draw(next(looks)), console=render.console(sys.stdout), auto_refresh=False) as live:
            for now in looks:
                live.update(draw(now), refresh=True)
                time.sleep(flags["interval_s"])
    return EXIT_OK


def _looks(catalog: Catalog, tail: Tail) -> Iterator[Now]:
    story = Story()
    while True:
        head = catalog.require_head()
        yield look(catalog.url, head, story.tell(tail.more()), time.time())


def look(url: str, head: Head, story: Story, now: float) -> Now:
    """What `story` and `head` say at `now` (seconds since the epoch)."""
    newest = journal.newest(head)
    current = story.epoch == head.epoch  # events of an older incarnation tell nothing of this one's hosts
    hosts = [
        HostNow(
            process=host.process,
            host=host.host,
            state=host.doing,
            step=host.step if host.step >= 0 else None,
            since_s=max(0.0, now - host.since),
            heard_s=max(0.0, now - host.heard),
            silent=not host.left and now - host.heard > SILENT_S,
            written_bytes=host.written_bytes if host.doing in PHASES else 0,
            bytes_per_s=host.rate if host.doing in PHASES else None,
        )
        for host in sorted(story.hosts.values(), key=lambda host: host.process)
        if current
    ]
    seconds = {save.id: save.ended_s for save in story.saves.values() if save.process == 0}
    commits = [
        CommitNow(live.step, live.attempt, live.time, live.bytes, seconds.get(live.id))
        for live in head.live[-_COMMITS:]
    ]
    return Now(
        root=url,
        time=now,
        epoch=head.epoch,
        version=head.version,
        processes=story.opened[head.epoch][1] if head.epoch in story.opened else None,
        newest=newest.step if newest else None,
        loss_s=max(0.0, now - newest.time) if newest else None,
        hosts=hosts,
        commits=commits,
        slowest=slowest(story),
    )


def slowest(story: Story) -> Slowest | None:
    """The host that took longest, until its part was durable, in the newest save that two or more have finished."""
    together: dict[AttemptId, list[HostSave]] = {}
    for save in story.saves.values():
        if "waiting" in save.phases:
            together.setdefault(save.id, []).append(save)
    for attempt, saves in reversed(together.items()):
        if len(saves) > 1:
            worst = max(saves, key=lambda save: save.phases["waiting"])
            median_s = statistics.median(save.phases["waiting"] for save in saves)
            return Slowest(worst.process, worst.host, attempt.step, worst.phases["waiting"], median_s)
    return None


def draw(now: Now) -> RenderableType:
    parts: list[RenderableType] = [
        render.words(f"{now.root}  epoch {now.epoch}, journal version {now.version}, {render.moment(now.time)}"),
        render.words(_loss(now), style="bold"),
        render.words(""),
    ]
    if now.hosts:
        parts += [_hosts(now), *_notes(now), render.words("")]
    else:
        parts += [
            render.words("no events of this incarnation: see --events_dir, or the job runs without them"),
            render.words(""),
        ]
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
        parts.append(
            render.drawn_table(
                ["step", "attempt", "size", "state of", "save took"], rows, ["step", "size", "save took"]
            )
        )
    return Group(*parts)


def _loss(now: Now) -> str:
    if now.loss_s is None:
        return "no step is durable yet: if the job dies now, all is lost"
    return f"if the job dies now, you lose {render.duration(now.loss_s)} (back to step {now.newest})"


def _hosts(now: Now) -> RenderableType:
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
    return render.drawn_table(columns, rows, ["process", "step", "for", "written", "rate", "heard"])


def _notes(now: Now) -> Iterator[Text]:
    if len(now.hosts) > _HOSTS_SHOWN:
        yield render.words(f"... and {len(now.hosts) - _HOSTS_SHOWN} more")
    missing = sorted(set(range(now.processes or 0)) - {host.process for host in now.hosts})
    if missing:
        yield render.words(f"not heard of: processes {', '.join(map(str, missing[:20]))}", style="bold")
    if slow := now.slowest:
        yield render.words(
            f"slowest in step {slow.step}: process {slow.process} ({slow.host}), {render.duration(slow.seconds)} until "
            f"its part was durable; median {render.duration(slow.median_s)}"
        )
