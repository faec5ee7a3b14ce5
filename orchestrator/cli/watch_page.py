"""The page of `orchestrator watch`: the verdict and notes first, hosts in trouble next, one line for the rest, and the
last commits where there is room. It fits any terminal. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from orchestrator.cli import render
from orchestrator.cli.watch_verdict import TONES
from orchestrator.cli.watch_view import HostNow, RunNow, SlowestHost

_PIPE = (200, 60)  # where the output is no terminal
_COMMITS_LEAST = 4  # lines: a heading and three of them
_LATE_S = 2.0
_ORDER = ("dead", "frozen", "stuck", "waiting", "starting", "moving", "left")
_TONES: dict[str, render.Tone] = {"dead": "bad", "frozen": "bad", "stuck": "warn", "waiting": "warn", "left": "dim"}


def page(now: RunNow, screen: tuple[int, int] | None = None) -> Iterator[render.Shown]:
    """`screen`: columns and lines, of which the last stays free for the cursor; None: it is no terminal."""
    width, height = screen or _PIPE
    head = list(_head(now))
    yield from head
    left = height - 1 - sum(max(1, math.ceil(len(str(line)) / width)) for line in head)
    for_commits = min(len(now.commits) + 2, _COMMITS_LEAST + 1) if now.commits else 0
    if now.hosts:
        lines, shown = _hosts(now, left - for_commits - 2 if left > for_commits + 6 else left - 2)
        yield ""
        yield from shown
        left -= lines + 1
    if now.commits and left > 2:
        yield ""
        yield _commits(now, left - 2)


def _head(now: RunNow) -> Iterator[render.Shown]:
    yield render.toned(f"{now.verdict}  {now.why}", TONES[now.verdict])
    where = f"{now.root}  epoch {now.epoch}, journal version {now.version}, {render.moment(now.time)}"
    yield render.toned(where, "dim")
    yield render.words(_loss(now), style="bold")
    if now.next_save_step is not None and now.verdict in ("HEALTHY", "SAVING", "NO COMMITS"):
        when = "" if now.next_save_s is None else f", in about {render.duration(now.next_save_s)}"
        yield f"next save: step {now.next_save_step}{when}"
    if not now.hosts:
        yield render.toned("no events of this incarnation: see --events_dir, or the job runs without them", "warn")
    yield from _notes(now)


def _loss(now: RunNow) -> str:
    if now.verdict == "ENDED" and now.newest is not None:
        return f"step {now.newest} is the newest that can be restored"
    if now.loss_s is None:
        return "no step is durable yet: if the job dies now, all is lost"
    steps = "" if now.loss_steps is None else f" and {now.loss_steps} step{'s' if now.loss_steps != 1 else ''}"
    restart = "" if now.restart_s is None else f"; a restart takes {render.duration(now.restart_s)}"
    return f"if the job dies now, you lose {render.duration(now.loss_s)}{steps} (back to step {now.newest}){restart}"


def _notes(now: RunNow) -> Iterator[render.Shown]:
    missing = sorted(set(range(now.processes or 0)) - {host.process for host in now.hosts})
    if missing and now.hosts:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        yield render.toned(f"not heard of: processes {', '.join(map(str, missing[:10]))}{more}", "warn")
    late = max(now.hosts, key=lambda host: host.late_s, default=None)
    if late and late.late_s > _LATE_S and not late.silent and late.condition != "left":
        took = render.duration(late.late_s)
        yield render.toned(f"slow: process {late.process} ({late.host}) was stopped or starved for {took}", "warn")
    if (slow := now.slowest) and slow.seconds > 0:
        yield render.toned(straggler(slow), "warn" if is_slow(slow) else "dim")
    if now.free_bytes is not None and now.free_bytes < now.next_bytes:
        text = f"{render.size(now.free_bytes)} free, and the next save needs about {render.size(now.next_bytes)}"
        yield render.toned(text, "bad")
    for one in now.quarantined[-2:]:
        yield render.toned(f"quarantined: step {one.step} {one.attempt}: {one.reason}"[:150], "bad")


def straggler(slow: SlowestHost) -> str:
    text = f"process {slow.process} ({slow.host}), {render.duration(slow.seconds)} until its part was durable"
    return f"slowest in step {slow.step}: {text}; the others' median {render.duration(slow.median_s)}"


def is_slow(slow: SlowestHost) -> bool:
    return slow.seconds > 2 * slow.median_s + 1


def _hosts(now: RunNow, lines: int) -> tuple[int, list[render.Shown]]:
    """A table of those in trouble first, one line for the rest. (how many lines, at most `lines`; what is in them)"""
    order = sorted(now.hosts, key=lambda host: (_ORDER.index(host.condition), host.process))
    fits = len(order) <= lines - 1
    shown = order if fits else order[: max(0, lines - 2)]
    rest = order[len(shown) :]
    pieces: list[render.Shown] = [_table(shown)] if shown else []
    if rest:
        pieces.append(render.toned(f"{'and ' if shown else ''}{_counted(rest)}", "dim"))
    return (len(shown) + 1 if shown else 0) + bool(rest), pieces


def _counted(hosts: Sequence[HostNow]) -> str:
    """`3997 more: 3990 moving, 7 waiting`."""
    counts = {name: sum(host.condition == name for host in hosts) for name in _ORDER}
    return f"{len(hosts)} more: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def _table(hosts: Sequence[HostNow]) -> render.Shown:
    writing = any(host.written_bytes for host in hosts)
    rows: list[list[render.Cell]] = []
    for host in hosts:
        stands = host.condition in ("dead", "frozen", "stuck", "waiting")
        row: list[render.Cell] = [
            str(host.process),
            host.host,
            render.toned(_state(host), _TONES.get(host.condition, "plain")),
            "" if host.step is None else str(host.step),
            render.duration(host.idle_s if stands else host.since_s),
        ]
        if writing:
            row += [
                render.size(host.written_bytes) if host.written_bytes else "",
                f"{render.size(host.bytes_per_s)}/s" if host.bytes_per_s else "",
            ]
        rows.append([*row, render.duration(host.heard_s)])
    columns = ["process", "host", "state", "step", "for", *(["written", "rate"] if writing else []), "heard"]
    return render.table(columns, rows, right=["process", "step", "for", "written", "rate", "heard"], cut=True)


def _state(host: HostNow) -> str:
    match host.condition:
        case "frozen" | "dead":
            return f"{host.condition}; was {host.state}"
        case "stuck":
            return f"stuck; {host.state}"
        case "waiting":
            others = ", ".join(map(str, host.waits_for[:3])) + (" ..." if len(host.waits_for) > 3 else "")
            return f"{host.state}; waits for {others}"
        case "starting":
            return f"{host.state}; first step"
    return host.state


def _commits(now: RunNow, lines: int) -> render.Shown:
    rows = [
        [
            str(commit.step),
            commit.attempt,
            render.size(commit.bytes),
            render.moment(commit.time),
            "" if commit.save_s is None else render.duration(commit.save_s),
        ]
        for commit in list(reversed(now.commits))[:lines]
    ]
    return render.table(
        ["step", "attempt", "size", "state of", "save took"], rows, right=["step", "size", "save took"], cut=True
    )
