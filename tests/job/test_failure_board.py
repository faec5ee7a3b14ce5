"""What processes read of each other's ends on the board."""

from __future__ import annotations

import pytest

from orchestrator.job.failure_board import FailureBoard, ProcessFailure


class Shared:
    """The board of `process` of three, over one dictionary."""

    connected = True

    def __init__(self, process: int, posted: dict[str, str]) -> None:
        self.process, self.count, self.posted = process, 3, posted

    def post(self, key: str, value: str) -> None:
        self.posted[key] = value

    def poll(self, prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): value for key, value in self.posted.items() if key.startswith(prefix)}

    def skip_exit_barrier(self) -> None: ...


@pytest.fixture
def boards() -> list[FailureBoard]:
    posted: dict[str, str] = {}
    return [FailureBoard(Shared(process, posted)) for process in range(3)]


def test_a_failure_is_read_by_the_others_as_it_was_and_not_by_its_own_process(boards: list[FailureBoard]) -> None:
    failure = ProcessFailure(1, "host-1", "ValueError: \u00fc", 5, signum=2)
    boards[1].report(failure)
    assert [board.first_failure() for board in boards] == [failure, None, failure]


@pytest.mark.parametrize(
    "text", ["", "{", "3", "{}", '{"process": "x", "host": "", "text": "", "code": 1, "signum": 0}']
)
def test_what_is_no_failure_is_passed_over(text: str, boards: list[FailureBoard]) -> None:
    boards[0]._board.post("orchestrator/failed/0", text)
    assert boards[1].first_failure() is None
    boards[2].report(ProcessFailure(2, "host-2", "", 1))
    assert boards[1].first_failure() == ProcessFailure(2, "host-2", "", 1)


def test_who_is_on_the_way_to_the_end_is_told_apart_from_who_is_gone(boards: list[FailureBoard]) -> None:
    boards[0].leave()
    boards[1].acknowledge()
    boards[2].report(ProcessFailure(2, "host-2", "", 1))
    assert (boards[1].leaving(), boards[1].gone(), boards[1].ending()) == ({0}, set(), {0, 1, 2})
    boards[2].go()
    assert boards[0].gone() == {2} and boards[0].others == {1, 2}
