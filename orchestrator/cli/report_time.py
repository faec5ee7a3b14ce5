"""The time of a run, out of its journal and its events: incarnations, where the seconds went, incidents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from orchestrator.cli import render
from orchestrator.cli.log import reason_and_causes
from orchestrator.cli.report_parts import Goodput, Incident, ReportedEpoch, TimeSpan
from orchestrator.observe.progress import Progress
from orchestrator.observe.timeline import Timeline
from orchestrator.rules import goodput as rules
from orchestrator.rules import journal
from orchestrator.rules.goodput import Incarnation, Mark, Stretch
from orchestrator.rules.records import Head, LiveStep

GONE_S = 60.0  # a job that has not closed and shows nothing for so long is taken for gone
_NAMED = 5


class Entry(msgspec.Struct):
    """What a report keeps of a journal entry: a long run has many, and each is complete. `about`: the step it is of."""

    head: Head
    about: LiveStep | None
    newest: LiveStep | None

    @classmethod
    def of(cls, head: Head) -> Entry:
        about = journal.find(head, head.event.step) if head.event.step is not None else None
        return cls(msgspec.structs.replace(head, live=(), retired=(), aside=()), about, journal.newest(head))


def stretches(entries: Iterable[Entry], timeline: Timeline) -> list[Stretch]:
    """Where each second went. Of what events do not tell, the journal's commits are marks."""
    known = timeline.progress.epochs
    first, last, marks = {}, {}, {number: list(one.marks) for number, one in known.items()}
    for entry in entries:
        epoch, kind = entry.head.epoch, entry.head.event.kind
        if kind == "opened-epoch":
            first[epoch] = last[epoch] = entry.head.time
        elif kind in ("committed", "aborted") and epoch in first and entry.head.event.step is not None:
            last[epoch] = entry.head.time
            seen_from = known[epoch].first if epoch in known else entry.head.time + 1
            if entry.head.time < seen_from:
                marks.setdefault(epoch, []).append(Mark(entry.head.time, entry.head.event.step, judged=False))
    blocked: dict[int, dict[tuple[int, str], tuple[float, float]]] = {}
    for save in timeline.saves.values():
        mine = blocked.setdefault(save.id.epoch, {})
        if save.blocked_s > 0:  # training waits for the slowest host
            span = (save.began, save.began + save.blocked_s)
            mine[save.id] = max(mine.get(save.id, span), span, key=lambda one: one[1] - one[0])
    incarnations = []
    for epoch in sorted(first):
        one = known.get(epoch)
        incarnations.append(
            Incarnation(
                epoch,
                first=min(first[epoch], one.first) if one else first[epoch],
                last=max(last[epoch], one.last) if one else last[epoch],
                closed=one is not None and one.in_order,
                marks=marks.get(epoch, []),
                blocked=list(blocked.get(epoch, {}).values()),
            )
        )
    return rules.split(incarnations)


def spans(found: Iterable[Stretch]) -> tuple[TimeSpan, ...]:
    return tuple(TimeSpan(*one) for one in found if one.kind not in ("training", "blocked"))


def goodput(found: Sequence[Stretch], opened: Sequence[ReportedEpoch]) -> Goodput:
    total = rules.seconds(found)
    wall_s = sum(total.values())
    running_s = wall_s - total["idle"]
    return Goodput(
        wall_s=wall_s,
        blocked_s=total["blocked"],
        restarts_s=sum(epoch.lost_s for epoch in opened),
        share=total["training"] / running_s if running_s > 0 else None,
        training_s=total["training"],
        stalled_s=total["stalled"],
        again_s=total["again"],
        starting_s=total["starting"],
        down_s=total["down"],
        idle_s=total["idle"],
    )


