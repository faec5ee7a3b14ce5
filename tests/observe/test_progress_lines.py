"""Who sits at a terminal sees what is saved, once, and what is not."""

from __future__ import annotations

import logging as python_logging
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from absl import logging

import orchestrator as oc
from orchestrator.observe import progress_lines
from orchestrator.observe.events import (
    Closed,
    Event,
    RestorePhase,
    SaveCommitted,
    SaveNotCommitted,
    SaveStarted,
    StepRestored,
)
from orchestrator.observe.progress_lines import ProgressLines
from tests.support.runs import fill, now, state


def started(step: int) -> Event:
    return SaveStarted(step, "e0001-a01", 0.012)


def committed(step: int) -> Event:
    return SaveCommitted(step, "e0001-a01", 0.94, 1288490189)


def line(step: int, more: str = "", blocked: str = ", blocked 0.01 s") -> str:
    return f"saved step {step}{more}: 1.2 GiB in 0.9 s{blocked}"


def failed(step: int) -> Event:
    return SaveNotCommitted(step, "e0001-a01", "a reason")


def reading(mib: int, total: int) -> Event:
    return RestorePhase(90, "e0001-a01", "reading", float(mib), mib << 20, total)


def agreeing(total: int) -> Event:
    return RestorePhase(90, "e0001-a01", "agreeing", 22.0, total, total)


HINT = "save(..., force=True) saves the last"
# Seconds and events, and what is said.
TOLD: dict[str, tuple[list[tuple[float, Event]], list[str]]] = {
    "one save": ([(0, started(5)), (1, committed(5)), (2, Closed(0, 5))], [line(5)]),
    "committed before save returns": ([(1, committed(5)), (1, started(6))], [line(5, blocked="")]),
    "apart": ([(0, started(5)), (1, committed(5)), (2, started(6)), (2, committed(6))], [line(5), line(6)]),
    "close together": (
        [(each / 10, event(step)) for each, step in enumerate(range(20, 32)) for event in (started, committed)],
        [line(20), line(30, ", and 9 before it"), line(31)],
    ),
    "the rest at the end": (
        [(0, started(5)), (0, committed(5)), (0, started(6)), (0, committed(6)), (0, Closed(0, 6))],
        [line(5), line(6)],
    ),
    "the last steps": (
        [(0, started(90)), (1, committed(90)), (2, Closed(0, 99))],
        [line(90), f"steps 91 to 99 are not saved: the newest that is: 90; {HINT}"],
    ),
    "the last step": (
        [(0, started(90)), (1, committed(90)), (2, Closed(0, 91))],
        [line(90), f"step 91 is not saved: the newest that is: 90; {HINT}"],
    ),
    "after a restore": (
        [(0, StepRestored(90, "e0001-a01", 1.0, 1 << 20)), (2, Closed(0, 95))],
        ["restored step 90: 1.0 MiB in 1.0 s", f"steps 91 to 95 are not saved: the newest that is: 90; {HINT}"],
    ),
    "after a restore from memory: nobody has asked what the store has": (
        [(0, StepRestored(90, "e0001-a01", 1.0, 1 << 20, 0.5, "memory")), (2, Closed(0, 95))],
        ["restored step 90: 1.0 MiB from memory in 1.0 s"],
    ),
    "left by Ctrl-C while one is in flight": ([(0, started(5)), (2, Closed(0, 7))], []),
    "left by Ctrl-C after one that failed, which is a warning": (
        [(0, started(5)), (1, committed(5)), (1, started(6)), (2, failed(6)), (3, Closed(0, 6))],
        [line(5), f"step 6 is not saved: the newest that is: 5; {HINT}"],
    ),
    "a long restore": (
        [(at, reading(at, 1 << 30)) for at in (1, 5, 9, 11, 15, 21)] + [(22, agreeing(1 << 30)), (30, Closed(0))],
        [
            "restoring step 90: 11.0 MiB of 1.0 GiB, 1.0 MiB/s, 16 min 53 s left",
            "restoring step 90: 21.0 MiB of 1.0 GiB, 1.0 MiB/s, 16 min 43 s left",
        ],
    ),
    "a long restore of nobody knows how much": (
        [(at, reading(at, 0)) for at in (1, 12)] + [(22, agreeing(0))],
        ["restoring step 90: 12.0 MiB, 1.0 MiB/s"],
    ),
    "nothing at all": ([(2, Closed(0, 7))], [f"step 7 is not saved: no step is; {HINT}"]),
    "nothing to save": ([(2, Closed(0))], []),
    "failures, which are warnings": ([(2, Closed(1, 7))], []),
}


