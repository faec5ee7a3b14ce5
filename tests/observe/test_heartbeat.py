"""The pulse: it goes on where the main thread does not, and says where that one is."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import environment
from orchestrator.observe import events, heartbeat, own_process
from orchestrator.observe.event_log import EventLog, Tail, read


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[events.Event]]:
    """Events from now on; this process has reported nothing yet."""
    monkeypatch.setattr(heartbeat, "_last", heartbeat._Last())
    heartbeat._times.clear()
    found: list[events.Event] = []
    stop = events.subscribe(found.append)
    yield found
    stop()


@pytest.fixture
def clock(heard: list[events.Event], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock, to be set; an agent has just been opened."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    heartbeat.record("opened", None)
    return now


def wait_until(there: object, deadline_s: float = 10.0) -> None:
    assert callable(there)
    end = time.monotonic() + deadline_s
    while not there():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_pulse_goes_on_while_the_main_thread_stands_and_says_where(
    heard: list[events.Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "beat"
    monkeypatch.setenv(environment.HEARTBEAT_FILE, str(file))
    monkeypatch.setattr(heartbeat, "PULSE_S", 0.2)
    monkeypatch.setattr(heartbeat, "_TICK_S", 0.05)
    heartbeat.record("opened", None)
    heart = heartbeat.Heart()
    try:
        with heartbeat.waiting("restore: step 7"):
            stamp = file.stat().st_mtime_ns
            wait_until(lambda: sum(isinstance(event, events.Pulse) for event in heard) >= 4)
        said = json.loads((tmp_path / "beat.pulse").read_text())
        assert said["barrier"] == "restore: step 7" and said["idle_s"] > 0.3 and said["steps"] == 0
        assert file.stat().st_mtime_ns == stamp, "the main thread's own file says nothing for it"
    finally:
        heart.close()
    pulses = [event for event in heard if isinstance(event, events.Pulse)]
    assert [pulse.idle_s for pulse in pulses] == sorted(pulse.idle_s for pulse in pulses)
    assert (pulses[-1].doing, pulses[-1].step, pulses[-1].barrier) == ("opened", -1, "restore: step 7")
    assert heartbeat.position().barrier == "" and heartbeat.position().idle_s < 5
    count = len(heard)
    time.sleep(0.5)
    assert len(heard) == count, "closed is closed"


def test_steps_their_time_and_the_start_are_counted_once_a_step(clock: list[float]) -> None:
    for step, took_s in ((10, 40.0), (11, 2.0), (11, 0.1), (12, 1.9), (14, 4.0)):
        clock[0] += took_s
        heartbeat.record("training", step)
    where = heartbeat.position()
    assert (where.step, where.steps, where.step_s) == (14, 4, 2.0) and where.startup_s > 0
    heartbeat.record("opened", None)
    assert (heartbeat.position().steps, heartbeat.position().step) == (0, None), "another agent counts its own"


def test_a_main_thread_that_goes_on_says_how_long_it_stood_but_not_each_step(
    heard: list[events.Event], clock: list[float]
) -> None:
    for step in range(50):
        clock[0] += 40.0 if step == 30 else 1.0
        heartbeat.record("training", step)
    alive = [(event.step, event.idle_s) for event in heard if isinstance(event, events.Alive)]
    assert alive[0][0] == -1 and alive[1:] == [(30, 40.0)]


def test_pulses_have_bounded_files_of_their_own_and_push_out_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.observe.event_log.PULSE_BYTES", 2000)
    log = EventLog(str(tmp_path), process=3, host="h", epoch=1)
    log.write(events.EpochOpened(1, "r", 4))
    for step in range(200):
        log.write(events.Pulse("training", step, 1.0, 1.0))
    log.close()
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert set(sizes) == {"00003.jsonl", "00003.pulse.jsonl", "00003.pulse.old.jsonl"} and max(sizes.values()) <= 2000
    tail = Tail(str(tmp_path))
    lines = tail.more()
    assert isinstance(lines[0].event, events.EpochOpened)
    assert isinstance(lines[-1].event, events.Pulse) and lines[-1].event.step == 199
    assert tail.newest == {3: (tmp_path / "00003.pulse.jsonl").stat().st_mtime}
    assert len(read(str(tmp_path))) == len(lines) > 10


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("a file system that can be full needs root")
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "test", str(place)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


def test_on_a_full_disk_the_pulse_stays_seen_and_events_come_when_there_is_room(small_disk: Path) -> None:
    log = EventLog(str(small_disk / "events"), process=0, host="h", epoch=1)
    log.write(events.EpochOpened(1, "r", 1))
    log.write(events.Pulse("training", 1, 1.0, 1.0))
    pulses, story = small_disk / "events/00000.pulse.jsonl", small_disk / "events/00000.jsonl"
    wait_until(lambda: pulses.exists() and pulses.stat().st_size)
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    for path in (pulses, story):  # what is left of their last blocks, too
        with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
            while True:
                file.write(b"\n")
    before = {path: path.stat().st_size for path in (pulses, story)}
    os.utime(pulses, (0, 0))
    for step in range(5):
        log.write(events.SaveNotCommitted(step, "e0001-a01", "ENOSPC"))
    log.write(events.Pulse("training", 2, 1.0, 1.0))
    wait_until(lambda: time.time() - pulses.stat().st_mtime < 60)
    assert {path: path.stat().st_size for path in (pulses, story)} == before
    filler.unlink()
    log.write(events.SaveCommitted(6, "e0001-a01", 1.0, 1))
    log.close()
    lines = [line.event for line in read(str(small_disk / "events"))]
    failed = [event.step for event in lines if isinstance(event, events.SaveNotCommitted)]
    assert failed == [0, 1, 2, 3, 4] and isinstance(lines[-1], events.SaveCommitted)
    assert log.dropped == 1, "the pulse, which says nothing later"


def test_a_pulse_says_which_process_it_is_of(heard: list[events.Event]) -> None:
    heart = heartbeat.Heart()
    try:
        wait_until(lambda: any(isinstance(event, events.Pulse) for event in heard))
    finally:
        heart.close()
    (pulse, *_) = [event for event in heard if isinstance(event, events.Pulse)]
    assert pulse.process_id == own_process.name_of(os.getpid())
