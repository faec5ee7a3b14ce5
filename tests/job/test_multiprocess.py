"""Real JAX processes over one run: any mesh, dead and failing hosts, kill -9 in the middle of saves."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator import environment
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import open_storage
from orchestrator.tools.verify import read_back
from tests.support.processes import job

pytestmark = pytest.mark.jobs

PLAIN_ORBAX = """
import sys, jax, numpy as np, orbax.checkpoint as ocp
assert "orchestrator" not in sys.modules
saved = ocp.PyTreeCheckpointer().metadata(sys.argv[1]).item_metadata.tree
as_numpy = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), saved)
tree = ocp.PyTreeCheckpointer().restore(sys.argv[1], restore_args=as_numpy)
step = int(tree["count"])
rng = np.random.default_rng(step)
bits = rng.integers(0, 2**16, (16, 8), dtype=np.uint16)
assert tree["w"].tobytes() == rng.random((16, 8), dtype=np.float32).tobytes()
assert tree["bf16"].tobytes() == bits.tobytes()
print("equal at step", step)
"""


def test_a_run_of_4_hosts_comes_back_bit_for_bit_on_any_mesh_and_in_plain_orbax(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with job(4, 2, root, tmp_path / "save", mesh="4x2", steps=5) as first:
        assert first.wait(250) == [0] * 4, first.story()
        assert first.said(0, "done")[0]["steps"] == [2, 3, 4]
        assert first.said(3, "done")[0]["failures"] == 0
    shapes = [
        (2, 2, {"mesh": "2x2", "spec": "md"}),  # other axes, half the hosts
        (8, 1, {"mesh": "4x2"}),  # more hosts
        (1, 4, {"mesh": "4x1", "spec": "r"}),  # one process, replicated
        (4, 2, {"mesh": "4x2"}),  # the same
    ]
    for number, (count, devices, more) in enumerate(shapes):
        with job(count, devices, root, tmp_path / f"load-{number}", **more) as again:
            assert again.wait(250) == [0] * count, again.story()
            for process in range(count):
                (restored,) = again.said(process, "restored")
                assert restored["step"] == 4
                assert restored["wrong"] == []
                assert restored["process_states"] == {str(index): f"host {index} at 4" for index in range(4)}
                assert restored["extra"]["step"] == 4
    (state,) = root.glob("steps/00000004/*/state")
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_ORBAX, str(state)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "equal at step 4" in plain.stdout, plain.stderr


def test_a_host_that_cannot_write_is_named_on_all_hosts_and_training_goes_on(tmp_path: Path) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=2, fail=1, big=1, timeout=20) as failing:
        assert failing.wait(150) == [0, 0], failing.story()
        for process in range(2):
            assert failing.said(process, "done")[0]["failures"] == 2
            text = failing.errors[process].read_text()
            assert "process 1 (host-1) in write" in text, text
    log = list(JournalStore(open_storage(str(tmp_path / "run")), writer="test").entries())
    aborted = [head.event for head in log if head.event.kind == "aborted"]
    assert [event.failures[0].host for event in aborted] == ["host-1", "host-1"]


def test_a_stopped_host_is_named_after_the_users_deadline_and_the_attempt_aborts(tmp_path: Path) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=400, delay=0.05, timeout=3) as running:
        running.wait_for(0, "trained", 150, at_least=3)
        running.processes[1].send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 120
        store = JournalStore(open_storage(str(tmp_path / "run")), writer="test")
        aborted = None
        while aborted is None and time.monotonic() < deadline:
            events = [head.event for head in store.entries()]
            aborted = next((event for event in events if event.kind == "aborted"), None)
            time.sleep(0.1)
        assert aborted is not None, running.story()
        assert "no receipt from processes [1 (host-1)] after" in aborted.reason


def test_sigterm_on_one_host_saves_the_same_step_everywhere_and_leaves(tmp_path: Path) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=1000, delay=0.05) as running:
        running.wait_for(0, "trained", 150, at_least=3)
        running.processes[1].send_signal(signal.SIGTERM)
        assert running.wait(150) == [0, 0], running.story()
        (first,), (second,) = running.said(0, "preempted"), running.said(1, "preempted")
        assert first["step"] == second["step"]
        assert running.said(0, "done")[0]["steps"][-1] == first["step"]


class Listener(threading.Thread):
    """An outside reader that lists steps all the time and checks that each listed one is whole."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.root, self.stopping = root, threading.Event()
        self.wrong: list[str] = []
        self.listed: set[int] = set()

    def run(self) -> None:
        store = JournalStore(open_storage(str(self.root)), writer="listener")
        while not self.stopping.wait(0.05):
            head = store.head()
            for live in head.live if head else ():
                try:
                    store.step(live).check_sizes()
                    self.listed.add(live.step)
                except oc.OrchestratorError as error:
                    now = store.head()
                    if now and any(entry.attempt == live.attempt and entry.step == live.step for entry in now.live):
                        self.wrong.append(str(error))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_9_at_random_moments_never_loses_a_committed_step(tmp_path: Path) -> None:
    """8 rounds, each of which costs the start of two processes; `make chaos` plays many more."""
    random_source = random.Random(20261124)
    root = tmp_path / "run"
    listener = Listener(root)
    listener.start()
    committed, newest = -1, None
    try:
        for number in range(8):
            victim = random_source.randrange(2)
            with job(2, 1, root, tmp_path / f"round-{number}", steps=100_000, delay=0.01, keep=4) as running:
                running.wait_for(0, "trained", 150, at_least=3)
                if number:
                    (restored,) = running.said(0, "restored")
                    assert restored["step"] == newest, f"round {number}: step {newest} was the newest"
                    assert restored["wrong"] == []
                time.sleep(random_source.uniform(0, 0.5))
                running.kill(victim)
                running.end()
                # What any process had been told is committed must be there for good.
                for line in running.said(0, "trained") + running.said(1, "trained"):
                    committed = max([committed, *line["steps"]])
                newest = oc.open_run(root).latest_step()
                assert newest is not None and newest >= committed, f"round {number}: lost step {committed}"
    finally:
        listener.stopping.set()
        listener.join(10)
    assert listener.wrong == []
    assert committed >= 8, "the rounds hardly saved anything"


