"""Jobs of several processes that come back from memory: each simulated host has a tier of its own."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import Job, job
from tests.support.runs import store_of

pytestmark = pytest.mark.jobs
DEADLINE_S = 90.0
NEVER = 1000  # steps: only step 0 is saved to the store


def start(count: int, tmp_path: Path, name: str, devices: int = 2, **args: Any) -> Any:
    places = {"tier": tmp_path / "tiers", "every": NEVER, "big": 1}
    return job(count, devices, tmp_path / "run", tmp_path / name, **{**places, **args})


def data_files(tmp_path: Path, process: int, step: int) -> list[Path]:
    """Of the chunks that a process holds of a step."""
    pattern = f"host-{process}/orchestrator-*/*/process-{process:05d}/steps/{step:08d}/*/state/ocdbt.process_*/d/*"
    return sorted((tmp_path / "tiers").glob(pattern))


def in_log(tmp_path: Path) -> list[int]:
    """The steps that are held, by process 0's log; on a slow machine some that were due are not."""
    (path,) = (tmp_path / "tiers").glob("host-0/orchestrator-*/*/process-00000")
    return [live.step for live in store_of(path).require_head().live]


def restored(running: Job, process: int = 0) -> dict[str, Any]:
    (found,) = running.wait_for(process, "restored", DEADLINE_S)
    assert found["wrong"] == [], running.story()
    return found


def held_by(running: Job, at_least: int) -> int:
    """Run on until all hold so many steps, and kill all at once; the newest step that was held by then."""
    for process in range(len(running.processes)):
        running.wait_for(process, "held", DEADLINE_S, at_least)
    for process in range(len(running.processes)):
        running.kill(process)
    running.wait(DEADLINE_S)
    return min(max(line["step"] for line in running.said(process, "held")) for process in (0, 1))


def test_a_killed_job_comes_back_bit_for_bit_from_what_is_whole_here_or_on_another_host(tmp_path: Path) -> None:
    """Two hosts with a copy of each other's part; then, one after another: a flipped bit, a lost host, both copies of a
    part gone."""
    with start(2, tmp_path, "first", steps=500, delay=0.1) as first:
        surely = held_by(first, 3)
        for process in (0, 1):
            for line in first.said(process, "held"):
                assert line["copies"] == 1 and line["sent_bytes"] > 50_000, line

    older, newest = in_log(tmp_path)
    assert newest >= surely >= 4
    (flipped, *_) = data_files(tmp_path, 1, newest)
    body = bytearray(flipped.read_bytes())
    body[len(body) // 3] ^= 4
    flipped.write_bytes(body)
    with start(2, tmp_path, "second", steps=0) as second:
        for process in (0, 1):
            found = restored(second, process)
            assert found["step"] == newest and "store" not in found["sources"], second.story()
            assert found["process_states"] == {str(one): f"host {one} at {found['step']}" for one in (0, 1)}
            assert all(flipped.name in line["file"] for line in second.said(process, "copy dropped"))
        assert second.wait(DEADLINE_S) == [0, 0], second.story()

    shutil.rmtree(tmp_path / "tiers/host-1")  # a host is lost, with all that it held
    with start(2, tmp_path, "third", steps=0) as third:
        for process in (0, 1):
            found = restored(third, process)
            assert found["step"] == newest and "store" not in found["sources"], third.story()
        assert third.wait(DEADLINE_S) == [0, 0], third.story()

    for copies in (tmp_path / "tiers").glob("host-0/orchestrator-*/*/process-00001"):
        shutil.rmtree(copies)
    with start(2, tmp_path, "fourth", steps=0) as fourth:
        for process in (0, 1):
            found = restored(fourth, process)
            assert found["step"] == 0 and found["sources"].keys() == {"store"}
            assert {line["step"] for line in fourth.said(process, "dropped")} == {newest, older}
        assert fourth.wait(DEADLINE_S) == [0, 0], fourth.story()


def test_what_a_zombie_would_hold_is_never_chosen(tmp_path: Path) -> None:
    with start(2, tmp_path, "zombie", steps=500, delay=0.1) as zombie:
        for process in (0, 1):
            zombie.wait_for(process, "held", DEADLINE_S, 2)
        for process in zombie.processes:
            os.kill(process.pid, signal.SIGSTOP)
        with start(2, tmp_path, "newer", steps=500, delay=0.1, hold=NEVER) as newer:
            chosen = restored(newer)["step"]
            newer.wait_for(0, "trained", DEADLINE_S)  # its epoch is open, and it holds nothing itself
            for process in zombie.processes:
                os.kill(process.pid, signal.SIGCONT)
            for process in (0, 1):
                zombie.wait_for(process, "not held", DEADLINE_S, text="fenced by epoch 2")
            for process in (0, 1):
                newer.kill(process)
        with start(2, tmp_path, "newest", steps=0) as newest:
            assert restored(newest)["step"] == chosen
            assert newest.wait(DEADLINE_S) == [0, 0], newest.story()


def test_held_steps_come_back_on_one_process_instead_of_two_and_on_another_mesh(tmp_path: Path) -> None:
    with start(2, tmp_path, "two", steps=500, delay=0.1, shared=1) as two:
        newest = held_by(two, 2)
    with start(1, tmp_path, "one", devices=2, steps=0, shared=1, mesh="1x2", spec="md") as one:
        found = restored(one)
        assert found["step"] >= newest and found["sources"].keys() == {"memory"}
        assert found["process_states"] == {str(host): f"host {host} at {found['step']}" for host in (0, 1)}
        assert one.wait(DEADLINE_S) == [0], one.story()
