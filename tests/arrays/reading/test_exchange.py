"""What several hosts want is read by one of them and exchanged: bit for bit, on any mesh, and each chunk once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator import environment
from orchestrator.arrays.reading.local_store import LocalStore
from tests.support.processes import Job, job

pytestmark = pytest.mark.jobs

# Chunks of 4 MiB of three arrays, three of 1.4 MB, one of 2 MB.
SHARED_BYTES = (4 + 2 + 2) * (4 << 20) + 2 * 3 * 700_004 + 2_000_004
SMALL_BYTES = 10_000  # at most, of arrays that are too small to share


def read_bytes(root: Path, process: int) -> int:
    """What a process's newest restore has read of arrays, by its own event."""
    lines = [json.loads(line) for line in (root / "events" / f"{process:05d}.jsonl").read_text().splitlines()]
    return int([line["read_bytes"] for line in lines if line["event"] == "Restored"][-1])


def check_restored(running: Job, step: int) -> None:
    assert running.wait(120) == [0] * len(running.processes), running.story()
    for process in range(len(running.processes)):
        (told,) = running.said(process, "restored")
        assert (told["step"], told["wrong"]) == (step, []), "every bit, NaNs and negative zeros too"


def damage(state: Path, key: str) -> None:
    """One bit of one chunk."""
    places = LocalStore(str(state)).index()
    assert places is not None
    file, offset, _ = places[key]
    with (state / str(file)).open("r+b") as opened:
        opened.seek(int(offset) + 7)
        bits = opened.read(1)
        opened.seek(int(offset) + 7)
        opened.write(bytes([bits[0] ^ 1]))


def check_read_once(root: Path, processes: int) -> None:
    amount = [read_bytes(root, process) for process in range(processes)]
    assert SHARED_BYTES <= sum(amount) < SHARED_BYTES + processes * SMALL_BYTES, f"1.00x {amount}"
    assert max(amount) - min(amount) <= 4 << 20, f"evenly {amount}"


@pytest.mark.slow
def test_each_chunk_is_read_once_on_any_mesh_and_what_one_process_finds_stops_all(tmp_path: Path) -> None:
    root = tmp_path / "run"
    plain = {"mesh": "2x2", "heavy": 1, "timeout": 60}
    with job(2, 2, root, tmp_path / "save", steps=3, attest="save", **plain) as first:
        assert first.wait(120) == [0, 0], first.story()

    # By columns what was saved by rows, and in other ways.
    with job(2, 2, root, tmp_path / "each", turned=1, **plain) as each:
        check_restored(each, 2)
    amount = [read_bytes(root, process) for process in range(2)]
    assert all(SHARED_BYTES / 2 < one < SHARED_BYTES for one in amount), f"each reads more than it needs: {amount}"
    once = {**plain, "once": 1}
    with job(4, 1, root, tmp_path / "once", turned=1, part=1, group=16 << 20, **once) as of_four:
        check_restored(of_four, 2)
    check_read_once(root, 4)
    with job(2, 2, root, tmp_path / "swapped", turned=1, swap=1, **once) as swapped:
        assert swapped.wait(120) == [1, 1], "the proof is of the arrays after the exchange" + swapped.story()
    for process in range(2):
        text = swapped.said(process, "error")[0]["text"]
        assert "heavy: its fingerprint after restoring" in text and "the step is not damaged" in text
    with job(2, 2, root, tmp_path / "differ", turned=1, differ=1, **once) as differing:
        assert differing.wait(120) == [2, 2], differing.story()
    for process in range(2):
        assert "the processes ask for different arrays" in differing.said(process, "error")[0]["text"]

    environ = {environment.FAILPOINTS: "restore.read=stop@process=1"}
    with job(2, 2, root, tmp_path / "stopped", environ=environ, meet=4, **once) as stopped:
        (error,) = stopped.wait_for(0, "error", 60)
        assert "processes [1 (host-1)] did not arrive within 4 s" in error["text"], "before the first exchange"

    # One process cannot even begin to read: all stop, and none begins at an older step.
    environ = {environment.FAILPOINTS: "restore.read=error@process=1@nth=1"}
    with job(2, 2, root, tmp_path / "unread", environ=environ, **once) as unread:
        assert unread.wait(120) == [1, 1], unread.story()
    for process in range(2):
        text = unread.said(process, "error")[0]["text"]
        assert "cannot be read now" in text and "process 1 (host-1): failpoint restore.read=error" in text
    # One finds a chunk of the second group damaged; the step before is read as it was saved, replicas and all, and
    # proved.
    (state,) = root.glob("steps/00000002/*/state")
    damage(state, "heavy_bool/c/0/0")
    with job(2, 2, root, tmp_path / "damaged", attest="full", group=9 << 20, **once) as damaged:
        check_restored(damaged, 1)
    check_read_once(root, 2)
    events = [json.loads(line) for line in (root / "events" / "00000.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in events if line["event"] == "SteppedDown"]
    assert len(reasons) == 1 and "heavy_bool: chunk heavy_bool/c/0/0" in reasons[0]
