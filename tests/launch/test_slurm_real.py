"""A real Slurm: a job that is preempted, loses a node, has one drained, and comes back on fewer nodes each time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import orchestrator as oc
from launch.example.report import ProgressLine, Summary
from tests.support.reporting import put
from tests.support.slurm_cluster import Cluster, eventually, why_not

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no Slurm: {REASON}")

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 180.0  # each wait; the machine may be busy
STEPS = 60
TRAIN = [
    *("-m", "launch.train", f"--steps={STEPS}", "--mesh=data=-1,model=2", "--batch_size=24"),
    *("--save_every=5", "--keep_last=100", "--log_every=1", "--digests", "--step_delay_s=0.15"),
    *("--layers=1", "--width=32", "--length=16"),
]
LAUNCH = [sys.executable, "-m", "launch"]
PROGRAM = [sys.executable, *TRAIN]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ORCHESTRATOR_", "SLURM_"))}
    found = Cluster(tmp_path_factory.mktemp("slurm"), {**clean, "PYTHONPATH": str(REPOSITORY)})
    try:
        found.start()
        yield found
    finally:
        found.close()


@dataclass(frozen=True)
class Incarnation:
    """What one start of the job printed on its host 0."""

    restored: int | None
    restored_digest: str | None
    losses: dict[int, float]
    batches: dict[int, str]
    saved: dict[int, str]

    @classmethod
    def read(cls, log: Path) -> Incarnation:
        restored, digest = None, None
        lines = []
        for text in log.read_text().splitlines():
            if text.startswith("restored step "):
                restored, digest = int(text.split()[2]), text.split()[4]
            if line := ProgressLine.parse(text):
                lines.append(line)
        return cls(
            restored,
            digest,
            {line.step: line.loss for line in lines if line.loss is not None},
            {line.step: line.batch for line in lines if line.batch is not None},
            {line.step: line.digest for line in lines if line.digest is not None},
        )


@pytest.fixture(scope="module")
def unbroken(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The same command line on four simulated hosts, never disturbed."""
    at = tmp_path_factory.mktemp("unbroken")
    local = [*LAUNCH, "local", "--processes", "4", "--devices_per_process", "2"]
    program = [word for word in PROGRAM if not word.startswith("--step_delay_s")]
    program += ["--nosave", f"--root={at}/run", f"--summary={at}/summary.json"]
    cluster.run(*local, "--", *program, cwd=at, deadline_s=DEADLINE_S)
    return Summary.read(at / "summary.json")


def submit(cluster: Cluster, at: Path, flags: list[str], program: list[str]) -> str:
    grace = ["--grace_s", "20", "--end_grace_s", "5", "--partition", "spot"]
    return cluster.run(*LAUNCH, "slurm", *grace, *flags, "--submit", "--", *program, cwd=at)


def until_saved(root: Path, step: int) -> None:
    """Until the journal has a commit of `step` or a later one."""

    def saved() -> bool:
        try:
            return (oc.open_run(root).latest_step() or 0) >= step
        except oc.OrchestratorError:
            return False

    eventually(saved, f"step {step} committed", DEADLINE_S)


def until_runs(cluster: Cluster, job: str, restart: int) -> None:
    def runs() -> bool:
        said = cluster.job(job)
        return (said["JobState"], said["Restarts"]) == ("RUNNING", str(restart))

    eventually(runs, f"restart {restart} of job {job}", DEADLINE_S)


