"""`orchestrator watch`: what it says of a job that runs, of hosts in trouble, and of a run without a job."""

from __future__ import annotations

import io
import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from orchestrator.cli.main import main
from orchestrator.cli.watch import SILENT_S, Heard, summarize
from orchestrator.cli.watch_page import page
from orchestrator.cli.watch_verdict import Facts, judge
from orchestrator.cli.watch_view import RunNow
from orchestrator.observe import events
from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.timeline import Timeline
from orchestrator.rules.stalls import Condition, Diagnosis
from tests.support.builders import head, live
from tests.support.processes import job
from tests.support.runs import fill

pytestmark = pytest.mark.jobs


def line(event: events.Event, time: float, process: int = 0, epoch: int = 3) -> LoggedEvent:
    return LoggedEvent(time, process, f"host-{process}", "node", epoch, event)


def phase(name: str, elapsed_s: float, process: int, written: int = 0) -> LoggedEvent:
    return line(events.SavePhase(40, "e0003-a01", name, elapsed_s, written), 1000.0 + elapsed_s, process)


def shown(now: RunNow, width: int = 80, height: int = 60) -> str:
    screen = Console(file=io.StringIO(), width=width, highlight=False)
    screen.print(*page(now, (width, height)), sep="\n")
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


STORY = [
    *(line(events.EpochOpened(3, "r", 4), 990.0, process) for process in range(3)),
    *(line(events.Pulse("training", 40, 1.0, 0.1, "", 30, 1.0), 990.0, process) for process in range(3)),
    *(phase("staging", 0.0, process) for process in range(3)),
    *(phase("writing", 0.5, process) for process in range(3)),
    *(phase("sealing", 4.5, process, 4 << 20) for process in (0, 1)),
    *(phase("waiting", 5.0 + process, process, 4 << 20) for process in (0, 1)),
]


def test_states_rates_silence_the_slowest_and_the_loss_are_shown() -> None:
    at = 1006.0 + SILENT_S
    now = summarize("run", head(live(30, time=900.0), epoch=3), Timeline().add(STORY), at)
    assert [(host.state, host.silent, host.step) for host in now.hosts] == [
        ("waiting", True, 40),
        ("waiting", False, 40),
        ("writing", True, 40),
    ]
    assert now.hosts[0].bytes_per_s == (4 << 20) / 4.0 and now.hosts[0].written_bytes == 4 << 20
    assert (now.newest, now.loss_s, now.processes) == (30, at - 900.0, 4)
    assert now.slowest is None, "of those that are done; whoever is not may be the slowest"
    text = shown(now)
    assert "if the job dies now, you lose 2 min 1 s and 10 steps (back to step 30)" in text
    assert "frozen; was writing" in text and "1.0 MiB/s" in shown(now, 140) and "not heard of: processes 3" in text
    assert now.verdict == "STALLED" and "host-0 (process 0), host-2 (process 2) have no pulse" in now.why
    done = [phase("sealing", 6.0, 2), phase("waiting", 9.0, 2)]
    slow = summarize("run", head(epoch=3), Timeline().add([*STORY, *done]), at).slowest
    assert slow and (slow.process, slow.seconds, slow.median_s) == (2, 9.0, 5.5), "of the others"
    assert max(map(len, text.splitlines())) <= 80


def test_events_of_an_older_epoch_say_nothing_of_this_ones_hosts() -> None:
    now = summarize("run", head(epoch=4), Timeline().add(STORY), 1010.0)
    assert now.hosts == () and now.newest is None and now.loss_s is None
    assert "all is lost" in shown(now) and "no events of this epoch" in shown(now)


def pulse(time: float, process: int = 0, idle_s: float = 0.1, barrier: str = "", **more: float) -> LoggedEvent:
    told = {"steps": 40, "step_s": 0.5, "startup_s": 42.0, **more}
    return line(events.Pulse("training", 41, 60.0, idle_s, barrier, **told), time, process)  # type: ignore[arg-type]


