"""The sentences on top of a report: what became of the run, and what to look at, the worst first."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping

from orchestrator.cli import render
from orchestrator.cli.report_parts import Finding, RunReport
from orchestrator.cli.report_time import GONE_S
from orchestrator.observe.timeline import Timeline
from orchestrator.rules.records import Head

_ORDER = ("bad", "warn", "good", "plain")
_FEW_MAX = 3  # of one kind are named one by one, the newest
_RECENT_SAVES = 10  # by which a straggler is judged
_SLOW = 1.5  # times the others' median, in most saves: a straggler
_SLOW_S = 0.2  # less is nobody's trouble
_GOODPUT = 0.9  # below it, where the time went is a finding
_KINDS = (
    ("stalled_s", "stalls, in which no step was done"),
    ("down_s", "waiting for the next start after a failure"),
    ("again_s", "training the same steps again after restarts"),
    ("starting_s", "start-up and restores"),
    ("blocked_s", "waiting for saves"),
)


def of(
    made: RunReport, head: Head, timeline: Timeline, heard: float, cut_at: Mapping[int, float]
) -> tuple[Finding, tuple[Finding, ...]]:
    """(the verdict, what to look at). `heard`: when a host last gave any sign of life. `cut_at`: as `build`'s."""
    found = [*_steps(made, head), *_events(made), *_aborts(made), *_stragglers(made), *_cost(made), *_left_out(cut_at)]
    found.sort(key=lambda finding: _ORDER.index(finding.tone))
    return _verdict(made, timeline, found, heard), tuple(found)


def _verdict(made: RunReport, timeline: Timeline, found: list[Finding], heard: float) -> Finding:
    state, tone = _state(made, timeline, heard)
    if made.newest is None:
        return Finding("bad", f"{state} No step can be restored.", "steps")
    worst = min([tone, *(finding.tone for finding in found)], key=_ORDER.index)
    share = made.goodput.share
    useful = "" if share is None else f" {share * 100:.1f} % of its time went into training."
    return Finding(worst, f"{state} A restore takes step {made.newest}.{useful}", "steps")


def _state(made: RunReport, timeline: Timeline, heard: float) -> tuple[str, str]:
    newest = timeline.progress.epochs.get(made.epoch)
    if newest is None:
        return "There are no events of the newest epoch: whether the job runs is not known.", "plain"
    if newest.in_order:
        return f"The job ended in order at {render.moment(newest.last)}.", "good"
    if (silent_s := made.made - max(newest.last, heard)) > GONE_S:
        ago = render.duration(silent_s)
        return f"The job is gone: no sign of life for {ago}, and it did not close.", "bad"
    if made.made - newest.last > GONE_S:
        text = f"The job was running when this page was made, but its events end at {render.moment(newest.last)}"
        return f"{text}: they cannot be written, as where a disk is full.", "bad"
    return "The job was running when this page was made.", "good"


def _steps(made: RunReport, head: Head) -> Iterator[Finding]:
    bad = [live for live in (*head.live, *head.aside) if live.trust == "quarantined"]
    for live in bad[-_FEW_MAX:]:
        why = [each for each in made.incidents if each.kind == "quarantined" and each.step == live.step]
        because = f": {why[-1].text}" if why and why[-1].text else ""
        yield Finding("bad", f"Step {live.step} is quarantined and will not be restored{because}.", "steps")
    if len(bad) > _FEW_MAX:
        yield Finding("bad", f"{len(bad)} steps in all are quarantined.", "steps")


def _events(made: RunReport) -> Iterator[Finding]:
    for kind, tone in (("ended abruptly", "bad"), ("stalled", "warn"), ("fenced", "warn"), ("recovered", "warn")):
        mine = [each for each in made.incidents if each.kind == kind]
        for each in mine[: -_FEW_MAX - 1 : -1]:
            span = next((one for one in made.spans if one.kind == "stalled" and one.began == each.time), None)
            ended = span.ended if span and kind == "stalled" else each.time
            text = f"{render.moment(each.time)}: {each.text}."
            yield Finding(tone, text, "timeline-part", each.time, ended)
        if len(mine) > _FEW_MAX:
            yield Finding(tone, f"{kind} {len(mine)} times in all.", "incidents-part")


def _aborts(made: RunReport) -> Iterator[Finding]:
    lost = [save for save in made.saves if save.outcome != "committed"]
    aborted = [save for save in lost if save.outcome == "aborted"]
    if aborted:
        newest = aborted[-1]
        ended = newest.began if newest.decided is None else newest.decided
        count = "One save was" if len(aborted) == 1 else f"{len(aborted)} saves were"
        text = f"{count} aborted, the newest at step {newest.step}: {newest.reason}"
        yield Finding("warn", text, "timeline-part", newest.began, ended)
    if unknown := [save for save in lost if save.outcome == "unknown"]:
        steps = ", ".join(str(save.step) for save in unknown[-_FEW_MAX:])
        count = "One save has" if len(unknown) == 1 else f"{len(unknown)} saves have"
        text = f"{count} no decision, because the job ended first or still runs: step {steps}."
        yield Finding("warn", text, "timeline-part", unknown[-1].began, unknown[-1].began)


def _stragglers(made: RunReport) -> Iterator[Finding]:
    """A host that was last in most of the recent saves, and took much longer than the median one."""
    last: dict[int, list[float]] = {}
    saves = [save for save in made.saves if sum(part.waiting >= 0 for part in save.parts) > 1][-_RECENT_SAVES:]
    for save in saves:
        parts = [part for part in save.parts if part.waiting >= 0]
        worst = max(parts, key=lambda part: part.waiting)
        others = statistics.median(part.waiting for part in parts if part is not worst)
        if worst.waiting > max(_SLOW * others, others + _SLOW_S):
            last.setdefault(worst.process, []).append(worst.waiting / max(others, 1e-3))
    for process, factors in last.items():
        if len(saves) >= 5 and len(factors) > len(saves) / 2:
            host = made.hosts.get(str(process), f"process {process}")
            text = f"{host} was the slowest in {len(factors)} of the last {len(saves)} saves, "
            yield Finding("warn", text + f"{statistics.median(factors):.1f} times the others.", "stragglers-part")


def _cost(made: RunReport) -> Iterator[Finding]:
    spent = made.goodput
    if spent.share is None or spent.share >= _GOODPUT:
        return
    worst, words = max(_KINDS, key=lambda kind: getattr(spent, kind[0]))
    cost_s = getattr(spent, worst)
    if cost_s > 0:
        share = 100 * cost_s / (spent.wall_s - spent.idle_s)
        yield Finding(
            "warn",
            f"The largest part of the lost time, {render.duration(cost_s)} ({share:.0f} %), went into {words}.",
            "goodput-part",
        )


def _left_out(cut_at: Mapping[int, float]) -> Iterator[Finding]:
    """So that nobody takes what was not read for what did not happen."""
    others = {process: time for process, time in cut_at.items() if process}
    if others:
        count = f"of {len(others)} processes" if len(others) > 1 else "of one process"
        since = max(others.values())
        text = f"Not all events fit into a report: {count} it has those from {render.moment(since)} on, and before that"
        yield Finding("plain", f"{text} process 0's.", "timeline-part", since, since)
