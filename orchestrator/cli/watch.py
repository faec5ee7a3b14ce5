"""`orchestrator watch`: what a run does now. Reads the journal and the events of its processes; writes nothing."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from orchestrator.cli import render
from orchestrator.cli.command import EVENTS, Command, Flag, Flags, open_store
from orchestrator.cli.watch_page import page
from orchestrator.cli.watch_verdict import FINE, Facts, judge
from orchestrator.cli.watch_view import CommitNow, HostNow, Quarantined, RunNow, SlowestHost
from orchestrator.errors import EXIT_FAILED, EXIT_OK
from orchestrator.observe.event_log import RECENT, Tail, directory_of
from orchestrator.observe.events import PHASES
from orchestrator.observe.heartbeat import PULSE_S
from orchestrator.observe.timeline import HostSave, HostState, Timeline
from orchestrator.rules import arguments, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.records import Head
from orchestrator.rules.stalls import NO_PULSE_S, Diagnosis, Sign, diagnose
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import local_path

SILENT_S = NO_PULSE_S
_COMMITS = 5
OVER_S = 3600.0  # a job that has been silent for longer is over, however it ended
_SAVES = 6  # whose distances say when the next one is due


class Heard:
    """How long ago each process was last heard, on this machine's clock: from the moment that its file was seen to
    change. For the first look the file system's time stamp has to do; the hosts' own clocks are never asked."""

    def __init__(self) -> None:
        self._at: dict[int, tuple[float, float]] = {}

    def ages(self, stamps: Mapping[int, float], now: float, monotonic_s: float) -> dict[int, float]:
        for process, stamp in stamps.items():
            if process not in self._at:
                self._at[process] = (stamp, monotonic_s - max(0.0, now - stamp))
            elif self._at[process][0] != stamp:
                self._at[process] = (stamp, monotonic_s)
        return {process: max(0.0, monotonic_s - at_s) for process, (_, at_s) in self._at.items()}


def run(root: str, flags: Flags) -> RunNow:
    arguments.seconds("--interval_s", flags["interval_s"])
    store = open_store(root)
    return look(store, directory_of(store.url, flags["events_dir"]))


def look(store: JournalStore, events_dir: str | None) -> RunNow:
    """The run as it is. Where no process seems to live, and one did within OVER_S, it looks again some seconds later:
    the job is gone, or the clocks differ, and who writes meanwhile lives."""
    looks = _looks(store, events_dir, PULSE_S + 1)
    now = next(looks)
    here = [host for host in now.hosts if host.condition != "left"]
    return next(looks) if here and all(host.silent and host.heard_s < OVER_S for host in here) else now


def follow(root: str, flags: Flags) -> Iterator[RunNow]:
    """The run again and again, `interval_s` apart, for as long as somebody asks for more: one that has ended in order
    may be started again."""
    arguments.seconds("--interval_s", flags["interval_s"])
    store = open_store(root)
    return _looks(store, directory_of(store.url, flags["events_dir"]), flags["interval_s"])


def _looks(store: JournalStore, events_dir: str | None, interval_s: float) -> Iterator[RunNow]:
    tail = Tail(events_dir, RECENT)
    timeline, heard = Timeline(), Heard()
    while True:
        head = store.require_head()
        timeline.add(tail.more())
        now = time.time()
        ages = heard.ages(tail.newest, now, time.monotonic())
        yield summarize(store.url, head, timeline, now, ages, free_bytes(store.url))
        time.sleep(interval_s)


def free_bytes(url: str) -> int | None:
    """Of the file system that the run is on; None in a bucket, or where it cannot be asked."""
    try:
        found = os.statvfs(local_path(url) or "")
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def summarize(
    url: str,
    head: Head,
    timeline: Timeline,
    now: float,
    ages: Mapping[int, float] | None = None,
    free: int | None = None,
) -> RunNow:
    """The run as `timeline` and `head` have it at `now` (seconds since 1970). `ages`: since each process was heard; by
    the hosts' own clocks, where it is not known. `free`: bytes, where the run is on a file system."""
    newest = journal.newest(head)
    # Events of an older incarnation say nothing about this one's hosts.
    states = timeline.hosts if timeline.epoch == head.epoch else {}
    heard = {process: (ages or {}).get(process, max(0.0, now - host.last_seen)) for process, host in states.items()}
    signs = {process: host.sign(heard[process]) for process, host in sorted(states.items())}
    found = diagnose(signs)
    hosts = tuple(_host(states[process], signs[process], found[process], heard[process]) for process in signs)
    facts = replace(_facts(head, timeline, states, found, now), free_bytes=free)
    verdict, why = judge(facts)
    seconds = {save.id: save.ended_s for save in timeline.saves.values() if save.process == 0}
    good = [live for live in head.live if live.restorable]
    step = facts.step
    next_step, next_s = _next_save(timeline, head.epoch, step, facts.step_s)
    return RunNow(
        root=url,
        time=now,
        epoch=head.epoch,
        version=head.version,
        processes=facts.processes,
        newest=newest.step if newest else None,
        loss_s=max(0.0, now - newest.time) if newest else None,
        hosts=hosts,
        commits=tuple(
            CommitNow(live.step, live.attempt, live.time, live.bytes, seconds.get(live.id)) for live in good[-_COMMITS:]
        ),
        slowest=slowest(timeline),
        verdict=verdict,
        why=why,
        step=step,
        step_s=facts.step_s or None,
        free_bytes=free,
        next_bytes=max((live.bytes for live in head.live[-_COMMITS:]), default=0),
        next_save_step=next_step,
        next_save_s=next_s,
        loss_steps=max(0, step - newest.step) if newest and step is not None else None,
        restart_s=timeline.startup_s or None,
        quarantined=tuple(
            Quarantined(live.step, live.attempt, live.quarantine.reason if live.quarantine else "")
            for live in head.quarantined
        ),
    )


