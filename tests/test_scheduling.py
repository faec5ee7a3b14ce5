"""The run of the tests ends, and says so, whatever becomes of the processes that run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.scheduling import LIMIT_NAME, LONGEST

REPO = Path(__file__).parents[1]
PYTEST = "-q -rA -p tests.support.scheduling -p no:cacheprovider --import-mode=importlib --dist=loadfile"
DYING = {
    "test_first.py": "test_a = lambda: os.kill(os.getpid(), 9)\ntest_b = lambda: None",
    "test_hung.py": """
        test_a = lambda: None
        test_b = lambda: ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock
        test_c = lambda: None
    """,
    "test_last.py": "test_a = lambda: None\ntest_b = lambda: os.kill(os.getpid(), 11)",
    "test_only.py": "test_a = lambda: os._exit(0)",
    "test_whole.py": "test_a = lambda: None\ntest_b = lambda: None",
}


def _pytest(folder: Path, files: dict[str, str], *words: str, **environ: str) -> tuple[int, str]:
    for name, text in files.items():
        (folder / name).write_text("import ctypes, os\n" + textwrap.dedent(text))
    environ = {**os.environ, "PYTHONPATH": str(REPO), **environ}
    command = [sys.executable, "-m", "pytest", *PYTEST.split(), *words, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


def test_each_worker_that_dies_costs_its_test_and_no_other(tmp_path: Path) -> None:
    limits = ("-o", "faulthandler_timeout=5", "-o", "faulthandler_exit_on_timeout=true")
    code, text = _pytest(tmp_path, DYING, "-n2", *limits)
    ended = {outcome: set(re.findall(rf"^{outcome} (\S+)", text, re.M)) for outcome in ("PASSED", "FAILED")}
    dead = {"test_first.py::test_a", "test_hung.py::test_b", "test_last.py::test_b", "test_only.py::test_a"}
    everything = {f"{file}::{test}" for file, body in DYING.items() for test in re.findall(r"test_\w(?= =)", body)}
    assert (code, ended["FAILED"], ended["PASSED"]) == (1, dead, everything - dead), text
    assert "Timeout (0:00:05)!" in text and "test_hung.py" in text  # where it hung


def test_the_one_test_that_a_dead_worker_had_left_is_run_by_the_next(tmp_path: Path) -> None:
    """And the files after it: a worker runs nothing until it knows what comes next."""
    code, text = _pytest(tmp_path, {name: DYING[name] for name in ("test_first.py", "test_whole.py")}, "-n1")
    assert code == 1 and "1 failed, 3 passed" in text, text


def test_a_run_that_does_not_end_is_ended_with_a_word_on_who_runs_what(tmp_path: Path) -> None:
    files = {"test_hung.py": DYING["test_hung.py"], "test_good.py": "test_a = lambda: None"}
    code, text = _pytest(tmp_path, files, "-n2", **{LIMIT_NAME: "15"})
    assert code == 1 and f"have not ended in 15 s ({LIMIT_NAME})" in text, text
    assert re.search(r"gw\d \(process \d+\): test_hung.py::test_b", text)
    assert "Fatal Python error: Aborted" in text


def test_the_files_that_are_run_first_are_there() -> None:
    assert [name for name in LONGEST if not (REPO / "tests" / name).exists()] == []


def test_no_test_has_more_time_than_its_process(request: pytest.FixtureRequest) -> None:
    most = float(request.config.getini("faulthandler_timeout"))
    given = {
        (str(path), int(seconds))
        for path in (REPO / "tests").rglob("test_*.py")
        for seconds in re.findall(r"mark\.timeout\((\d+)\)", path.read_text())
    }
    alone = "test_image.py"  # `make test-image` gives it more
    assert given and [one for one in given if one[1] >= most and not one[0].endswith(alone)] == []
    assert float(request.config.getini("timeout")) < most