def epochs(entries: Iterable[Entry], timeline: Timeline, found: Sequence[Stretch]) -> tuple[ReportedEpoch, ...]:
    restored = {(each.epoch, each.process): each for each in timeline.restores}
    lost_s: dict[int, float] = {}
    for one in found:
        if one.kind in ("down", "starting", "again"):
            lost_s[one.epoch] = lost_s.get(one.epoch, 0.0) + one.seconds
    made: list[ReportedEpoch] = []
    for entry in entries:
        if entry.head.event.kind != "opened-epoch":
            continue
        epoch = entry.head.epoch
        mine = restored.get((epoch, 0))
        _, processes = timeline.opened.get(epoch, (0.0, None))
        progress = timeline.progress.epochs.get(epoch)
        made.append(
            ReportedEpoch(
                epoch=epoch,
                opened=entry.head.time,
                by=entry.head.writer,
                processes=processes,
                from_step=mine.step if mine else None,
                restore_s=mine.seconds if mine else None,
                lost_s=lost_s.get(epoch, 0.0) if made else 0.0,
                closed=progress is not None and progress.in_order,
            )
        )
    return tuple(made)


def incidents(
    entries: Iterable[Entry], timeline: Timeline, found: Sequence[Stretch], now: float, heard: float = 0.0
) -> tuple[Incident, ...]:
    """All that went wrong, and each restart, by time. `heard`: when a host last gave any sign of life."""
    made = [*_journalled(entries), *_ends(timeline.progress, now, heard)]
    for save in timeline.saves.values():
        if save.outcome == "fenced":
            at, by = save.began + (save.ended_s or 0.0), f"process {save.process} ({save.host})"
            made.append(Incident(at, "fenced", save.step, save.attempt, save.reason, by))
    for one in found:
        if one.kind == "stalled":
            text = f"no step for {render.duration(one.seconds)}: {who_was_silent(timeline.progress, one)}"
            made.append(Incident(one.began, "stalled", None, None, text, "events"))
    return tuple(sorted(made, key=lambda incident: incident.time))


def _journalled(entries: Iterable[Entry]) -> Iterable[Incident]:
    epochs = 0
    for entry in entries:
        head, event = entry.head, entry.head.event
        if event.kind == "aborted":
            text = reason_and_causes(event)
            yield Incident(head.time, "save aborted", event.step, event.attempt, text, head.writer)
        elif event.kind in ("quarantined", "released", "recovered"):
            yield Incident(head.time, event.kind, event.step, event.attempt, event.reason, head.writer)
        elif event.kind == "opened-epoch":
            epochs += 1
            if epochs > 1:
                text = f"epoch {head.epoch} took over from {head.epoch - 1}"
                yield Incident(head.time, "restart", None, None, text, head.writer)


def _ends(progress: Progress, now: float, heard: float) -> Iterable[Incident]:
    """Incarnations that ended without closing: killed, crashed, or their machines gone."""
    newest = max(progress.epochs, default=0)
    for number, one in progress.epochs.items():
        if one.in_order or (number == newest and now - max(one.last, heard) < GONE_S):
            continue
        open_still = sorted((at, host) for process, (host, at) in one.last_seen.items() if process not in one.closed)
        if not open_still:
            continue
        named = ", ".join(host for _, host in open_still[:_NAMED])
        more = f" and {len(open_still) - _NAMED} more" if len(open_still) > _NAMED else ""
        first, last = render.moment(open_still[0][0]), render.moment(open_still[-1][0])
        seen = first if first == last else f"from {first} on, the last at {last}"
        text = f"epoch {number} ended without closing; last signs of life of {named}{more}: {seen}"
        yield Incident(one.last, "ended abruptly", None, None, text, "events")


def who_was_silent(progress: Progress, stall: Stretch) -> str:
    silent = progress.silent(stall.epoch, stall.began, stall.ended)
    if silent is None:
        return "what the other hosts did then is no longer among their events"
    if not silent:
        return "every host was silent, so events do not tell which one stopped first"
    named = ", ".join(one.host for one in silent[:_NAMED])
    more = f" and {len(silent) - _NAMED} more" if len(silent) > _NAMED else ""
    longest = render.duration(max(one.seconds for one in silent))
    return f"{named}{more} gave no sign of life for {longest}, the others did"