def preempt(cluster: Cluster, nodes: str) -> None:
    """A short job of a partition with a higher priority takes these nodes."""
    cluster.run(
        "sbatch", "--partition=urgent", f"--nodelist={nodes}", "--exclusive", "--output=/dev/null", "--wrap=true"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif("SLURM_REPORT" not in os.environ, reason="two minutes and more: `make test-slurm` runs it")
def test_a_job_survives_preemption_a_lost_node_and_a_drained_one(
    cluster: Cluster, unbroken: Summary, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    job = submit(
        cluster,
        tmp_path,
        ["--nodes", "4", "--min_nodes", "2", "--devices_per_process", "2", "--run_root", str(root)],
        PROGRAM,
    )
    began = time.monotonic()
    until_saved(root, 5)
    preempt(cluster, "n1,n2,n3,n4")
    until_runs(cluster, job, 1)
    until_saved(root, 20)
    cluster.lose_node("n4")
    until_runs(cluster, job, 2)
    assert cluster.nodes()["n4"].startswith("down")
    until_saved(root, 35)
    cluster.run("scontrol", "update", "NodeName=n3", "State=DRAIN", "Reason=test")
    preempt(cluster, "n1")
    until_runs(cluster, job, 3)
    eventually(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the end", DEADLINE_S)
    took_s = time.monotonic() - began
    cluster.run("scontrol", "update", "NodeName=n3", "State=RESUME")

    logs = sorted((tmp_path / "logs" / job).iterdir())
    hosts = [len(list(log.glob("host-*.log"))) for log in logs]
    found = [Incarnation.read(log / "host-0.log") for log in logs]
    report(found, hosts, unbroken, took_s)
    assert hosts == [4, 4, 3, 2]
    saved: dict[int, str] = {}
    for one, before in zip(found, [None, *found], strict=False):
        if before is not None:
            saved |= before.saved
            assert one.restored is not None and one.restored_digest == saved[one.restored], "the state that was saved"
            assert min(one.losses) == one.restored + 1 and one.restored >= max(before.saved) - 5
        assert one.batches == {step: unbroken.batches[step] for step in one.batches}, "the batches not seen yet"
    assert found[1].restored == max(found[0].losses), "a preempted job loses no step"
    assert found[3].restored == max(found[2].losses)
    for one in found[:2]:
        assert one.losses == {step: pytest.approx(unbroken.losses[step], abs=1e-6) for step in one.losses}, "same mesh"
    for one in found[2:]:  # another mesh adds numbers up in another order
        assert one.losses == {step: pytest.approx(unbroken.losses[step], abs=1e-3) for step in one.losses}
    assert max(found[3].losses) == STEPS - 1 and oc.open_run(root).latest_step() == STEPS - 1


def report(found: list[Incarnation], hosts: list[int], unbroken: Summary, took_s: float) -> None:
    """The table of what came back, put where the guide has its mark."""
    rows = [
        "| start | nodes | ended by | restored step | trained steps | batches as in the unbroken run | greatest "
        "difference of a loss |",
        "|---|---|---|---|---|---|---|",
    ]
    ends = [
        "preemption by a job of a higher partition",
        "loss of node n4",
        "drain of n3 and preemption",
        "its last step",
    ]
    for start, (one, count, end) in enumerate(zip(found, hosts, ends, strict=True)):
        same = sum(unbroken.batches[step] == batch for step, batch in one.batches.items())
        worst = max(abs(loss - unbroken.losses[step]) for step, loss in one.losses.items())
        rows.append(
            f"| {start} | {count} | {end} | {'-' if one.restored is None else one.restored} "
            f"| {min(one.losses)} to {max(one.losses)} | {same} of {len(one.batches)} | {worst:.1g} |"
        )
    text = "\n".join(rows) + f"\n\nFrom the first start to the end: {took_s:.0f} s."
    put(Path(os.environ["SLURM_REPORT"]), "make test-slurm", text)


def test_only_what_left_preempted_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    def ends(name: str, program: str) -> str:
        (at := tmp_path / name).mkdir()
        return submit(cluster, at, ["--nodes", "1", "--max_requeues", "1"], ["bash", "-c", program])

    waits = 'trap "exit 75" TERM; touch here; while true; do sleep 0.1; done'
    fails, misused, preempted = ends("fails", "exit 3"), ends("misused", "exit 2"), ends("preempted", "exit 75")
    cancelled = ends("cancelled", waits)
    eventually((tmp_path / "cancelled" / "here").exists, "the job to cancel runs", DEADLINE_S)
    cluster.run("scancel", cancelled)
    for job, state, code, restarts in (
        (fails, "FAILED", "3:0", "0"),
        (misused, "FAILED", "2:0", "0"),
        (preempted, "FAILED", "75:0", "1"),
        (cancelled, "CANCELLED", None, "0"),
    ):
        eventually(lambda job=job, state=state: cluster.job(job)["JobState"] == state, f"{job} {state}", DEADLINE_S)
        said = cluster.job(job)
        assert said["Restarts"] == restarts and (code is None or said["ExitCode"] == code), said
    (log,) = (tmp_path / "preempted" / "logs").glob("slurm-*.log")
    assert "preempted, but requeued 1 times already: not requeued" in log.read_text()


def test_a_rejection_of_slurm_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    command = [*LAUNCH, "slurm", "--nodes", "2", "--partition", "nowhere", "--submit", "--", "true"]
    cluster.run("sh", "-c", f"{' '.join(command)} 2>rejection", cwd=tmp_path, code=1)
    rejection = (tmp_path / "rejection").read_text()
    assert rejection.startswith("launch slurm: sbatch: error: ") and len(rejection.splitlines()) == 1


TIER = """\
import os, pathlib, sys
tier, at = pathlib.Path(os.environ["ORCHESTRATOR_TIER_DIR"]), pathlib.Path(sys.argv[1])
restart, node = os.environ["ORCHESTRATOR_RESTART_COUNT"], os.environ["SLURM_PROCID"]
found = sorted(path.name for path in tier.iterdir())
(at / f"{restart}-{node}").write_text(f"{oct(tier.stat().st_mode & 0o777)} {os.environ['ORCHESTRATOR_TIER_SECRET']}")
(at / f"{restart}-{node}.found").write_text(" ".join(found))
if restart == "0":
    (tier / f"held-{node}").touch()
    while len(list(tier.iterdir())) < 2: pass
sys.exit(75 if restart == "0" else 0)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif("SLURM_REPORT" not in os.environ, reason="half a minute: `make test-slurm` runs it")
def test_memory_tiers_outlast_a_requeue_and_go_with_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """The nodes of this cluster share one /dev/shm."""
    (tmp_path / "said").mkdir()
    (shm := tmp_path / "shm").mkdir()
    (shm / f"orchestrator-slurm-{os.getuid()}-999999").mkdir()  # of a job that the queue has no more
    flags = ["--nodes", "2", "--tiers", "--env", f"ORCHESTRATOR_TIER_DIR={shm}"]
    job = submit(cluster, tmp_path, flags, [sys.executable, "-c", TIER, str(tmp_path / "said")])
    until_runs(cluster, job, 1)
    shown = cluster.run("scontrol", "show", "job", job)
    eventually(lambda: cluster.job(job)["JobState"] == "COMPLETED", "the end", DEADLINE_S)
    said = {path.name: path.read_text() for path in (tmp_path / "said").iterdir()}
    assert [said[f"0-{node}.found"] for node in "01"] in (["", ""], ["", "held-0"], ["held-1", ""])
    assert {said[f"1-{node}.found"] for node in "01"} == {"held-0 held-1"}, "what was held before the requeue"
    modes, secrets = zip(*(said[f"{restart}-{node}"].split() for restart in "01" for node in "01"), strict=True)
    assert set(modes) == {"0o700"}
    assert secrets[0] == secrets[1] != secrets[2] == secrets[3], "one secret for each start"
    written = [path.read_text() for path in (tmp_path / "logs").rglob("*.log")]
    assert not any(secret in text for secret in secrets for text in (shown, *written))
    eventually(lambda: not list(shm.iterdir()), "the tiers of both jobs gone", DEADLINE_S)
