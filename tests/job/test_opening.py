"""An epoch is opened by the first save or restore, and by nothing else; who is going to be rejected opens none, writes
nothing and fences nobody (invariants 9 and 13)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator.arrays.tree import flatten
from orchestrator.job.opening import Opening
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.observe.events import EpochOpened, subscribe
from orchestrator.rules import journal
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from tests.support.fakes import HookedStorage, another_host
from tests.support.runs import LIKE, fill, journal_of, kinds, now, state
from tests.support.snapshots import snapshot

OTHER = {"layers": [jnp.zeros(2)]}

READS: dict[str, Callable[[oc.Agent], object]] = {
    "nothing": lambda agent: None,
    "latest_step": lambda agent: agent.latest_step(),
    "all_steps": lambda agent: agent.all_steps(),
    "should_save": lambda agent: agent.should_save(7),
    "preemption": lambda agent: agent.reached_preemption(7),
    "wait": lambda agent: agent.wait_until_finished(),
    "a save that is not due": lambda agent: agent.save(7, state(7)),
    "cadence and in_flight": lambda agent: (agent.cadence, agent.in_flight, agent.epoch),
}


@pytest.mark.parametrize("steps", [(), (1, 2)], ids=["new run", "run"])
@pytest.mark.parametrize("what", READS)
def test_making_an_agent_and_asking_it_opens_no_epoch_and_writes_nothing(
    root: Path, what: str, steps: tuple[int, ...]
) -> None:
    if steps:
        fill(root, *steps)
    before = snapshot(root.parent)
    with oc.Agent(root, save=oc.at([99])) as agent:
        READS[what](agent)
        assert agent.epoch is None
        assert agent.latest_step() == (2 if steps else None) and agent.all_steps() == list(steps)
    assert snapshot(root.parent) == before and root.exists() == bool(steps)  # no events/ either


@pytest.mark.parametrize("first", [lambda agent: agent.save(3, state(3)), lambda agent: agent.restore(LIKE)])
def test_the_first_save_or_restore_opens_one_and_the_next_ones_none(
    root: Path, first: Callable[[oc.Agent], Any]
) -> None:
    fill(root, 1)
    heard: list[EpochOpened] = []
    stop = subscribe(lambda event: heard.append(event) if isinstance(event, EpochOpened) else None)
    with oc.Agent(root, options=now()) as agent:
        first(agent)
        assert agent.epoch == 2
        agent.restore(LIKE)
        agent.save(4, state(4))
    stop()
    assert kinds(root).count("opened-epoch") == 2 and [event.epoch for event in heard] == [2]


def test_a_restore_in_a_new_run_opens_its_epoch_and_fences_older_incarnations(root: Path) -> None:
    zombie = oc.Agent(root, options=now())
    assert zombie.restore(LIKE) is None and zombie.epoch == 1
    with oc.Agent(root, options=now(), rendezvous=another_host()) as agent:
        assert agent.restore(LIKE) is None and agent.epoch == 2
        with pytest.raises(oc.Fenced):
            zombie.save(1, state(1))
        assert agent.save(1, state(1))


# Who is going to be rejected.


def no_right_to_write(root: Path) -> Any:
    def hook(operation: str, key: str) -> None:
        if operation == "create":
            raise oc.StorageError(f"create {key}: EACCES (Permission denied)")

    return HookedStorage(PosixStorage(str(root)), before=hook)


def steps_of_another_owner(root: Path) -> Any:
    def hook(operation: str, key: str) -> None:
        if operation == "create" and key.startswith("steps/"):
            raise oc.StorageError(f"create {key}: EACCES (Permission denied)")

    return HookedStorage(PosixStorage(str(root)), before=hook)


def like(tree: Any) -> Callable[[oc.Agent], object]:
    return lambda agent: agent.restore(tree)


REJECTED: dict[str, tuple[Callable[[oc.Agent], object], type[oc.OrchestratorError], Callable[[Path], Any] | None]] = {
    "other tree": (lambda agent: agent.save(2, OTHER), oc.OtherJob, None),
    "other target": (like(OTHER), oc.Mismatch, None),
    "other target, a given step": (lambda agent: agent.restore(OTHER, step=1), oc.Mismatch, None),
    "no such step": (lambda agent: agent.restore(LIKE, step=9), oc.StepNotFound, None),
    "no target": (like({"w": object()}), oc.UnsupportedLeaf, None),
    "no state": (lambda agent: agent.save(2, {"w": print}), oc.UnsupportedLeaf, None),
    "no metrics": (lambda agent: agent.save(2, state(2), metrics=3), oc.UsageError, None),  # type: ignore[arg-type]
    "no step": (lambda agent: agent.save(-1, state(2)), oc.UsageError, None),
    "no right to save": (lambda agent: agent.save(2, state(2)), oc.StorageError, no_right_to_write),
    "no right to restore into": (like(LIKE), oc.StorageError, no_right_to_write),
    "steps/ is another's": (lambda agent: agent.save(2, state(2)), oc.StorageError, steps_of_another_owner),
    "steps/ is another's, at the restore": (like(LIKE), oc.StorageError, steps_of_another_owner),
}


@pytest.mark.parametrize("why", REJECTED)
def test_who_is_rejected_fences_nobody_and_leaves_nothing_behind(root: Path, why: str) -> None:
    act, kind, store = REJECTED[why]
    with oc.Agent(root, options=now()) as owner:
        owner.save(1, state(1))
        before = snapshot(root)
        with oc.Agent(root, options=now(), storage=store(root) if store else None) as stranger:
            for _ in range(2):  # not by its second try either
                with pytest.raises(kind) as caught:
                    act(stranger)
                assert isinstance(caught.value, oc.OrchestratorError)
            assert stranger.epoch is None
        assert snapshot(root) == before
        assert owner.save(2, state(2)) and owner.all_steps() == [1, 2]


ANOTHER_USER = """
import os, sys
import jax
jax.config.update("jax_platforms", "cpu")
import jax.numpy as jnp
import orchestrator as oc
state = {"w": jnp.zeros(512), "count": 0}
oc.Agent(sys.argv[2]).restore  # imported before the rights are gone
os.setuid(12345)
for act in (lambda agent: agent.save(2, state), lambda agent: agent.restore(state)):
    try:
        act(oc.Agent(sys.argv[1]))
    except oc.StorageError as error:
        print("rejected:", error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user, and so root")
@pytest.mark.parametrize("owned", ["journal", "steps"])
def test_a_root_whose_directories_are_another_users_is_rejected_by_the_file_system_itself(
    root: Path, tmp_path: Path, owned: str
) -> None:
    fill(root, 1)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    (root / owned).chmod(0o755)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    before = snapshot(root)
    done = subprocess.run(
        [sys.executable, "-c", ANOTHER_USER, str(root), str(tmp_path / "other")],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout.count("rejected:") == 2 and "EACCES" in done.stdout, done.stderr
    assert snapshot(root) == before


def test_a_directory_of_orbaxs_own_steps_is_no_new_run(root: Path) -> None:
    with ocp.CheckpointManager(root) as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": jnp.zeros(4)}))
    before = snapshot(root)
    for act in (lambda agent: agent.save(1, state(1)), lambda agent: agent.restore(LIKE)):
        with pytest.raises(oc.UsageError, match=r"holds 1 steps of Orbax's own \(newest 5\), .*`orchestrator adopt"):
            act(oc.Agent(root))
    assert snapshot(root) == before


@pytest.fixture
def late(root: Path) -> Iterator[oc.Agent]:
    """It finds a new run, as another job does, which commits between the comparing and the opening of this one."""
    fired: list[str] = []

    def hook(operation: str, key: str) -> None:
        if operation == "create" and key.startswith("journal/") and not fired:
            fired.append(key)
            fill(root, 1)

    with oc.Agent(root, options=now(), storage=HookedStorage(PosixStorage(str(root)), before=hook)) as agent:
        yield agent
    assert fired


def test_a_job_that_was_compared_before_another_job_committed_is_compared_again(root: Path, late: oc.Agent) -> None:
    with pytest.raises(oc.OtherJob):
        late.save(1, OTHER)
    assert late.epoch is None and kinds(root) == ["opened-epoch", "committed"]


def test_a_restore_that_found_a_new_run_opens_none_once_another_job_has_committed(root: Path, late: oc.Agent) -> None:
    with pytest.raises(journal.Overtaken, match="restore again"):
        late.restore(LIKE)
    assert late.epoch is None and kinds(root) == ["opened-epoch", "committed"]
    restored = late.restore(LIKE)
    assert restored is not None and restored.step == 1 and late.epoch == 2


def test_two_agents_that_open_at_once_get_two_epochs_and_the_later_one_stays(root: Path) -> None:
    fill(root, 1)
    agents = [oc.Agent(root, options=now(), rendezvous=host) for host in (None, another_host())]
    threads = [threading.Thread(target=agent.restore, args=(LIKE,)) for agent in agents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    first, second = sorted(agents, key=lambda agent: agent.epoch or 0)
    assert (first.epoch, second.epoch) == (2, 3)
    with pytest.raises(oc.Fenced):
        first.save(2, state(2))
    assert second.save(2, state(2))


# Several processes: the verdicts of all are gathered first.


class TwoProcesses(SingleProcess):
    """Process 0 of two, which are configured alike. `other`: what process 1 says at each later gathering."""

    def __init__(self, other: dict[str, Any]) -> None:
        super().__init__()
        self.count, self.hosts, self.other = 2, {0: "host-0", 1: "host-1"}, other

    def gather(self, name: str, value: Any, timeout_s: float) -> list[Any]:
        if name == "open the epoch: one root":
            return [value, value | {"sees": True}]
        return [value, value if name == "open the run" else self.other]


def an_opening(root: Path, other: dict[str, Any]) -> Opening:
    return Opening(JournalStore(PosixStorage(str(root)), "me"), TwoProcesses(other), 1.0, lambda epoch: None)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"step": 2, "rejected": {"kind": "UsageError", "text": "metrics=3"}},
            "process 1 (host-1): UsageError: metrics=3",
        ),
        (
            {"step": 3, "described": True},
            "process 0 (host-0) saves step 2 where process 1 (host-1) saves step 3; all must save the same",
        ),
    ],
)
def test_what_one_process_cannot_save_opens_no_epoch_on_any(root: Path, other: dict[str, Any], said: str) -> None:
    fill(root, 1)
    before = snapshot(root)
    opening = an_opening(root, other)
    assert opening.by_save(2, lambda: flatten(state(2))).startswith(said)
    assert opening.epoch is None and snapshot(root) == before
    assert an_opening(root, {"step": 2, "described": True}).by_save(2, lambda: flatten(state(2))) == ""
    assert journal_of(root)[-1].epoch == 2


