"""The examples: each one runs, and a run that was interrupted ends where one that was not ends."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.cli.main import main

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (REPOSITORY / "examples").glob("*.py") if path.stem != "__init__")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "grain_input"])
def test_an_interrupted_run_ends_as_one_that_was_not_bit_for_bit(name: str, tmp_path: Path) -> None:
    train = importlib.import_module(f"examples.{name}").main
    straight = train(str(tmp_path / "straight"), 8)
    assert train(str(tmp_path / "twice"), 4)["start"] == 0
    again = train(str(tmp_path / "twice"), 8)
    assert again == {**straight, "start": 4}
    assert oc.open_run(tmp_path / "twice").latest_step() == 7


def launched(name: str, root: Path, processes: int, steps: int, *more: str) -> list[dict[str, Any]]:
    """What each process of a real job of `processes` printed."""
    command = ["-m", "launch", "local", f"--processes={processes}", "--", sys.executable, "-m", f"examples.{name}"]
    done = subprocess.run(
        [sys.executable, *command, f"--root={root}", f"--steps={steps}", *more],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line[line.index("{") :] for line in done.stdout.splitlines() if "] {" in line]
    assert len(lines) == processes, done.stdout
    return [ast.literal_eval(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_jax", "nnx_optax"])
def test_an_example_starts_on_two_hosts_as_it_does_on_one(name: str, tmp_path: Path) -> None:
    both = launched(name, tmp_path / "run", 2, 3)
    assert both[0] == both[1] and both[0]["start"] == 0


@pytest.mark.slow
def test_grain_goes_on_with_what_was_not_seen_on_another_number_of_processes(tmp_path: Path) -> None:
    pytest.importorskip("grain", reason="the `grain` extra is not installed")
    from examples.grain_input import reader

    alone = reader(0, 1)
    wanted = {step: sorted(next(alone)["id"].tolist()) for step in range(12)}
    two = launched("grain_input", tmp_path / "run", 2, 6)
    one = importlib.import_module("examples.grain_input").main(str(tmp_path / "run"), 12)
    assert [each["start"] for each in two] == [0, 0] and one["start"] == 6
    got = {step: sorted(two[0]["batches"][step] + two[1]["batches"][step]) for step in range(6)}
    got |= {step: sorted(batch) for step, batch in one["batches"].items()}
    assert got == wanted
    assert one["seen"] == [sum(batch.count(number) for batch in got.values()) for number in range(100)]
    for count in (3, 4):  # and on more processes
        readers = [reader(process, count) for process in range(count)]
        for iterator in readers:
            iterator.set_state({"next_index": 7})
        assert sorted(number for iterator in readers for number in next(iterator)["id"].tolist()) == wanted[7]


def test_positions_that_differ_are_rejected_on_another_number_of_processes() -> None:
    pytest.importorskip("grain", reason="the `grain` extra is not installed")
    from examples.grain_input import go_on, reader

    states = {0: b'{"next_index": 1}', 1: b'{"next_index": 2}'}
    with pytest.raises(oc.UsageError, match="2 processes saved different positions; restore on as many, not 3"):
        go_on(reader(0, 3), states, 0, 3)
    iterator = reader(1, 2)
    go_on(iterator, states, 1, 2)
    assert iterator.get_state() == {"next_index": 2}


@pytest.mark.slow
def test_a_loop_of_two_hosts_moves_over_from_orbax_in_the_middle_of_its_run(tmp_path: Path) -> None:
    root = tmp_path / "run"
    theirs = launched("orbax_loop", root, 2, 5, "--with_orbax")
    assert [each["latest"] for each in theirs] == [4, 4]
    assert main(["orchestrator", "adopt", str(root)]) == 0
    ours = launched("orbax_loop", root, 2, 9)
    assert ours == [{**ours[0], "start": 5, "latest": 8, "count": 9}] * 2
    alone = importlib.import_module("examples.orbax_loop").main(str(root), 12)  # one host, eight devices
    straight = importlib.import_module("examples.orbax_loop").main(str(tmp_path / "straight"), 12)
    assert alone == {**straight, "start": 9}
    # The newest two, and the newest one that a run has come up on.
    assert oc.open_run(root).all_steps() == [8, 10, 11]
