"""A bar says how far a long work has come, in one place, and leaves no trace."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding

import orchestrator as oc
from orchestrator import arrays
from orchestrator.job.read_step import ArrayReads, ReadOptions, match_target, read_step
from orchestrator.observe import events
from orchestrator.observe.bar import Bar, Pace, drawn
from tests.support.runs import now, store_of

MIB = 1 << 20
# What was reported at which second, of how much; and what is said then.
PACES: dict[str, tuple[str, list[tuple[float, int]], int | None, str]] = {
    "at the start": ("bytes", [], 10 * MIB, "0 B of 10.0 MiB"),
    "too early to tell": ("bytes", [(0.1, MIB)], 10 * MIB, "1.0 MiB of 10.0 MiB"),
    "steadily": ("bytes", [(1, MIB), (2, 2 * MIB)], 10 * MIB, "2.0 MiB of 10.0 MiB, 1.0 MiB/s, 8 s left"),
    "minutes": ("bytes", [(1, MIB), (2, 2 * MIB)], 302 * MIB, "2.0 MiB of 302.0 MiB, 1.0 MiB/s, 5 min left"),
    "slower lately": (
        *("bytes", [(each, each * 100 * MIB) for each in range(1, 11)] + [(21, 1011 * MIB)], 2000 * MIB),
        "1011.0 MiB of 2.0 GiB, 1.0 MiB/s, 16 min 29 s left",
    ),
    "it stands": ("bytes", [(1, MIB), (11, MIB), (21, MIB)], 2 * MIB, "1.0 MiB of 2.0 MiB"),
    "more than there is": ("bytes", [(1, MIB), (2, 3 * MIB)], 2 * MIB, "2.0 MiB of 2.0 MiB, 1.0 MiB/s, 1 s left"),
    "of nobody knows how much": ("bytes", [(1, MIB)], None, "1.0 MiB, 1.0 MiB/s"),
    "items": ("items", [(1, 3)], 12, "3 of 12, 3/s, 3 s left"),
}


@pytest.mark.parametrize("case", PACES)
def test_a_pace_is_said_in_words_as_it_is_lately(case: str) -> None:
    unit, reached, total, said = PACES[case]
    now_s = 0.0
    pace = Pace(unit, total, lambda: now_s)  # type: ignore[arg-type]
    for now_s, done in reached:  # noqa: B007 - the clock reads it
        pace.reach(done, total)
    assert str(pace) == said


def test_a_bar_shows_the_share_where_it_is_known() -> None:
    pace = Pace("bytes", 4 * MIB)
    pace.reach(MIB, 4 * MIB)
    assert drawn("step 3", pace) == "step 3  [######------------------]  25%  1.0 MiB of 4.0 MiB"
    pace.reach(MIB, None)
    assert drawn("step 3", pace) == "step 3  1.0 MiB"


def test_a_bar_is_drawn_in_its_place_and_is_gone_afterwards(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("step \x1b[3", 4) as bar:
        bar.add(1)
    text = capsys.readouterr().err
    assert text.startswith("\rstep \\x1b[3  [") and "\n" not in text and "\x1b" not in text
    assert text.split("\r")[2] == " " * len(text.split("\r")[1]) and text.endswith("\r")
    with Bar("step 3", 4, shown=False) as bar:
        bar.add(1)
    assert capsys.readouterr().err == ""


STATES: dict[str, Any] = {
    "one array": {"w": np.ones((512, 600), np.float32)},
    "small ones": {f"w{number:04}": np.ones(3, np.float32) for number in range(300)},
    "both, and numbers": {"w": np.ones((512, 600), np.float32), "b": np.ones(7, np.int8), "n": 3, "s": "x"},
    "nothing in a file": {"n": 3},
}


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_what_a_restore_reads_is_what_it_was_going_to_read(root: Path, state: str, compression: bool) -> None:
    with oc.Agent(root, options=now(compression=compression)) as agent:
        agent.save(1, STATES[state])
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    plan = match_target(store.step(live), STATES[state], ReadOptions())
    reads = ArrayReads()
    read_step(store, live, STATES[state], ReadOptions(), reads)
    assert reads.read_bytes == arrays.bytes_to_read(plan.requests)


def test_a_restore_is_to_read_only_what_this_process_s_devices_need(root: Path) -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("x",))
    whole = {"w": jnp.ones((len(jax.devices()) * 1024, 4))}
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, whole)
    store = store_of(root)
    live = store.find(1)
    assert live is not None
    for sharding in (SingleDeviceSharding(jax.devices()[0]), jax.NamedSharding(mesh, PartitionSpec("x"))):
        like = {"w": jax.ShapeDtypeStruct(whole["w"].shape, whole["w"].dtype, sharding=sharding)}
        plan, reads = match_target(store.step(live), like, ReadOptions()), ArrayReads()
        read_step(store, live, like, ReadOptions(), reads)
        assert reads.read_bytes == arrays.bytes_to_read(plan.requests) == whole["w"].nbytes


def test_a_long_restore_reports_how_far_it_is_and_a_short_one_does_not(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{number}": np.ones((1 << 20,), np.float32) for number in range(8)}
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, state)
    told: list[events.RestorePhase] = []
    stop = events.subscribe(lambda event: told.append(event) if isinstance(event, events.RestorePhase) else None)
    try:
        oc.open_run(root).restore(state)
        assert told == []
        monkeypatch.setattr("orchestrator.job.read_step.REPORT_S", 0.0)
        with oc.Agent(root) as agent:
            agent.restore(state)
    finally:
        stop()
    *reading, last = told
    assert {one.phase for one in reading} == {"reading"} and last.phase == "agreeing"
    assert [one.read_bytes for one in reading] == sorted(one.read_bytes for one in reading)
    assert {one.total_bytes for one in told} == {8 << 22} and last.read_bytes == 8 << 22


READER = """
import signal, sys
import orchestrator as oc
from orchestrator.job import read_step
from orchestrator.observe import events
read_step.REPORT_S = 0.0
oc.open_run(sys.argv[1], progress=False).restore()
print("then", file=sys.stderr)
oc.open_run(sys.argv[1]).restore()
told = []
events.subscribe(lambda event: told.append(event) or len(told) < 3 or signal.raise_signal(signal.SIGINT))
oc.open_run(sys.argv[1]).restore()
"""


def test_a_reader_at_a_terminal_sees_a_bar_and_what_comes_next_begins_a_line(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        agent.save(1, {f"w{number}": np.ones((1 << 20,), np.float32) for number in range(8)})
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        plain = {**os.environ, "PYTHON_COLORS": "0"}  # Python 3.13 colours tracebacks
        command = [sys.executable, "-c", READER, root]
        subprocess.run(command, stderr=theirs, stdin=subprocess.DEVNULL, timeout=120, env=plain)
        os.close(theirs)
        text = terminal.read(65536).decode()
    before, _, after = text.partition("then\r\n")
    assert "restoring" not in before
    whole, interrupted, end = after.split("\rrestoring step 1  [")
    assert whole == "" and interrupted.count("\r") == 2  # drawn once, and made blank
    assert "% " in end and end.split("\r")[2].startswith("Traceback")
    assert end.rstrip().endswith("KeyboardInterrupt")
