"""What `orchestrator doctor` says of a job's hosts: the verdict of `watch`, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from orchestrator.cli import render
from orchestrator.cli.finding import ExaminedRun, Finding
from orchestrator.cli.watch import OVER_S, look
from orchestrator.cli.watch_page import is_slow, straggler
from orchestrator.cli.watch_view import RunNow

_HANGS = (
    "look at that host (dmesg, its log, ps); its supervisor ends it after --hang_after_s; if the job is gone, "
    "start it again"
)
_NOT_SAVED = "orchestrator log ROOT says why saves were aborted; orchestrator watch ROOT"
_OVER = "start the job again, if it is to go on"


def hosts(run: ExaminedRun) -> Iterator[Finding]:
    """Who holds the job up, if it runs. A run without events has no hosts to look at."""
    seen = look(run.store, run.events_dir)
    if not seen.hosts:
        return
    yield verdict(seen)
    if seen.slowest and is_slow(seen.slowest):
        do = "look at that host's disk and network; the phases of each save are in orchestrator report ROOT"
        yield Finding("hosts", "warn", "; ".join(straggler(seen.slowest)), do)


def verdict(seen: RunNow) -> Finding:
    """A job that hangs, or has gone just now, saves nothing until somebody acts: bad. One that went long ago is
    nobody's emergency, and what it has saved can be restored."""
    text = f"{seen.verdict}: {seen.why}"
    match seen.verdict:
        case "STALLED" if (silent_s := min(host.heard_s for host in seen.hosts)) > OVER_S:
            return Finding("hosts", "warn", f"{text}; the last sign of life was {render.age(silent_s)}", _OVER)
        case "STALLED":
            return Finding("hosts", "bad", text, _HANGS)
        case "NO COMMITS":
            return Finding("hosts", "bad", text, _NOT_SAVED)
    return Finding("hosts", "ok", text)
