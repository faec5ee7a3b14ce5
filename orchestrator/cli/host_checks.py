"""What `orchestrator doctor` says of a job's hosts: the verdict of `watch`, with what to do about it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from orchestrator.cli.finding import ExaminedRun, Finding, Level
from orchestrator.cli.watch import Heard, free_bytes, summarize
from orchestrator.cli.watch_page import is_slow, straggler
from orchestrator.cli.watch_verdict import Verdict
from orchestrator.observe.event_log import RECENT_BYTES, Tail
from orchestrator.observe.timeline import Timeline

_DO: dict[Verdict, tuple[Level, str]] = {
    "STALLED": (
        "warn",
        "look at that host (dmesg, its log, ps); its supervisor ends it after --hang_after_s; if the job is gone, "
        "start it again",
    ),
    "NO COMMITS": ("bad", "orchestrator log ROOT says why saves were aborted; orchestrator watch ROOT"),
}


def hosts(run: ExaminedRun) -> Iterator[Finding]:
    """Who holds the job up, if it runs. A run without events has no hosts to look at."""
    tail = Tail(run.events_dir, RECENT_BYTES)
    timeline = Timeline().add(tail.more(whole=False))
    now = time.time()
    ages = Heard().ages(tail.newest, now, time.monotonic())
    seen = summarize(run.store.url, run.head, timeline, now, ages, free_bytes(run.store.url))
    if not seen.hosts:
        return
    level, do = _DO.get(seen.verdict, ("ok", ""))
    yield Finding("hosts", level, f"{seen.verdict}: {seen.why}", do)
    if seen.slowest and is_slow(seen.slowest):
        do = "look at that host's disk and network; the phases of each save are in orchestrator report ROOT"
        yield Finding("hosts", "warn", "; ".join(straggler(seen.slowest)), do)
