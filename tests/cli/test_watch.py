"""`orchestrator watch`: what it says of a job that runs, of hosts in trouble, and of a run without a job."""

from __future__ import annotations

import io
import json
import signal
import time
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from orchestrator.cli.main import main
from orchestrator.cli.watch import SILENT_S, RunNow, show, summarize
from orchestrator.observe import events
from orchestrator.observe.event_log import LoggedEvent
from orchestrator.observe.timeline import Timeline
from tests.support.builders import head, live
from tests.support.processes import job
from tests.support.runs import fill

pytestmark = pytest.mark.jobs


def line(event: events.Event, time: float, process: int = 0, epoch: int = 3) -> LoggedEvent:
    return LoggedEvent(time, process, f"host-{process}", "node", epoch, event)


def phase(name: str, elapsed_s: float, process: int, written: int = 0) -> LoggedEvent:
    return line(events.SavePhase(40, "e0003-a01", name, elapsed_s, written), 1000.0 + elapsed_s, process)


def shown(now: RunNow, width: int = 80) -> str:
    screen = Console(file=io.StringIO(), width=width, highlight=False)
    screen.print(*show(now, {}), sep="\n")
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue()


STORY = [
    *(line(events.EpochOpened(3, "r", 4), 990.0, process) for process in range(3)),
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
    assert now.slowest and (now.slowest.process, now.slowest.seconds, now.slowest.median_s) == (1, 6.0, 5.5)
    text = shown(now)
    assert "if the job dies now, you lose 2 min 1 s (back to step 30)" in text
    assert "SILENT; was writing" in text and "1.0 MiB/s" in text and "not heard of: processes 3" in text
    assert "slowest in step 40: process 1 (host-1)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_events_of_an_older_incarnation_say_nothing_of_this_ones_hosts() -> None:
    now = summarize("run", head(epoch=4), Timeline().add(STORY), 1010.0)
    assert now.hosts == () and now.newest is None and now.loss_s is None
    assert "all is lost" in shown(now) and "no events of this incarnation" in shown(now)


def test_more_hosts_than_fit_show_those_in_trouble_first() -> None:
    lines = [line(events.EpochOpened(3, "r", 60), 990.0 if process == 55 else 1009.0, process) for process in range(60)]
    text = shown(summarize("run", head(epoch=3), Timeline().add(sorted(lines, key=lambda each: each.time)), 1010.0))
    assert "host-55" in text and "host-40" not in text and "... and 20 more" in text


def test_json_keeps_its_schema_and_once_is_a_page_of_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(root, 0, 1)
    assert main(["orchestrator", "watch", str(root), "--json"]) == 0
    now = msgspec.json.decode(capsys.readouterr().out, type=RunNow)
    assert now.newest == 1 and [commit.step for commit in now.commits] == [0, 1] and now.hosts[0].state == "left"
    assert now.commits[1].save_s is not None
    assert main(["orchestrator", "watch", str(root), "--once"]) == 0
    out = capsys.readouterr().out
    assert "back to step 1" in out and "left" in out and "\x1b" not in out
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