def test_a_stopped_coordinator_is_named_in_time_though_its_service_hangs(tmp_path: Path) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=1000, delay=0.05, timeout=2) as running:
        running.wait_for(1, "trained", 150, at_least=3)
        running.processes[0].send_signal(signal.SIGSTOP)  # JAX's coordination service stops with it
        said = "no decision from the coordinator, process 0 (host-0), after 7 s"
        deadline = time.monotonic() + 120
        while said not in running.errors[1].read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert said in running.errors[1].read_text(), running.story()
        assert running.processes[1].poll() is None  # and training goes on


def test_a_coordinator_that_fails_first_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """Orbax's own store of array metadata waits for process 0 to make a directory."""
    rule = {environment.FAILPOINTS: "save.write=error@process=0@step=0"}
    with job(2, 1, tmp_path / "run", tmp_path / "logs", environ=rule, steps=2, timeout=400) as running:
        assert running.wait(200) == [0, 0], running.story()  # long before the save's own time limit
        for process in range(2):
            assert running.said(process, "done")[0] | {"steps": [1], "failures": 1} == running.said(process, "done")[0]


def test_a_first_save_without_one_process_opens_no_epoch_and_delays_nobody(
    tmp_path: Path,
) -> None:
    with job(2, 1, tmp_path / "run", tmp_path / "logs", steps=2, odd=1, timeout=400) as running:
        assert running.wait(200) == [0, 0], running.story()  # long before the save's own time limit
        (rejected,) = running.said(1, "refused")
        assert "metrics=3" in rejected["text"] and rejected["epoch"] is None
        assert running.said(0, "done")[0]["failures"] == 1 and running.said(0, "done")[0]["steps"] == [1]
        assert "process 1 (host-1): UsageError: metrics=3" in running.errors[0].read_text()
    log = list(JournalStore(open_storage(str(tmp_path / "run")), writer="test").entries())
    assert [head.event.kind for head in log] == ["opened-epoch", "committed"]


def test_a_job_of_another_tree_is_rejected_on_all_hosts_before_it_opens_an_epoch(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with job(2, 1, root, tmp_path / "own", steps=1) as own:
        assert own.wait(150) == [0, 0], own.story()
    before = [head.version for head in JournalStore(open_storage(str(root)), writer="test").entries()]
    for number, more in enumerate([{"big": 1}, {"big": 1, "odd": 7}]):  # at its restore; at its first save
        with job(2, 1, root, tmp_path / f"stranger-{number}", steps=1, **more) as stranger:
            assert stranger.wait(150) == [1, 1], stranger.story()
            kinds = {stranger.said(process, "error")[0]["kind"] for process in range(2)}
            assert kinds == ({"OtherJob"} if "odd" in more else {"Mismatch"}), stranger.story()
    assert [head.version for head in JournalStore(open_storage(str(root)), writer="test").entries()] == before


@pytest.mark.parametrize(
    ("fault", "silent"),
    [("save.seal=kill@process=2@step=2", 2), ("group.sign=kill@process=1@step=2", 1)],
    ids=["member", "leader"],
)
def test_hosts_that_sign_in_groups_name_the_one_that_dies_and_no_other(fault: str, silent: int, tmp_path: Path) -> None:
    environ = {environment.RECEIPT_GROUP: "2", environment.FAILPOINTS: fault}
    options = {"environ": environ, "steps": 400, "delay": 0.05, "timeout": 5, "mesh": "5x1", "spec": "r"}
    store = JournalStore(open_storage(str(tmp_path / "run")), writer="test")
    with job(5, 1, tmp_path / "run", tmp_path / "logs", **options) as running:
        running.wait_for(0, "trained", 150, at_least=1)
        deadline = time.monotonic() + 120
        aborted = None
        while aborted is None and time.monotonic() < deadline:
            aborted = next((head.event for head in store.entries() if head.event.kind == "aborted"), None)
            time.sleep(0.1)
        assert aborted is not None, running.story()
    assert aborted.step == 2 and f"no receipt from processes [{silent} (host-{silent})] after" in aborted.reason
    # The steps before it are whole, and each group has stored one object for both of its hosts.
    head = store.require_head()
    assert [live.step for live in head.live] == [0, 1]
    step = store.step(head.live[-1])
    names = [entry.path for entry in step.manifest.files if entry.path.startswith("receipts/")]
    expected = ["receipts/00000.json", "receipts/group-00001-01.json", "receipts/group-00003-01.json"]
    assert sorted(names) == expected
    assert [receipt.host for receipt in step.receipts()] == [f"host-{index}" for index in range(5)]
    assert read_back(store, head.live[-1]).damaged == ()