@pytest.mark.parametrize("height", [10, 24, 40, 200])
@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("count", [4, 60, 4000])
def test_any_number_of_hosts_fits_any_screen_those_in_trouble_first(count: int, width: int, height: int) -> None:
    lines = [line(events.EpochOpened(3, "r", count), 900.0, process) for process in range(count)]
    lines += [pulse(901.0, process) for process in range(count)]
    lines += [pulse(1000.0, process, 20.0) for process in range(count) if process != count - 2]
    kept = head(*(live(step, time=900.0 + step) for step in (10, 20, 30)), epoch=3)
    now = summarize("run", kept, Timeline().add(lines), 1000.5)
    assert now.verdict == "STALLED" and f"host-{count - 2} (process {count - 2}) has no pulse" in now.why
    assert [host.process for host in now.hosts if host.condition == "frozen"] == [count - 2]
    text = shown(now, width, height)
    assert len(text.splitlines()) <= height - 1 and max(map(len, text.splitlines())) <= width
    assert text.startswith("STALLED") and "you lose" in text
    rows = [row for row in text.splitlines() if f"host-{count - 2}" in row]
    assert any("frozen; was training" in row for row in rows[1:]), "the one in trouble is among those that fit"
    assert ("more: " in text or count < height) and text.count("waits for") <= height
    if height >= 24:
        assert "save took" in text


@pytest.mark.parametrize(
    ("width", "name", "columns", "shown_name"),
    [
        (140, "host-7", "process host state step for written rate last sign", "host-7"),
        (80, "host-7", "process host state step for written last sign", "host-7"),
        (68, "host-7", "process host state step for last sign", "host-7"),
        (80, "trainer-of-the-large-model-7.pods.default.svc", "process host state step last sign", "fault.svc"),
        (
            140,
            "trainer-of-the-large-model-7.pods.default.svc",
            "process host state step for written rate last sign",
            "t.svc",
        ),
    ],
)
def test_a_narrow_screen_leaves_out_columns_and_cuts_no_number(
    width: int, name: str, columns: str, shown_name: str
) -> None:
    saving = [
        replace(each, host=name)
        for each in [*STORY, *(phase("writing", 8.0, process, 4 << 20) for process in (0, 1, 2))]
    ]
    now = summarize("run", head(live(30, time=900.0), epoch=3), Timeline().add(saving), 3000.0)
    rows = shown(now, width).splitlines()
    at = next(index for index, row in enumerate(rows) if row.startswith("process"))
    assert rows[at].split() == columns.split() and max(map(len, rows)) <= width
    for row in rows[at + 1 : at + 4]:
        assert "frozen; was w" in row and " 40 " in row and row.rstrip().endswith("33 min ago"), row
        assert f"{shown_name} " in row and row.count("…") == (shown_name != name and width < 140), row


def test_training_has_a_step_a_rate_the_next_save_and_what_would_be_lost() -> None:
    saves = [
        line(event, 900.0 + step, 0)
        for step in (10, 20, 30)
        for event in (
            events.SavePhase(step, "e0003-a01", "staging", 0.0, 0),
            events.SaveCommitted(step, "e0003-a01", 1.0, 9),
        )
    ]
    story = [line(events.EpochOpened(3, "r", 1), 890.0), *saves, pulse(942.0)]
    now = summarize("run", head(live(20, time=920.0), live(30, time=930.0), epoch=3), Timeline().add(story), 943.0)
    assert (now.verdict, now.step, now.step_s) == ("NO COMMITS", 41, 0.5) or now.verdict == "HEALTHY"
    assert (now.next_save_step, now.loss_steps, now.restart_s) == (40, 11, 42.0)
    assert "you lose 13 s and 11 steps (back to step 30); a restart takes 42 s" in shown(now, 140)


def test_the_hosts_own_clocks_do_not_make_them_silent() -> None:
    ahead = [line(events.EpochOpened(3, "r", 2), 5.0), pulse(5000.0, 0), pulse(10.0, 1)]
    now = summarize("run", head(epoch=3), Timeline().add(ahead), 1000.0, {0: 1.0, 1: 2.0})
    assert not any(host.silent for host in now.hosts) and [round(host.idle_s, 3) for host in now.hosts] == [1.1, 2.1]
    heard = Heard()
    assert heard.ages({0: 940.0, 1: 1060.0}, 1000.0, 5.0) == {0: 60.0, 1: 0.0}
    assert heard.ages({0: 945.0, 1: 1060.0}, 1010.0, 15.0) == {0: 0.0, 1: 10.0}, "who writes lives"