def test_a_restore_opens_only_once_all_processes_may_write(root: Path) -> None:
    fill(root, 1)
    before = snapshot(root)
    tree = journal_of(root)[-1].live[0].tree
    opening = an_opening(root, {"rejected": {"kind": "StorageError", "text": "create: EACCES"}})
    with pytest.raises(oc.StorageError, match="process 1: create: EACCES"):
        opening.by_restore(tree)
    assert opening.epoch is None and snapshot(root) == before  # the mark is gone
    opening = an_opening(root, {})
    with pytest.raises(journal.Overtaken):
        opening.by_restore("another tree")
    assert opening.epoch is None and snapshot(root) == before
    opening.by_restore(tree)
    assert opening.epoch == 2


def test_garbage_of_another_host_opens_nothing_and_names_it(root: Path) -> None:
    fill(root, 1)
    before = snapshot(root)
    opening = an_opening(root, {"opens": []})
    with pytest.raises(oc.OrchestratorError, match=r"restore: open the epoch: process 1 \(host-1\) answered"):
        opening.by_restore(journal_of(root)[-1].live[0].tree)
    with pytest.raises(oc.OrchestratorError, match=r"open the epoch: first save: process 1 \(host-1\) answered"):
        opening.by_save(2, lambda: flatten(state(2)))
    assert opening.epoch is None and snapshot(root) == before


