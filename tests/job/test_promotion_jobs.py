"""Jobs of several processes whose steps go to the store from memory."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator.rules import keys
from tests.support.processes import job
from tests.support.runs import store_of

pytestmark = pytest.mark.jobs
DEADLINE_S = 120.0


def start(tmp_path: Path, name: str, **args: Any) -> Any:
    """Two processes; each step that is held is saved, too."""
    places = {"tier": tmp_path / "tiers", "every": 2, "hold": 2, "big": 1, "keep": 100}
    return job(2, 2, tmp_path / "run", tmp_path / name, **{**places, **args})


def saved(tmp_path: Path) -> list[int]:
    return [live.step for live in store_of(tmp_path / "run").require_head().live]


def test_one_process_without_room_and_one_that_dies_on_the_way_cost_no_saved_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with start(tmp_path, "full", steps=7, full=1) as first:
        assert first.wait(DEADLINE_S) == [0, 0], first.story()
        for process in (0, 1):
            (done,) = first.said(process, "done")
            assert done["steps"] == [0, 2, 4, 6] and done["failures"] == 0, first.story()
            assert first.said(process, "held") == []
            not_held = {line["step"]: line["reason"] for line in first.said(process, "not held")}
            assert sorted(not_held) == [0, 2, 4, 6] and "no room" in not_held[0], not_held
        assert "goes to the store directly" in first.errors[1].read_text(), first.story()

    # In the second upload: each has two files of process 1, at least.
    monkeypatch.setenv("ORCHESTRATOR_FAILPOINTS", "upload.file=kill@process=1@nth=4")
    with start(tmp_path, "killed", steps=500, delay=0.1) as second:
        for process in (0, 1):
            (found,) = second.wait_for(process, "restored", DEADLINE_S)
            assert (found["step"], found["wrong"], [*found["sources"]]) == (6, [], ["store"]), second.story()
        codes = second.wait(DEADLINE_S)
        assert -signal.SIGKILL in codes and 0 not in codes, second.story()
        held = [max((line["step"] for line in second.said(process, "held")), default=6) for process in (0, 1)]
    monkeypatch.delenv("ORCHESTRATOR_FAILPOINTS")
    before, unfinished = saved(tmp_path), {path.name for path in (tmp_path / "run" / keys.STEPS).iterdir()}

    with start(tmp_path, "again", steps=3) as third:
        for process in (0, 1):
            (found,) = third.wait_for(process, "restored", DEADLINE_S)
            assert found["step"] >= max(min(held), before[-1]) and found["wrong"] == [], third.story()
            assert found["step"] == before[-1] or [*found["sources"]] == ["memory"]
        assert third.wait(DEADLINE_S) == [0, 0], third.story()
    there = {int(path.name) for path in (tmp_path / "run" / keys.STEPS).iterdir()}
    assert there == set(saved(tmp_path)) > set(before), unfinished  # the orphan is gone


def test_when_hosts_are_preempted_what_is_on_its_way_and_the_last_step_reach_the_store(tmp_path: Path) -> None:
    with start(tmp_path, "job", steps=1000, delay=0.1, every=1000, upload=5000) as running:
        for process in (0, 1):
            running.wait_for(process, "held", DEADLINE_S)
        # At 5000 bytes a second step 0 takes 13 s.
        running.processes[1].send_signal(signal.SIGTERM)
        assert running.wait(DEADLINE_S) == [0, 0], running.story()
        (first,), (second,) = running.said(0, "preempted"), running.said(1, "preempted")
        assert first["step"] == second["step"]
        for process in (0, 1):
            (done,) = running.said(process, "done")
            assert done["steps"] == [0, first["step"]] and done["failures"] == 0, running.story()


@pytest.mark.parametrize("full", [0, 1])
def test_a_process_that_saves_directly_waits_for_what_others_upload_as_long_as_they_do(
    full: int, tmp_path: Path
) -> None:
    """The other's upload takes four times as long as a save may."""
    slow = {"heavy": 1, "every": 1000, "hold": 1000, "upload": 800_000, "timeout": 3}
    with start(tmp_path, "job", steps=28, delay=1, full=full, **slow) as running:
        assert running.wait(DEADLINE_S) == [0, 0], running.story()
        for process in (0, 1):
            (done,) = running.said(process, "done")
            assert done["steps"] == [0] and done["failures"] == 0, running.story()
    said = running.errors[full].read_text()
    assert f"it waits for process {1 - full} (host-{1 - full}), still uploading from memory" in said, said
