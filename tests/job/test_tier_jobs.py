"""Jobs of several processes that come back from memory: each simulated host has a tier of its own."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestrator.rules import keys
from orchestrator.rules.codec import decode
from orchestrator.rules.placement import Placement
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


def tier_of(tmp_path: Path, process: int) -> Path:
    (path,) = (tmp_path / "tiers").glob(f"host-{process}/orchestrator-*/*/process-{process:05d}")
    return path


def in_log(tmp_path: Path, process: int) -> list[int]:
    """The steps that are held, by its log; on a slow machine some that were due are not."""
    return [live.step for live in store_of(tier_of(tmp_path, process)).require_head().live]


def restored(running: Job, process: int = 0) -> dict[str, Any]:
    (found,) = running.wait_for(process, "restored", DEADLINE_S)
    assert found["wrong"] == [], running.story()
    return found


def server_of(running: Job, process: int) -> int:
    """The id of the tier server that a process has started."""
    pid = running.processes[process].pid
    children = [int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()]
    return next(child for child in children if b"tier_server" in Path(f"/proc/{child}/cmdline").read_bytes())


def held_by(running: Job, at_least: int) -> int:
    """Run on until all hold so many steps, and kill all at once; the newest step that was held by then, as process 0
    has said."""
    for process in range(len(running.processes)):
        running.wait_for(process, "held", DEADLINE_S, at_least)
    for process in range(len(running.processes)):
        running.kill(process)
    running.wait(DEADLINE_S)
    return max(line["step"] for line in running.said(0, "held"))


def test_a_job_that_loses_a_host_with_its_memory_comes_back_from_its_neighbours_bit_for_bit(tmp_path: Path) -> None:
    """Four hosts, one copy of each part. A tier server dies and is started again. Host 0 is lost, with process 0's part
    and log, and a bit of another host has flipped; then both hosts that have a part are lost."""
    with start(4, tmp_path, "first", devices=1, steps=500, delay=0.1) as first:
        first.wait_for(0, "held", DEADLINE_S)
        os.kill(server_of(first, 2), signal.SIGKILL)  # a peer that does not answer
        (failed, *_) = first.wait_for(0, "not held", DEADLINE_S, text="host-2")
        first.wait_for(
            0, "trained", DEADLINE_S, text=f'"step": {failed["step"] + 1},'
        )  # training goes on, and it is back
        held = len(first.said(0, "held"))
        surely = held_by(first, held + 2)
        for line in first.said(1, "held"):
            assert line["copies"] == 1 and line["sent_bytes"] > 30_000, line
    newest = max(in_log(tmp_path, 1))
    assert newest >= surely
    placed = decode((tier_of(tmp_path, 1) / keys.PLACEMENT).read_bytes(), Placement, "placement.json")
    assert placed.survives == "any one host" and [len(host.targets) for host in placed.hosts] == [1] * len(placed.hosts)

    shutil.rmtree(tmp_path / "tiers/host-0")
    (flipped, *_) = data_files(tmp_path, 1, newest)
    body = bytearray(flipped.read_bytes())
    body[len(body) // 3] ^= 4
    flipped.write_bytes(body)
    with start(4, tmp_path, "second", devices=1, steps=0) as second:
        for process in range(4):
            found = restored(second, process)
            assert found["step"] == newest and found["sources"].keys() <= {"memory", "peers"}, second.story()
            assert found["process_states"] == {str(one): f"host {one} at {newest}" for one in range(4)}
            if process == 0:
                assert found["sources"].keys() == {"peers"}, found
        assert any(flipped.name in line["file"] for line in second.said(1, "copy dropped")), second.story()
        assert second.wait(DEADLINE_S) == [0] * 4, second.story()

    lost = {2, *placed.hosts[2].targets}
    for host in lost:
        shutil.rmtree(tmp_path / f"tiers/host-{host}")
    with start(4, tmp_path, "third", devices=1, steps=0) as third:
        for process in range(4):
            found = restored(third, process)
            assert found["step"] == 0 and found["sources"].keys() == {"store"}
        assert newest in {line["step"] for process in range(4) for line in third.said(process, "dropped")}
        assert third.wait(DEADLINE_S) == [0] * 4, third.story()


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


def bytes_on(host: Path) -> int:
    """What its tier takes now, each file once."""
    total = 0.0
    for folder, _, names in os.walk(host):
        for name in names:
            with suppress(OSError):
                found = os.stat(os.path.join(folder, name))
                total += found.st_size / max(1, found.st_nlink)
    return int(total)


# A step takes 47 MB on each host: two parts, and two copies of the other's.
@pytest.mark.parametrize(("room", "held_least"), [(105_000_000, 4), (60_000_000, 1), (30_000_000, 0)])
def test_a_host_with_several_processes_and_copies_holds_no_more_than_it_may(
    room: int, held_least: int, tmp_path: Path
) -> None:
    most = {host: 0 for host in ("host-0", "host-1")}
    with start(4, tmp_path, "job", devices=1, hosts=2, heavy=1, every=4, steps=12, delay=0.2, room=room) as running:
        while any(process.poll() is None for process in running.processes):
            most = {host: max(before, bytes_on(tmp_path / "tiers" / host)) for host, before in most.items()}
            time.sleep(0.01)
        assert running.wait(DEADLINE_S) == [0] * 4, running.story()
        held = [line["step"] for line in running.said(0, "held")]
        reasons = [line["reason"] for line in running.said(0, "not held")]
        for process in range(4):
            (done,) = running.said(process, "done")
            assert done["steps"] == [0, 4, 8] and done["failures"] == 0, running.story()
    assert max(most.values()) <= room
    assert len(held) >= held_least and (held_least > 1 or max(held, default=0) == 0), reasons
    if held_least < 4:
        assert any("no room in memory on host-" in one and f"of the {room} of bytes_max" in one for one in reasons)
