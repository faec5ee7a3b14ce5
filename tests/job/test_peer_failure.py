"""What ends one process of a job, all hear of within seconds, with its host, its words and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

import orchestrator as oc
from tests.support.processes import free_port

REPO = Path(__file__).parents[2]
FAILING_JOB = REPO / "tests" / "support" / "jobs" / "failing_job.py"
LEAVING_JOB = REPO / "tests" / "support" / "jobs" / "leaving_job.py"
ENVIRON = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""}
DEADLINE_S = 120.0
ROWS_AT_ONCE = 6
BUG = "ValueError: user's bug"
ANY = -1


class Row(NamedTuple):
    """What the processes do; the codes that they must end with; what all but `fails` must say of that one, and nobody
    if it is None. `fails` ANY: who is first is said by those that are later."""

    does: tuple[str, ...]
    codes: tuple[int, ...]
    said: str | None = None
    fails: int = 1


ROWS = {
    # An exception that nothing catches, on the last process and on the one that holds the board.
    "exception": Row(("hang", "raises"), (1, 1), BUG),
    "exception on process 0": Row(("raises", "hang", "hang"), (1, 1, 1), BUG, 0),
    "exception outside of the block": Row(("hang", "raises-after", "hang"), (1, 1, 1), BUG),
    "fenced": Row(("hang", "fenced"), (5, 5), "Fenced: fenced by epoch 2"),
    "fenced on process 0": Row(("fenced", "hang"), (5, 5), "Fenced: fenced by epoch 2", 0),
    "nothing to restore": Row(("hang", "nothing"), (6, 6), "NothingToRestore: no step is left"),
    "an error of ours without a code of its own": Row(
        ("hang", "save-failed"), (1, 1), "SaveFailed: step 3 was not saved"
    ),
    "Ctrl-C": Row(("hang", "interrupted"), (130, -2), "KeyboardInterrupt"),
    "the same on all": Row(("fenced", "fenced", "fenced"), (5, 5, 5), "Fenced", ANY),
    # sys.exit.
    "sys.exit(3)": Row(("hang", "exits-3"), (3, 3), "sys.exit(3)"),
    "sys.exit(3) on process 0": Row(("exits-3", "hang"), (3, 3), "sys.exit(3)", 0),
    "sys.exit(3) outside of the block": Row(("hang", "exits-3-after"), (3, 3), "sys.exit(3)"),
    "sys.exit with a text": Row(("hang", "exits-text"), (1, 1), "sys.exit('no data')"),
    "raise SystemExit(3)": Row(("hang", "system-exit-3"), (3, 3), "sys.exit(3)"),
    "an exception that was caught, then sys.exit(4)": Row(
        ("hang", "swallows-and-exits"), (4, 4), f"{BUG}; then sys.exit(4)"
    ),
    "sys.exit(75) on all": Row(("exits-75", "exits-75"), (75, 75)),
    "sys.exit(75), on one earlier": Row(("ends-late", "exits-75"), (0, 75)),
    # The end of a program, which others may outlive.
    "the end": Row(("ends", "ends", "ends"), (0, 0, 0)),
    "the end, on one earlier": Row(("exits-0", "ends-late"), (0, 0)),
    "an exception that was caught, on all": Row(("swallows", "swallows"), (0, 0)),
    "an exception that was caught, and all have met": Row(("ends-late", "swallows-and-meets"), (0, 0)),
    "an exception that was only shown": Row(("ends-late", "shows"), (0, 0)),
    "sys.exit(3) in a forked child": Row(("ends-late", "forks"), (0, 0)),
    "the end on one, an exception on the other": Row(("ends", "raises"), (0, 1), BUG),
    "an exception that was caught, on one alone": Row(("hang", "swallows"), (1, 0), BUG),
    # What must not hold anybody up for ever, and what may.
    "a save in flight": Row(("saves", "raises"), (1, 1), BUG),
    "a save that does not end": Row(("saves-for-ever", "raises"), (1, 1), BUG),
    "threads that do not end": Row(("hang", "has-threads"), (1, 1), BUG),
    "an exit handler that does not end": Row(("hang", "handler-hangs"), (1, 1), BUG),
    "one that stays": Row(("stays", "raises"), (0, 1), BUG),
    "a notebook": Row(("interactive", "raises"), (0, 1), BUG),
    "an exception in a notebook": Row(("ends-late", "interactive"), (0, 0)),
    # Alone: only errors of ours have codes of their own.
    "fenced, alone": Row(("fenced",), (5,)),
    "an exception, alone": Row(("raises",), (1,)),
    "sys.exit(3), alone": Row(("exits-3",), (3,)),
    "Ctrl-C, alone": Row(("interrupted",), (-2,)),
}
TRACEBACKS = {
    "raises": BUG,
    "raises-after": BUG,
    "fenced": "Fenced: fenced by epoch 2",
    "interrupted": "KeyboardInterrupt",
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ended]]:
    """How every row went. A few at once, since they mostly wait; more of them starve each other on two cores."""
    boards = {name: tmp_path_factory.mktemp("board") for name in ROWS}
    with ThreadPoolExecutor(ROWS_AT_ONCE) as pool:
        return dict(zip(ROWS, pool.map(lambda name: played(ROWS[name], boards[name]), ROWS), strict=True))


def played(row: Row, board: Path) -> list[Ended]:
    command = [sys.executable, LEAVING_JOB]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(len(row.does)), board, how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRON,
        )
        for index, how in enumerate(row.does)
    ]
    until = time.monotonic() + DEADLINE_S
    try:
        return [
            Ended(process.returncode, out, err)
            for process in processes
            for out, err in [process.communicate(timeout=max(1.0, until - time.monotonic()))]
        ]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


@pytest.mark.parametrize("name", ROWS)
def test_all_processes_end_with_the_right_code_and_say_who_failed_and_why(
    name: str, ended: dict[str, list[Ended]]
) -> None:
    row, processes = ROWS[name], ended[name]
    assert tuple(process.code for process in processes) == row.codes, processes
    for index, (how, process) in enumerate(zip(row.does, processes, strict=True)):
        assert "timed out" not in process.out and "aborted" not in process.out
        assert process.out.startswith("begins\n")  # nothing that was printed is lost
        line = f"orchestrator: process {row.fails} (host-{row.fails}) has failed: {row.said}"
        told = [text for text in process.err.splitlines() if text.startswith("orchestrator: ")]
        if row.fails == ANY:
            assert all(f") has failed: {row.said}" in text for text in told) and len(told) <= 1
        elif row.said is None or index == row.fails:
            assert told == []
        else:
            assert len(told) == 1 and told[0].startswith(line), process.err
        if how in TRACEBACKS:
            assert TRACEBACKS[how] in process.err
            # Ctrl-C reaches all: process 0's traceback is enough.
            assert ("Traceback" in process.err) == (how != "interrupted" or index == 0), process.err


@pytest.mark.parametrize("name", [name for name in ROWS if name != "an exit handler that does not end"])
def test_the_programs_own_exit_handlers_run_once_in_their_order(name: str, ended: dict[str, list[Ended]]) -> None:
    for process in ended[name]:
        handlers = [line for line in process.out.splitlines() if line.endswith(" handler")]
        times = 2 if "ends" in process.out and len(handlers) > 2 and "fork" in name else 1  # the child has them, too
        assert handlers == ["last handler", "first handler"] * times, process


def test_a_save_in_flight_is_let_end_and_said(ended: dict[str, list[Ended]]) -> None:
    saver = ended["a save in flight"][0]
    assert "saved" in saver.out
    assert "once step 7 is saved, in 30 s at most" in saver.err


# With JAX.


@pytest.mark.jobs
def test_a_fenced_host_ends_a_supervised_job_for_good_and_its_last_save_is_committed(tmp_path: Path) -> None:
    """Its survivor sits in a collective. Before, the supervisor saw SIGABRT after 301 s, and restarted."""
    flags = ["--processes", "2", "--max_restarts", "3"]
    command = [sys.executable, FAILING_JOB, tmp_path / "run", "1", "collective"]
    job = subprocess.run(
        [sys.executable, "-m", "launch", "local", *flags, "--", *command],
        cwd=REPO,
        env=ENVIRON,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=DEADLINE_S,
    )
    assert job.returncode == 5, job.stdout
    assert "[host-1] orchestrator.errors.Fenced: fenced by epoch 9" in job.stdout
    assert "[launch] restart" not in job.stdout and "Terminating process" not in job.stdout  # as JAX's abort says
    assert oc.open_run(tmp_path / "run").latest_step() == 4


@pytest.mark.jobs
def test_process_0_ends_others_in_a_barrier_and_asleep_without_a_launcher(tmp_path: Path) -> None:
    """By a SystemExit, of which only the agent's block hears. Process 0 holds the coordination service: were it first,
    JAX would abort the others at once and say nothing of why."""
    given = ["3", str(free_port())]
    running = [
        subprocess.Popen(
            [sys.executable, FAILING_JOB, tmp_path / "run", "0", "apart", str(index), *given],
            env={**ENVIRON, "ORCHESTRATOR_HOST_NAME": f"host-{index}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(3)
    ]
    try:
        outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait(10)
    assert [process.returncode for process in running] == [3, 3, 3], outputs
    assert "orchestrator: " not in outputs[0]
    for index in (1, 2):
        said = f"orchestrator: process 0 (host-0) has failed: sys.exit(3); process {index} (host-{index}) ends with it"
        assert outputs[index].count(said) == 1, outputs[index]
        assert "Terminating process" not in outputs[index]
    assert oc.open_run(tmp_path / "run").latest_step() == 4
