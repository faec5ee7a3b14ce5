"""What several hosts hold is read by one of them and exchanged: bit for bit, and each chunk once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import orchestrator as oc
from tests.processes import job

ARRAY_BYTES = 16 << 20  # of each of three arrays, in chunks of 4 MiB


def read_bytes(root: Path, process: int) -> int:
    """What a process's newest restore has read of arrays, by its own event."""
    lines = [json.loads(line) for line in (root / "events" / f"{process:05d}.jsonl").read_text().splitlines()]
    return int([line["read_bytes"] for line in lines if line["event"] == "Restored"][-1])


@pytest.mark.slow
def test_replicas_read_each_chunk_once_and_exchange_them_bit_for_bit(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with job(2, 2, root, tmp_path / "save", mesh="2x2", steps=1, heavy=1) as first:
        assert first.wait(120) == [0, 0], first.story()
    read: dict[str, list[int]] = {}
    for name, mesh, more in (("each", "2x2", {}), ("once", "2x2", {"once": 1}), ("wide", "4x1", {"once": 1})):
        with job(2, 2, root, tmp_path / name, mesh=mesh, steps=0, heavy=1, **more) as again:
            assert again.wait(120) == [0, 0], again.story()
            for process in range(2):
                (told,) = again.said(process, "restored")
                assert (told["step"], told["wrong"]) == (0, []), "every bit, NaNs and negative zeros too"
        read[name] = [read_bytes(root, process) for process in range(2)]
    small = 10_000  # what is too small to share
    assert all(3 * ARRAY_BYTES <= one < 3 * ARRAY_BYTES + small for one in read["each"]), "without it each reads all"
    assert all(1.5 * ARRAY_BYTES <= one < 1.5 * ARRAY_BYTES + small for one in read["once"]), "each chunk once"
    # One of the three was saved as 2 x 2 chunks: no dimension has one for each of four replicas, so each host reads it.
    assert all(2 * ARRAY_BYTES <= one < 2 * ARRAY_BYTES + small for one in read["wide"])


def test_it_does_not_go_with_comparing_fingerprints_after_a_restore() -> None:
    with pytest.raises(oc.UsageError, match="load_once: not with attest='full'"):
        oc.Options(load_once=True, attest="full")