def test_a_quarantined_step_is_named_and_not_among_the_good_ones() -> None:
    bad = live(20, time=920.0, trust="quarantined")
    now = summarize("run", head(live(10, time=910.0), bad, epoch=3), Timeline(), 943.0)
    assert [commit.step for commit in now.commits] == [10] and [one.step for one in now.quarantined] == [20]
    assert "quarantined: step 20" in shown(now)


def test_one_of_two_hosts_can_be_the_slow_one() -> None:
    """A median that counts the slow one, too, hides it."""
    lines = [phase(name, after, process) for process in (0, 1) for name, after in (("writing", 0.1), ("waiting", 0.2))]
    lines[-1] = phase("waiting", 9.0, 1)
    text = shown(summarize("run", head(epoch=3), Timeline().add(lines), 1010.0), 140)
    assert "process 1 (host-1), durable after 9.00 s; the others' median is 0.20 s" in text
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(*page(summarize("run", head(epoch=3), Timeline().add(lines), 1010.0), (140, 40)), sep="\n")
    assert isinstance(console.file, io.StringIO)
    (row,) = [row for row in console.file.getvalue().splitlines() if "slowest in step" in row]
    assert "\x1b[33m" in row, "a warning"


def test_a_disk_without_room_for_the_next_save_is_said() -> None:
    kept = head(live(30, time=900.0, bytes=1 << 30), epoch=3)
    moving = Timeline().add([line(events.EpochOpened(3, "r", 1), 900.0), pulse(1000.0)])
    now = summarize("run", kept, moving, 1001.0, None, 1 << 29)
    assert now.verdict == "HEALTHY" and "512.0 MiB free, and the next save needs about 1.0 GiB" in shown(now)
    assert "free" not in shown(summarize("run", kept, moving, 1001.0, None, 1 << 31))
    full = summarize("run", kept, moving, 1001.0, None, 0)
    assert full.verdict == "NO COMMITS" and "the disk is full (0 B free)" in full.why