def test_a_first_save_that_another_process_cannot_take_part_in_is_a_failed_save(root: Path) -> None:
    other = {"step": 1, "rejected": {"kind": "UsageError", "text": "metrics=3"}}
    agent = oc.Agent(root, rendezvous=TwoProcesses(other), options=oc.Options(rendezvous_timeout_s=1))
    assert agent.save(1, state(1)) is False and agent.failures == 1
    agent = oc.Agent(root, rendezvous=TwoProcesses(other), options=now(rendezvous_timeout_s=1))
    with pytest.raises(oc.SaveFailed, match=r"step 1 was not saved: process 1 \(host-1\): UsageError"):
        agent.save(1, state(1))
    assert not (root / "journal").exists()


def test_what_was_told_before_the_epoch_was_open_is_in_the_event_log_after_it(root: Path) -> None:
    fill(root, 1, 2)
    (manifest,) = root.glob("steps/00000002/*/manifest.json")
    manifest.unlink()
    (root / "events" / "00000.jsonl").unlink()
    with oc.Agent(root, options=now()) as agent:
        assert agent.restore(LIKE) is not None  # steps down before it opens
    lines = [json.loads(line) for line in (root / "events" / "00000.jsonl").read_text().splitlines()]
    told = [(line["event"], line["epoch"]) for line in lines if line["event"] in ("SteppedDown", "EpochOpened")]
    assert told == [("SteppedDown", 2), ("EpochOpened", 2)]