def _host(host: HostState, sign: Sign, found: Diagnosis, heard_s: float) -> HostNow:
    saving = host.doing in PHASES
    return HostNow(
        process=host.process,
        host=host.host,
        state=host.doing,
        step=host.step if host.step >= 0 else None,
        since_s=max(0.0, host.last_seen - host.since) + heard_s,
        heard_s=heard_s,
        silent=not host.left and heard_s > SILENT_S,
        written_bytes=host.written_bytes if saving else 0,
        bytes_per_s=host.rate if saving else None,
        condition=found.condition.value,
        waits_for=found.waits_for,
        idle_s=sign.idle_s,
        barrier=sign.barrier,
        late_s=host.pulse.late_s if host.pulse else 0.0,
    )


def _facts(
    head: Head, timeline: Timeline, states: Mapping[int, HostState], found: Mapping[int, Diagnosis], now: float
) -> Facts:
    newest = journal.newest(head)
    # A pulse says the step every few seconds, and a save that has begun since then says a later one.
    steps = [step for host in states.values() if (step := max(host.training_step, host.step)) >= 0]
    saving = [host.step for host in states.values() if host.doing in PHASES]
    rates = [host.pulse.step_s for host in states.values() if host.pulse and host.pulse.step_s]
    began = sorted({save.began for save in _saves(timeline, head.epoch)})[-_SAVES:]
    failed = list(itertools.takewhile(lambda save: save.outcome != "committed", reversed(_ended(timeline, head.epoch))))
    opened = timeline.opened.get(head.epoch)
    return Facts(
        conditions=found,
        hosts={process: host.host for process, host in states.items()},
        waits_at=next((host.pulse.barrier for host in states.values() if host.pulse and host.pulse.barrier), ""),
        processes=opened[1] if opened else None,
        saving=max(saving, default=None),
        step=max(steps, default=None),
        step_s=statistics.median(rates) if rates else 0.0,
        # A new incarnation has its own time for its first commit.
        commit_age_s=max(0.0, now - max(newest.time, opened[0] if opened else 0.0)) if newest else None,
        interval_s=statistics.median(after - before for before, after in itertools.pairwise(began))
        if len(began) > 1
        else None,
        failed=len(failed),
        why_failed=failed[0].reason if failed else "",
    )


def _saves(timeline: Timeline, epoch: int) -> list[HostSave]:
    """Process 0's, of this incarnation, in order."""
    mark = f"e{epoch:04d}-"
    return [save for save in timeline.saves.values() if save.process == 0 and save.attempt.startswith(mark)]


def _ended(timeline: Timeline, epoch: int) -> list[HostSave]:
    return [save for save in _saves(timeline, epoch) if save.outcome]


def _next_save(timeline: Timeline, epoch: int, step: int | None, step_s: float) -> tuple[int | None, float | None]:
    """At which step, and in how many seconds, by the distance of the last saves. None where that is not known."""
    steps = sorted({save.step for save in _saves(timeline, epoch)})[-_SAVES:]
    if len(steps) < 2 or step is None:
        return None, None
    due = steps[-1] + round(statistics.median(after - before for before, after in itertools.pairwise(steps)))
    return due, max(0.0, (due - step) * step_s) if step_s else None


def slowest(timeline: Timeline) -> SlowestHost | None:
    """The host that took longest, until its part was durable, in the newest save that all who began it have finished:
    in one that hangs, whoever is not done would be missing."""
    together: dict[AttemptId, list[HostSave]] = {}
    for save in timeline.saves.values():
        together.setdefault(save.id, []).append(save)
    for attempt, saves in reversed(together.items()):
        if len(saves) > 1 and all("waiting" in save.phases for save in saves):
            worst = max(saves, key=lambda save: save.phases["waiting"])
            median_s = statistics.median(save.phases["waiting"] for save in saves if save is not worst)
            return SlowestHost(worst.process, worst.host, attempt.step, worst.phases["waiting"], median_s)
    return None


def show(now: RunNow, flags: Flags) -> Iterator[render.Shown]:
    yield from page(now, render.screen())


def exit_code(now: RunNow) -> int:
    """1 unless the run is well, or has ended in order."""
    return EXIT_OK if now.verdict in FINE else EXIT_FAILED


COMMAND = Command(
    run,
    show,
    "what a run does now, and what a crash would lose",
    flags=(
        Flag("once", bool, False, "one look; the same where the output is no terminal"),
        Flag("interval_s", float, 1.0, "seconds from one look to the next"),
        EVENTS,
    ),
    examples=("orchestrator watch /data/run", "orchestrator watch /data/run --json | jq -r .verdict"),
    detail="Exit code 1 unless the run is healthy, saves, or has ended in order.",
    exit_code=exit_code,
    follow=follow,
)