MOVES, STARTS, FROZEN, STUCK, LEFT, DEAD = (
    Diagnosis(each)
    for each in (
        Condition.MOVING,
        Condition.STARTING,
        Condition.FROZEN,
        Condition.STUCK,
        Condition.LEFT,
        Condition.DEAD,
    )
)
STOPPED = Diagnosis(Condition.FROZEN, stopped=True)
WAITS = Diagnosis(Condition.WAITING, (1,))
VERDICTS: dict[str, tuple[Facts, str, str]] = {
    "moves": (Facts({0: MOVES, 1: MOVES}, step=4), "HEALTHY", "training, step 4"),
    "saves": (Facts({0: MOVES}, saving=4), "SAVING", "step 4"),
    "compiles": (Facts({0: STARTS, 1: STARTS}), "STARTING", "on 2 hosts: it compiles"),
    "one is not there yet": (Facts({0: MOVES}, processes=2), "STARTING", "process 1"),
    "one is frozen": (Facts({0: WAITS, 1: FROZEN}), "STALLED", "(process 1) has no pulse: frozen or dead; 1 more"),
    "one is frozen while it saves": (Facts({0: MOVES, 1: FROZEN}, saving=4), "STALLED", "no pulse"),
    "one is frozen, and one of two waits": (
        Facts({0: MOVES, 1: STOPPED, 2: WAITS}),
        "STALLED",
        "a signal; 1 more wait",
    ),
    "one is frozen, and nobody waits": (Facts({0: MOVES, 1: STOPPED}), "STALLED", "frozen: stopped by a signal!"),
    "the job is gone": (Facts({0: FROZEN, 1: FROZEN}), "STALLED", "the job is gone, or frozen as a whole"),
    "the job is surely gone": (Facts({0: DEAD, 1: DEAD}), "STALLED", "the job is gone: it did not close"),
    "one is surely dead": (Facts({0: WAITS, 1: DEAD}), "STALLED", "(process 1) is dead: no such process any more; 1"),
    "one is surely frozen": (Facts({0: WAITS, 1: STOPPED}), "STALLED", "(process 1) is frozen: stopped by a signal; 1"),
    "all are surely frozen": (Facts({0: STOPPED, 1: STOPPED}), "STALLED", "is frozen: a signal has stopped"),
    "one dead, one frozen": (Facts({0: DEAD, 1: STOPPED, 2: WAITS}), "STALLED", "is dead: no such process any more; ?"),
    "a full disk": (Facts({0: MOVES}, free_bytes=4096, commit_age_s=9.0), "NO COMMITS", "the disk is full"),
    "a full disk, and one is frozen": (Facts({0: WAITS, 1: STOPPED}, free_bytes=0), "STALLED", "frozen"),
    "a disk that was full when it ended": (Facts({0: LEFT}, free_bytes=0), "ENDED", "closed"),
    "one is stuck": (Facts({0: WAITS, 1: STUCK}, waits_at="b"), "STALLED", "does not go on; 1 more wait for it at `b`"),
    "all are stuck": (Facts({0: STUCK, 1: STUCK}), "STALLED", "none is behind"),
    "one waits for who still starts": (Facts({0: WAITS, 1: STARTS}), "STARTING", "compiles"),
    "closed in order": (Facts({0: LEFT, 1: LEFT}, processes=2), "ENDED", "all 2 processes closed in order"),
    "closed long ago": (Facts({0: LEFT}, commit_age_s=1e6, interval_s=1.0), "ENDED", "closed"),
    "half of it closed": (Facts({0: LEFT}, processes=2), "STALLED", "1 of 2 processes have left"),
    "one left, one frozen": (Facts({0: LEFT, 1: FROZEN}), "STALLED", "is gone"),
    "late": (Facts({0: MOVES}, commit_age_s=31.0, interval_s=10.0), "NO COMMITS", "31 s ago"),
    "not late yet": (Facts({0: MOVES}, commit_age_s=29.0, interval_s=10.0), "HEALTHY", ""),
    "saves fail": (Facts({0: MOVES}, failed=2, why_failed="disk full"), "NO COMMITS", "disk full"),
    "one save failed": (Facts({0: MOVES}, failed=1, commit_age_s=5.0), "HEALTHY", ""),
    "the first save failed": (Facts({0: MOVES}, failed=1, why_failed="disk full"), "NO COMMITS", "disk full"),
    "no events, commits": (Facts(commit_age_s=5.0), "HEALTHY", "no events"),
    "no events, no commits for long": (Facts(commit_age_s=1e6), "NO COMMITS", "no events"),
    "nothing yet": (Facts(), "STARTING", "no step"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_is_the_worst_that_is_true(case: str) -> None:
    facts, verdict, why = VERDICTS[case]
    said, because = judge(facts)
    assert said == verdict and why in f"{because}!", (said, because)


def test_json_keeps_its_schema_and_once_is_a_page_of_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 0, 1)
    assert main(["orchestrator", "watch", str(root), "--json"]) == 0
    now = msgspec.json.decode(capsys.readouterr().out, type=RunNow)
    assert now.newest == 1 and [commit.step for commit in now.commits] == [0, 1] and now.hosts[0].state == "left"
    assert now.commits[1].save_s is not None
    assert main(["orchestrator", "watch", str(root), "--once"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ENDED  the process closed in order\n") and "step 1 is the newest" in out
    assert "\x1b" not in out
    assert main(["orchestrator", "watch", str(root), "--interval_s=0"]) == 2


@pytest.mark.slow
def test_a_real_jobs_stopped_host_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with job(2, 1, root, tmp_path / "logs", steps=400, delay=0.2) as running:
        running.wait_for(1, "trained", 90, at_least=2)
        main(["orchestrator", "watch", str(root), "--json"])
        now = msgspec.json.decode(capsys.readouterr().out, type=RunNow)
        assert now.processes == 2 and not any(host.silent for host in now.hosts)
        assert [host.host for host in now.hosts] == ["host-0", "host-1"]
        running.processes[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + SILENT_S + 30
        silent: list[str] = []
        while "host-1" not in silent and time.monotonic() < deadline:
            time.sleep(1)
            main(["orchestrator", "watch", str(root), "--json"])
            said = json.loads(capsys.readouterr().out)
            silent = [host["host"] for host in said["hosts"] if host["silent"]]
        assert "host-1" in silent
        assert said["loss_s"] > SILENT_S / 2
