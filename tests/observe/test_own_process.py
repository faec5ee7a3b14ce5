"""A process that is asked about later: the kernel's word, or none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from orchestrator.observe import own_process
from orchestrator.observe.own_process import name_of, state_of

pytestmark = pytest.mark.skipif(not name_of(os.getpid()), reason="this kernel does not say what a process is")


def until(name: str, state: str) -> str:
    end = time.monotonic() + 10
    while state_of(name) != state and time.monotonic() < end:
        time.sleep(0.01)
    return state_of(name)


def test_a_process_is_here_stopped_or_ended_even_where_nobody_has_waited_for_it() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        name = name_of(child.pid)
        assert state_of(name) == "here"
        child.send_signal(signal.SIGSTOP)
        assert until(name, "stopped") == "stopped"
        child.send_signal(signal.SIGCONT)
        assert until(name, "here") == "here"
    finally:
        child.kill()
    assert until(name, "ended") == "ended", "a zombie"
    child.wait(10)
    assert state_of(name) == "ended"


def test_a_number_that_was_used_again_is_another_process() -> None:
    place, pid, started = name_of(os.getpid()).rsplit("/", 2)
    assert state_of(f"{place}/{pid}/{int(started) - 1}") == "ended"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "///",
        "1/2/3/4",
        "another-boot/4026531836/1/1",
        "a/b/c/d/e",
        "{place}/-1/5",
        "{place}/x/5",
        "{place}/0/5",
        "{place}/99999999999999999999/5",
        "{place}/٣/5",
    ],
)
def test_of_another_machine_or_of_nonsense_nothing_is_said(name: str) -> None:
    assert state_of(name.format(place=own_process._place())) == ""
