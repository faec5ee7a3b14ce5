"""Every kind of leaf on every kind of place: who holds it is agreed, and it comes back bit for bit; what hosts have
differently is reported. The table is tests/support/leaf_table.py, the job tests/support/jobs/leaves_job.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from tests.support import leaf_table
from tests.support.processes import Job
from tests.support.runs import now

JOB = Path(__file__).parents[1] / "support" / "jobs" / "leaves_job.py"
HOSTS = 2
STORED = "process 1 (host-1) has other values than process 0 (host-0), whose are stored"
ADVICE = "keep what belongs to one host in process_state (docs/concepts.md)"


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The job, at its end; its runs are below `runs`."""
    where = tmp_path_factory.mktemp("leaves")
    job = Job(HOSTS, 2, where / "runs", where / "logs", program=JOB)
    try:
        job.wait_for(0, "done", 300)
        assert job.wait(60) == [0] * HOSTS, job.story()
        yield job
    finally:
        job.end()


def runs(job: Job) -> Path:
    return job.outputs[0].parents[1] / "runs"


def rows(job: Job, event: str) -> list[dict[str, Any]]:
    """What each process says of a row."""
    found = [job.said(process, event) for process in range(HOSTS)]
    assert [len(lines) for lines in found] == [1] * HOSTS, job.story()
    return [line for (line,) in found]


@pytest.mark.jobs
@pytest.mark.parametrize("row", ["all", "attested"])
def test_every_leaf_on_every_place_is_saved_and_comes_back_bit_for_bit(ended: Job, row: str) -> None:
    for said in rows(ended, row):
        assert (said["steps"], said["failed"], said["differing"], said["wrong"]) == ([1, 2], [], [], [])


@pytest.mark.jobs
@pytest.mark.parametrize("row", ["swapped", "merged", "everywhere", "own"])
def test_stages_come_back_and_are_attested_on_other_processes_devices(ended: Job, row: str) -> None:
    assert [said["wrong"] for said in rows(ended, row)] == [[], []]


@pytest.mark.jobs
def test_one_process_restores_what_was_on_the_devices_of_two(ended: Job) -> None:
    places = leaf_table.places(HOSTS)
    attest: Any
    for row, kinds, attest in (("all", leaf_table.KINDS, "off"), ("attested", leaf_table.ATTESTED, "full")):
        like = leaf_table.state(places, kinds, leaf_table.target)
        with oc.Agent(runs(ended) / row, options=oc.Options(attest=attest)) as agent:
            restored = agent.restore(like)
        assert restored is not None and leaf_table.wrong(restored.state, like) == []


@pytest.mark.jobs
def test_plain_orbax_loads_what_was_on_the_devices_of_two_processes(ended: Job) -> None:
    (state,) = runs(ended).glob("all/steps/00000002/*/state")
    # Orbax has no values of these kinds, and gives None for arrays without elements.
    like: Any = leaf_table.state(leaf_table.places(HOSTS), make=leaf_table.target) | {"bytes": None, "complex": None}
    restore_args = ocp.checkpoint_utils.construct_restore_args(like)
    tree = ocp.PyTreeCheckpointer().restore(state, item=like, restore_args=restore_args)
    on_devices = {name: leaf for name, leaf in like.items() if name not in leaf_table.ON_HOST and "-none" not in name}
    assert len(on_devices) > 100 and leaf_table.wrong(tree, on_devices) == []
    (moved,) = runs(ended).glob("moved/steps/00000004/*/state")
    target = leaf_table.target("stage1-f32", "f32", leaf_table.places(HOSTS)["stage0"])
    loaded = ocp.StandardCheckpointer().restore(moved, {"x": target})
    assert leaf_table.wrong({"stage1-f32": loaded["x"]}, {"stage1-f32": target}) == []


@pytest.mark.jobs
def test_values_that_differ_between_hosts_are_named_once_or_abort_the_save_or_are_ignored(ended: Job) -> None:
    differing = f"array, int, key, large, numpy and 2 more: hosts disagree: {STORED}; {ADVICE}"
    for process, (warned, rejected, ignored, agreed) in enumerate(
        zip(*(rows(ended, row) for row in ("warned", "refused", "ignored", "agreed")), strict=True)
    ):
        assert warned["differing"] == ([differing] if process == 0 else [])
        assert warned["steps"] == ignored["steps"] == [1, 2]
        assert rejected["steps"] == [] and rejected["failures"] == 2
        assert [text.partition(" was not saved: ")[2] for text in rejected["failed"]] == [differing] * 2
        assert agreed["steps"] == [1], "equal values in other layouts are equal"
        assert ignored["differing"] == agreed["differing"] == agreed["failed"] == []


@pytest.mark.jobs
def test_what_is_donated_or_overwritten_after_save_is_compared_as_it_was(ended: Job) -> None:
    assert [(said["steps"], said["failures"]) for said in rows(ended, "donated")] == [([1, 2, 3, 4], 0)] * HOSTS


@pytest.mark.jobs
def test_a_leaf_on_different_devices_is_rejected_by_name_and_the_next_save_is_good(ended: Job) -> None:
    (said, _) = rows(ended, "apart")
    assert said["steps"] == [3]
    first, second = said["failed"]
    assert "x: process 0 has it as its own, process 1 has it on devices of processes 0-1" in first
    assert "x: process 0 has it on devices of processes 0-1, process 1 has it as its own" in second


@pytest.mark.jobs
def test_what_only_process_0_sees_elsewhere_costs_one_save_and_no_wrong_one(ended: Job) -> None:
    (said, _) = rows(ended, "moved")
    assert said["steps"] == [1, 3, 4]
    assert len(said["failed"]) == 1 and "have changed on process 0" in said["failed"][0]
    assert [one["same"] for one in rows(ended, "moved_back")] == [[], [True, True]]


@pytest.mark.jobs
def test_a_process_that_waits_for_another_step_than_process_0_saves_loses_that_one_only(ended: Job) -> None:
    for said in rows(ended, "steps"):
        (before,) = said["before"]
        assert "process 0 (host-0) saves step 10 where process 1 (host-1) saves step 11" in before
        assert said["steps"] == [1, 20] and said["failed"] == []


@pytest.mark.jobs
def test_a_flax_model_with_dropout_is_saved_by_every_process(ended: Job) -> None:
    for said in rows(ended, "nnx"):
        assert said["steps"] == [1, 2] and said["failed"] == [] and said["equal"] == [True] * 4


@pytest.mark.parametrize("attest", ["off", "full"])
@pytest.mark.parametrize("hosts", [1, 2])
def test_one_process_saves_and_restores_every_leaf_on_every_place(root: Path, hosts: int, attest: Any) -> None:
    places = leaf_table.places(hosts)
    kinds = tuple(leaf_table.KINDS) if attest == "off" else leaf_table.ATTESTED
    state, like = leaf_table.state(places, kinds), leaf_table.state(places, kinds, leaf_table.target)
    with oc.Agent(root, options=now(attest=attest)) as agent:
        for step in (1, 2):
            assert agent.save(step, state)
            restored = agent.restore(like)
            assert restored is not None and leaf_table.wrong(restored.state, like) == []


def test_a_wrong_bit_would_be_seen_in_every_place_of_the_table() -> None:
    places = leaf_table.places(2)
    like = leaf_table.state(places, make=leaf_table.target)
    others = leaf_table.state(places, make=lambda name, kind, at: leaf_table.array(f"other {name}", kind, at))
    names = {name for name in like if name not in leaf_table.ON_HOST and not name.endswith("-none")}
    assert names <= set(leaf_table.wrong(others, like))
    assert jax.process_count() == 1