@pytest.mark.parametrize("case", TOLD)
def test_a_person_is_told_once_what_is_saved_and_what_is_not(case: str) -> None:
    said: list[str] = []
    now_s = 0.0
    lines = ProgressLines(said.append, lambda: now_s)
    for at_s, event in TOLD[case][0]:
        now_s = at_s
        lines.on_event(event)
    lines.close()
    lines.close()
    assert said == TOLD[case][1]


def test_agents_of_one_process_tell_it_once() -> None:
    said: list[str] = []
    first, second = ProgressLines(said.append), ProgressLines(said.append)
    first.on_event(committed(5))
    second.on_event(committed(5))
    first.close()
    second.on_event(committed(6))
    second.close()
    assert said == [line(5, blocked=""), line(6, blocked="")]


@pytest.mark.parametrize(
    ("progress", "process", "said"), [(True, 0, True), (False, 0, False), (None, 0, False), (True, 1, False)]
)
def test_process_0_tells_it_as_the_option_says_and_by_itself_on_a_terminal_only(
    progress: bool | None, process: int, said: bool
) -> None:
    assert progress_lines.wanted(progress, process) is said  # no terminal here


@pytest.fixture
def verbose() -> Iterator[python_logging.Logger]:
    """Absl at INFO, and no handler that a library has added on its way (`logging.warning` adds one to the root)."""
    logger, top = logging.get_absl_logger(), python_logging.getLogger()
    assert logger is not None
    before, handlers = logging.get_verbosity(), (logger.handlers, top.handlers)
    logging.set_verbosity(logging.INFO)
    logger.handlers, top.handlers = [], []
    yield logger
    logger.handlers, top.handlers = handlers
    logging.set_verbosity(before)


def test_what_the_log_shows_is_not_said_again(verbose: python_logging.Logger) -> None:
    assert not progress_lines.shown_by_log()  # nobody shows it
    handler = python_logging.StreamHandler(sys.stderr)
    verbose.addHandler(handler)
    try:
        assert progress_lines.shown_by_log()
        handler.setLevel(python_logging.WARNING)
        assert not progress_lines.shown_by_log()
        handler.setLevel(python_logging.NOTSET)
        logging.set_verbosity(logging.WARNING)
        assert not progress_lines.shown_by_log()
    finally:
        verbose.removeHandler(handler)


def test_an_agent_says_it_on_standard_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with oc.Agent(root, save=oc.every(2), options=now(progress=True)) as agent:
        for step in (0, 1):
            agent.save(step, state(step))
    saved, left = capsys.readouterr().err.splitlines()
    assert saved.startswith("saved step 0: ") and left.startswith("step 1 is not saved: the newest that is: 0; ")
    fill(root, 3)
    assert capsys.readouterr().err == ""  # no terminal, and not asked for


ON_A_TERMINAL = """
import sys, numpy as np
from absl import logging
import orchestrator as oc
for step in (0, 1):
    with oc.Agent(sys.argv[1]) as agent:
        agent.save(step, {"w": np.ones(4)})
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
"""


def test_on_a_terminal_it_is_said_without_an_option_unless_absl_logs_it_there(root: Path) -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        subprocess.run(
            [sys.executable, "-c", ON_A_TERMINAL, root],
            stderr=theirs,
            stdin=subprocess.DEVNULL,
            check=True,
            timeout=120,
        )
        os.close(theirs)
        text = terminal.read(65536).decode()
    assert text.count("saved step 0: ") == 1 and "saved step 1" not in text and text.count(" Committed step=1 ") == 1
