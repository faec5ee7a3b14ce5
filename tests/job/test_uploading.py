"""How long a process that has saved its part waits for others, who upload theirs from memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import WaitTimeout
from orchestrator.job.decision import DecisionReader
from orchestrator.job.outcome import Aborted, Committed, Outcome
from orchestrator.job.poll import Clock
from orchestrator.job.signals import Signals
from orchestrator.job.uploading import Upholding, Uploads
from orchestrator.rules.attempt_id import AttemptId
from tests.support.builders import FIRST
from tests.support.fakes import FakeBoard, StepClock
from tests.support.runs import two_steps

ATTEMPT = AttemptId(3, FIRST)
TIMEOUT_S = 60.0


class Uploader(StepClock):
    """Process 0, beside whose upload time passes: until `until_s` it says that it goes on."""

    def __init__(self, board: FakeBoard, until_s: float, ended: Outcome | None) -> None:
        super().__init__()
        self.board, self.until_s, self.ended, self.began_s = board, until_s, ended, self.now_s

    @property
    def passed_s(self) -> float:
        return self.now_s - self.began_s

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        process_0 = Signals(self.board, "i")
        self.board.process = 0
        if self.passed_s < self.until_s:
            process_0.post_uploading(ATTEMPT, int(self.passed_s / 5.0) + 1)
        elif self.ended:
            process_0.post_decision(ATTEMPT, self.ended)
        self.board.process = 1


@pytest.mark.parametrize(
    ("until_s", "ended", "within_s"),
    [
        pytest.param(20.0, Committed(), 21.0, id="quicker than a save"),
        pytest.param(500.0, Committed(), 501.0, id="slower"),
        pytest.param(500.0, Aborted("the disk is full"), 501.0, id="slower, and in vain"),
        pytest.param(500.0, None, 500.0 + 33.0, id="it is stopped"),
        pytest.param(20.0, None, TIMEOUT_S + 33.0, id="it was stopped before anybody asked"),
        pytest.param(0.0, None, TIMEOUT_S + 1.0, id="it does not upload"),
    ],
)
def test_who_uploads_is_waited_for_as_long_as_it_says_so(
    until_s: float, ended: Outcome | None, within_s: float, tmp_path: Path
) -> None:
    board = FakeBoard(1, 2)
    clock = Uploader(board, until_s, ended)
    signals = Signals(board, "i")
    uploads = Uploads(signals, ATTEMPT, 2, clock.clock)
    reader = DecisionReader(ATTEMPT, 1, two_steps(tmp_path), signals, board.hosts, clock.clock)

    def wait() -> Outcome:
        return reader.wait(TIMEOUT_S, lambda: None, longer=lambda: bool(uploads.going_on()))

    if ended:
        assert wait() == ended
    else:
        with pytest.raises(WaitTimeout, match="no decision from the coordinator") as caught:
            wait()
        assert f"after {clock.passed_s:g}"[:9] in str(caught.value)
    assert max(until_s, min(TIMEOUT_S, within_s - 1)) <= clock.passed_s <= within_s


def test_what_makes_no_sense_says_nothing() -> None:
    board, clock = FakeBoard(1, 3), StepClock()
    uploads = Uploads(Signals(board, "i"), ATTEMPT, 3, clock.clock)
    prefix = f"orchestrator/i/{ATTEMPT.step}/{ATTEMPT.name}/uploading/"
    for name, text in {"0": "yes", "1": "-4", "7": "1", "two": "1", "02": "1"}.items():
        board.post(prefix + name, text)
    assert uploads.going_on() == []
    board.post(prefix + "2", "1")
    assert uploads.going_on() == [2]


def test_it_is_said_rarely_and_not_before_anybody_asks() -> None:
    board = FakeBoard(0, 2)
    upholding = Upholding(Signals(board, "i"), ATTEMPT, 2, time.monotonic() + 0.2)
    upholding.say()
    assert not board.posted
    time.sleep(0.25)
    for _ in range(1000):
        upholding.say()
    assert [*board.posted.values()] == ["1"]


@pytest.mark.parametrize(("count", "more"), [(2, 1), (100_000, 40)])
def test_in_large_jobs_it_is_said_more_rarely_and_believed_for_longer(count: int, more: int) -> None:
    """200 seconds between two of them, and 500 messages a second of all."""
    board, clock = FakeBoard(1, count), StepClock()
    uploads = Uploads(Signals(board, "i"), ATTEMPT, count, Clock(lambda: clock.now_s, clock.sleep))
    going: Callable[[], bool] = lambda: uploads.going_on() == [0]  # noqa: E731
    board.process = 0
    Signals(board, "i").post_uploading(ATTEMPT, 1)
    board.process = 1
    assert going()
    clock.sleep(29.0 * more)
    assert going()
    clock.sleep(2.0 * more)
    assert not going()