OTHER_TREES: dict[str, tuple[Callable[[int], Any], str]] = {
    "a leaf added": (lambda step: {**state(step), "new": jnp.zeros(2)}, "new: the run has nothing, this job f32[2]"),
    "a leaf gone": (lambda step: {"w": state(step)["w"]}, "count: the run has int, this job nothing"),
    "another shape": (lambda step: {**state(step), "w": jnp.zeros(5)}, "w: the run has f32[512], this job f32[5]"),
    "another dtype": (
        lambda step: {**state(step), "w": jnp.zeros(512, jnp.bfloat16)},
        "w: the run has f32[512], this job bf16[512]",
    ),
    "numpy for jax": (
        lambda step: {**state(step), "w": np.zeros(512, np.float32)},
        "w: the run has f32[512] (jax.Array), this job f32[512] (numpy array)",
    ),
}


@pytest.mark.parametrize("kind", OTHER_TREES)
def test_a_later_save_of_another_tree_is_rejected_at_that_save_and_the_next_good_one_goes_on(
    root: Path, kind: str
) -> None:
    other, said = OTHER_TREES[kind]
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state(1))
        for _ in range(2):
            with pytest.raises(oc.OtherJob, match=re.escape(said)):
                agent.save(2, other(2))
        assert agent.save(2, state(2)) and agent.all_steps() == [1, 2]


def test_a_later_save_of_other_values_is_no_other_tree(root: Path) -> None:
    with oc.Agent(root, options=now()) as agent:
        for step, count in enumerate((7, 70000, jnp.int32(9), np.int32(9), 0)):
            assert agent.save(step, {**state(step), "count": count})
        assert agent.all_steps() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", OTHER_TREES)
def test_a_later_save_of_another_tree_is_accepted_where_that_is_wanted(root: Path, kind: str) -> None:
    with oc.Agent(root, options=now(other_tree=True)) as agent:
        assert agent.save(1, state(1)) and agent.save(2, OTHER_TREES[kind][0](2)) and agent.save(3, state(3))
        assert agent.all_steps() == [1, 2, 3]
