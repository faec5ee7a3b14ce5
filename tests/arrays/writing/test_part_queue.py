"""Parts of a state go from the staging thread to the writing threads, each exactly once, whatever the interleaving."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest

from orchestrator.arrays.writing.part_queue import PartQueue
from orchestrator.arrays.writing.staging import StagedPart
from orchestrator.errors import StorageError, WaitTimeout


def staged(count: int = 1) -> list[StagedPart]:
    return [(np.zeros(4, np.uint8), ())] * count


def test_writers_that_wait_are_woken_by_a_part_and_by_the_end() -> None:
    queue, taken = PartQueue(100), list[Any]()
    threads = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(3)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    queue.add(staged(2))
    queue.end()
    for thread in threads:
        thread.join(10)
    assert sum(part is not None for part in taken) == 2 and taken.count(None) == 1
    assert time.monotonic() - started < 0.4, "they were not woken, but looked by themselves"


def test_what_was_added_before_the_end_is_still_taken() -> None:
    for queue in (PartQueue(100), PartQueue()):
        queue.add(staged(2))
        assert queue.waiting_bytes == 8
        queue.end()
        assert [queue.take() is not None for _ in range(3)] == [True, True, False]
        assert queue.waiting_bytes == 0


def test_every_part_is_taken_once_and_the_budget_is_kept() -> None:
    for limit in (8, 16, 1000):
        queue = PartQueue(limit)
        taken: list[object] = []

        def work(queue: PartQueue = queue, taken: list[object] = taken) -> None:
            while (found := queue.take()) is not None:
                taken.append(found)
                queue.written(found[0].nbytes)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            queue.wait_for_room(8, deadline=float("inf"))
            queue.add(staged(2))
        queue.end()
        for thread in threads:
            thread.join(10)
        assert len(taken) == 600
        assert queue.held_bytes == 0 and queue.peak_bytes <= limit


def test_waiting_for_room_ends_when_the_write_is_given_up() -> None:
    queue = PartQueue(4)
    queue.add(staged())
    threading.Timer(0.1, queue.end).start()
    with pytest.raises(StorageError, match="given up"):
        queue.wait_for_room(4, deadline=time.monotonic() + 30)


def test_waiting_for_room_ends_at_the_deadline_and_with_a_writers_error() -> None:
    queue = PartQueue(4)
    queue.add(staged())
    with pytest.raises(WaitTimeout, match="4 bytes of the state are not written yet, host_bytes_max is 4"):
        queue.wait_for_room(4, deadline=0.0)
    queue.end(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        queue.wait_for_room(4, deadline=float("inf"))
