"""The page of `orchestrator watch`: the verdict and notes first, hosts in trouble next, one line for the rest, and the
last commits where there is room. It fits any terminal. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.text import Text

from orchestrator.cli import render
from orchestrator.cli.layout import fitted, wrapped
from orchestrator.cli.watch_verdict import TONES
from orchestrator.cli.watch_view import HostNow, RunNow, SlowestHost
from orchestrator.observe.events import PHASES

_PIPE = (200, 60)  # where the output is no terminal
_COMMITS_LEAST = 4  # lines: a heading and three of them
_LATE_S = 2.0
_MINUTES_S = 600.0
_LEFT_OUT = ("rate", "written", "for")  # of the hosts' table, in this order
_GAP, _NAME_LEAST = 2, 8
_ORDER = ("dead", "frozen", "stuck", "waiting", "starting", "moving", "left")
_TROUBLED = ("dead", "frozen", "stuck")
_WORDS = {"sealing": "making durable", "opened": "starting"}
_TONES: dict[str, render.Tone] = {"dead": "bad", "frozen": "bad", "stuck": "warn", "waiting": "warn", "left": "dim"}


def page(now: RunNow, screen: tuple[int, int] | None = None) -> Iterator[render.Shown]:
    """`screen`: columns and lines, of which the last stays free for the cursor; None: it is no terminal."""
    width, height = screen or _PIPE
    head = list(_head(now, width))
    yield from head
    left = height - 1 - len(head)
    for_commits = min(len(now.commits) + 2, _COMMITS_LEAST + 1) if now.commits else 0
    if now.hosts:
        lines, shown = _hosts(now, width, left - for_commits - 2 if left > for_commits + 6 else left - 2)
        yield ""
        yield from shown
        left -= lines + 1
    if now.commits and left > 2:
        yield ""
        yield _commits(now, left - 2)


def _head(now: RunNow, width: int) -> Iterator[Text]:
    lines: list[tuple[str, render.Tone | None, Sequence[str]]] = [
        ("", TONES[now.verdict], (f"{now.verdict}  {now.why}",)),
        ("", "dim", (f"{now.root}  epoch {now.epoch}, journal version {now.version}, {render.moment(now.time)}",)),
        ("bold", None, tuple(_loss(now))),
    ]
    if now.next_save_step is not None and now.verdict in ("HEALTHY", "SAVING", "NO COMMITS"):
        when = "" if now.next_save_s is None else f", in about {render.rough(now.next_save_s)}"
        lines.append(("", "plain", (f"next save: step {now.next_save_step}{when}",)))
    lines += [("", tone, parts) for tone, parts in _notes(now)]
    for style, tone, parts in lines:
        for line in fitted(parts, width):
            yield from wrapped(render.words(line, style) if style else render.toned(line, tone), width, 2)


def _loss(now: RunNow) -> Iterator[str]:
    if now.verdict == "ENDED" and now.newest is not None:
        yield f"step {now.newest} is the newest that can be restored"
    elif now.loss_s is None:
        yield "no step is durable yet: if the job dies now, all is lost"
    else:
        steps = "" if now.loss_steps is None else f" and {now.loss_steps} step{'s' if now.loss_steps != 1 else ''}"
        yield f"if the job dies now, you lose {render.rough(now.loss_s)}{steps} (back to step {now.newest})"
        if now.restart_s is not None:
            yield f"a restart takes {render.rough(now.restart_s)}"


def _notes(now: RunNow) -> Iterator[tuple[render.Tone, Sequence[str]]]:
    if not now.hosts:
        yield "warn", ("no events of this epoch: see --events_dir, or the job runs without them",)
    missing = sorted(set(range(now.processes or 0)) - {host.process for host in now.hosts})
    if missing and now.hosts:
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        yield "warn", (f"not heard of: processes {', '.join(map(str, missing[:10]))}{more}",)
    late = max(now.hosts, key=lambda host: host.late_s, default=None)
    if late and late.late_s > _LATE_S and not late.silent and late.condition != "left":
        yield "warn", (f"slow: process {late.process} ({late.host}) stood still for {render.rough(late.late_s)}",)
    if (slow := now.slowest) and slow.seconds > 0:
        yield "warn" if is_slow(slow) else "dim", straggler(slow)
    if now.free_bytes is not None and now.free_bytes < now.next_bytes:
        free, needed = render.size(now.free_bytes), render.size(now.next_bytes)
        yield "bad", (f"{free} free, and the next save needs about {needed}",)
    for one in now.quarantined[-2:]:
        yield "bad", (f"quarantined: step {one.step} {one.attempt}: {one.reason}"[:150],)


def straggler(slow: SlowestHost) -> tuple[str, str]:
    """In two parts, the first of which says who."""
    host = f"slowest in step {slow.step}: process {slow.process} ({slow.host}), durable after"
    return f"{host} {render.duration(slow.seconds)}", f"the others' median is {render.duration(slow.median_s)}"


def is_slow(slow: SlowestHost) -> bool:
    return slow.seconds > 2 * slow.median_s + 1


def _hosts(now: RunNow, width: int, lines: int) -> tuple[int, list[render.Shown]]:
    """All in a table, where they fit. Else those in trouble, then those that a save waits for longest, and one line for
    the rest. (how many lines, at most `lines`; what is in them)"""
    order = sorted(now.hosts, key=_place)
    shown = order
    if len(order) > lines - 1:
        shown = [host for host in order if host.condition in _TROUBLED or _behind(host)][: max(0, lines - 2)]
    rest = order[len(shown) :]
    pieces: list[render.Shown] = [_table(shown, width)] if shown else []
    if rest:
        pieces.append(render.toned(f"{'and ' if shown else ''}{_counted(rest, bool(shown))}", "dim"))
    return (len(shown) + 1 if shown else 0) + bool(rest), pieces


def _place(host: HostNow) -> tuple[int, int, int]:
    phase = PHASES.index(host.state) if host.state in PHASES else len(PHASES)
    return _ORDER.index(host.condition), phase, host.process


def _behind(host: HostNow) -> bool:
    """Its part of a save is not durable yet."""
    return host.state in PHASES[: PHASES.index("waiting")]


def _counted(hosts: Sequence[HostNow], more: bool) -> str:
    """`3997 more: 3990 training, 7 starting`."""
    names = Counter(_word(host.state) if host.condition == "moving" else host.condition for host in hosts)
    whole = f"{len(hosts)} more" if more else f"all {len(hosts)} hosts"
    if len(names) == 1:
        return f"{whole}: {next(iter(names))}"
    return f"{whole}: " + ", ".join(f"{count} {name}" for name, count in names.most_common())


def _word(state: str) -> str:
    return _WORDS.get(state, state)


def _table(hosts: Sequence[HostNow], width: int) -> render.Shown:
    """As wide as the screen at most: what is missed least is left out, then the beginning of long names."""
    writing = any(host.written_bytes for host in hosts)
    rows: list[list[render.Cell]] = []
    for host in hosts:
        row: list[render.Cell] = [
            str(host.process),
            host.host,
            render.toned(_state(host), _TONES.get(host.condition, "plain")),
            "" if host.step is None else str(host.step),
            _for(host),
        ]
        if writing:
            row += [
                render.size(host.written_bytes) if host.written_bytes else "",
                f"{render.size(host.bytes_per_s)}/s" if host.bytes_per_s else "",
            ]
        rows.append([*row, f"{_about(host.heard_s)} ago"])
    columns = ["process", "host", "state", "step", "for", *(["written", "rate"] if writing else []), "last sign"]
    widths = {
        name: max(cell_len(str(cell)) for cell in (name, *cells)) for name, *cells in zip(columns, *rows, strict=True)
    }
    kept = [name for name in columns if name != "for" or any(row[columns.index("for")] for row in rows)]
    for name in _LEFT_OUT:
        if _wide(kept, widths) > width and name in kept:
            kept.remove(name)
    room = max(_NAME_LEAST, width - _wide([name for name in kept if name != "host"], widths) - _GAP)
    rows = [[*row[:1], _end(str(row[1]), room), *row[2:]] for row in rows]
    shown = [columns.index(name) for name in kept]
    rows = [[row[index] for index in shown] for row in rows]
    right = ["process", "step", "for", "written", "rate", "last sign"]
    return render.table([columns[index] for index in shown], rows, right=right, cut=True)


def _wide(names: Sequence[str], widths: Mapping[str, int]) -> int:
    return sum(widths[name] + _GAP for name in names) - _GAP


def _end(name: str, room: int) -> str:
    """Of a long name the end, which tells hosts apart."""
    return name if cell_len(name) <= room else f"…{name[-(room - 1) :]}"


def _about(seconds: float) -> str:
    """In one unit where minutes have gone by."""
    return render.rough(seconds) if seconds < _MINUTES_S else render.age(seconds).removesuffix(" ago")


def _for(host: HostNow) -> str:
    """How long it has been where it is, if that says something: who trains has just done a step."""
    if host.condition in ("dead", "frozen", "stuck", "waiting"):
        return _about(host.idle_s)
    return "" if host.state == "training" or host.condition == "left" else _about(host.since_s)


def _state(host: HostNow) -> str:
    state = _word(host.state)
    match host.condition:
        case "frozen" | "dead":
            return f"{host.condition}; was {state}"
        case "stuck":
            return f"stuck; {state}"
        case "waiting":
            others = ", ".join(map(str, host.waits_for[:3])) + (" ..." if len(host.waits_for) > 3 else "")
            return f"{state}; waits for {others}"
        case "starting":
            return f"{state}; first step"
    return state


def _commits(now: RunNow, lines: int) -> render.Shown:
    rows = [
        [
            str(commit.step),
            render.moment(commit.time),
            render.age(now.time - commit.time),
            render.size(commit.bytes),
            "" if commit.save_s is None else render.duration(commit.save_s),
        ]
        for commit in list(reversed(now.commits))[:lines]
    ]
    return render.table(
        ["step", "saved", "age", "size", "save took"], rows, right=["step", "age", "size", "save took"], cut=True
    )
