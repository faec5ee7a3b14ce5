"""Parts of a state go from the staging thread to the writing threads, each exactly once, whatever the interleaving."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import pytest

from orchestrator.arrays.writing.part_queue import PartQueue
from orchestrator.arrays.writing.staging import Part
from orchestrator.errors import WaitTimeout


def staged(count: int = 1) -> list[Part]:
    return [(np.zeros(4, np.uint8), ())] * count


def test_a_part_added_and_the_end_told_between_two_looks_is_not_lost() -> None:
    feed = PartQueue(100)

    class Interleaved(deque[Any]):
        """The staging thread runs just after a writing thread has found nothing."""

        done = False

        def popleft(self) -> Any:
            if not self.done:
                self.done = True
                feed.add(staged())
                feed.end()
                raise IndexError
            return super().popleft()

    feed._parts = Interleaved()
    assert feed.take() is not None
    assert feed.take() is None


def test_every_part_is_taken_once_and_the_budget_is_kept() -> None:
    for limit in (8, 16, 1000):
        feed = PartQueue(limit)
        taken: list[object] = []

        def work(feed: PartQueue = feed, taken: list[object] = taken) -> None:
            while (found := feed.take()) is not None:
                taken.append(found)
                feed.written(found[0].nbytes)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            feed.wait_for_room(8, deadline=float("inf"))
            feed.add(staged(2))
        feed.end()
        for thread in threads:
            thread.join(10)
        assert len(taken) == 600
        assert feed.held_bytes == 0 and feed.peak_bytes <= limit


def test_waiting_for_room_ends_at_the_deadline_and_with_a_writers_error() -> None:
    feed = PartQueue(4)
    feed.add(staged())
    with pytest.raises(WaitTimeout, match="4 bytes of the state are not written yet, host_bytes_max is 4"):
        feed.wait_for_room(4, deadline=0.0)
    feed.end(OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        feed.wait_for_room(4, deadline=float("inf"))
