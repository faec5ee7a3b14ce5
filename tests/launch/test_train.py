"""The example job: what it trains does not depend on kills, meshes or process counts; what it is told wrong it says."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

import orchestrator as oc
from launch.contract import EXIT_PREEMPTED, PROCESS_INDEX
from launch.engines import local
from launch.example.data import Loader, read_text
from launch.example.report import ProgressLine, Summary, state_digest
from orchestrator.cli.main import main
from orchestrator.errors import NothingToRestore
from tests.support import forks

pytestmark = pytest.mark.jobs

TRAIN = (sys.executable, "-m", "launch.train")
SMALL = ("--layers=1", "--width=32", "--batch_size=8", "--length=32", "--log_every=1", "--digests")
REPO = Path(__file__).parents[2]
JOB_ENVIRON = {"PYTHONPATH": str(REPO)}


@dataclass
class Run:
    """How a job went on simulated hosts: its exit code, host 0's lines, and its summary if it came to that."""

    code: int
    lines: list[str]
    summary: Summary | None


def run(directory: Path, *flags: str, hosts: int, devices: int, kill_host_after_step: int | None = None) -> Run:
    """Run the job in `directory`/run to its end, or until its last host is killed without warning."""
    lines: list[str] = []
    pids: dict[int, int] = {}
    directory.mkdir(exist_ok=True)
    path = directory / "summary.json"
    path.unlink(missing_ok=True)

    def line(host: str, text: str) -> None:
        lines.append(f"{host} {text}")
        said = ProgressLine.parse(text)
        if said and said.step == kill_host_after_step and hosts - 1 in pids:
            os.kill(pids.pop(hosts - 1), signal.SIGKILL)

    observer = local.Observer(
        line, lines.append, lambda running: pids.update((host.index, host.pid) for host in running)
    )
    command = [*TRAIN, f"--root={directory / 'run'}", f"--summary={path}", *SMALL, *flags]
    rules = local.supervise.RestartPolicy(end_grace_s=1.0)
    code = local.run(local.LocalJob(command, hosts, devices, environ=JOB_ENVIRON, policy=rules), observer)
    return Run(code, lines, Summary.read(path) if path.exists() else None)


@functools.cache
def server() -> forks.Server:
    """Of processes of four devices that have imported what the example needs."""
    environ = {**forks.ENVIRON, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    return forks.Server((*forks.IMPORTED, "launch.example.model", "optax"), environ)


def train_alone(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """The job in one process, whose output goes to `folder`."""
    command = ["-m", "launch.train", *flags]
    with (folder / "out").open("w+") as out, (folder / "err").open("w+") as err:
        code = server().start(command, {**os.environ, **server().environ}, out, err).wait(180)
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), err.read())


@pytest.mark.slow
def test_a_killed_job_goes_on_as_if_never_killed_and_on_any_mesh(tmp_path: Path) -> None:
    """One story, because each start of a job costs seconds: unbroken, killed, resumed here, resumed elsewhere."""
    flags = ("--steps=24", "--save_every=5", "--mesh=data=2,model=2")
    unbroken = run(tmp_path / "unbroken", *flags, hosts=2, devices=2).summary
    assert unbroken is not None
    assert sorted(unbroken.losses) == list(range(24))
    assert sorted(unbroken.saved_digests) == [0, 5, 10, 15, 20, 23]
    assert unbroken.losses[23] < unbroken.losses[0] - 1

    killed = run(tmp_path / "killed", *flags, hosts=2, devices=2, kill_host_after_step=13)
    assert killed.code == 128 + signal.SIGKILL, killed.lines
    assert killed.summary is None
    shutil.copytree(tmp_path / "killed", tmp_path / "moved")

    resumed = run(tmp_path / "killed", *flags, hosts=2, devices=2)
    assert resumed.code == 0, resumed.lines
    assert resumed.summary is not None
    assert resumed.summary.restored_step in (5, 10)
    check_same_story(unbroken, resumed.summary)
    # Same mesh, same bits.
    assert resumed.summary.losses == {step: unbroken.losses[step] for step in resumed.summary.losses}
    assert resumed.summary.saved_digests == {
        step: unbroken.saved_digests[step] for step in resumed.summary.saved_digests
    }
    assert resumed.summary.state_digest == unbroken.state_digest

    moved = run(tmp_path / "moved", *flags, "--mesh=data=-1,model=4", hosts=1, devices=8)
    assert moved.code == 0, moved.lines
    assert moved.summary is not None
    assert moved.summary.mesh == {"data": 2, "model": 4}
    assert moved.summary.process_count == 1
    check_same_story(unbroken, moved.summary)
    # Another mesh adds numbers up in another order.
    for step, loss in moved.summary.losses.items():
        assert loss == pytest.approx(unbroken.losses[step], abs=1e-3)


def check_same_story(unbroken: Summary, resumed: Summary) -> None:
    """What must hold on every mesh: the very state that was saved came back, and then the batches it had not seen."""
    assert resumed.restored_step is not None
    assert resumed.restored_digest == unbroken.saved_digests[resumed.restored_step]
    assert resumed.start_step == resumed.restored_step + 1
    assert sorted(resumed.losses) == list(range(resumed.start_step, 24))
    assert resumed.batches == {step: unbroken.batches[step] for step in resumed.losses}
    assert (resumed.final_step, resumed.latest_step, resumed.interrupted_saves) == (23, 23, 0)


def test_a_host_that_fails_alone_ends_the_job_at_once_with_its_own_line(tmp_path: Path) -> None:
    script = f"exec {' '.join(TRAIN)} --root={tmp_path}/run --data={tmp_path}/${PROCESS_INDEX}"
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "text.txt").write_text("to be or not to be " * 1000)
    lines: list[str] = []
    observer = local.Observer(lambda host, text: lines.append(f"{host} {text}"), lines.append)
    rules = local.supervise.RestartPolicy(end_grace_s=1.0)
    job = local.LocalJob(["sh", "-c", script], 2, environ=JOB_ENVIRON, policy=rules)
    assert local.run(job, observer) == 2, lines
    assert f"host-1 train: --data={tmp_path}/1: not a directory; expected one with text files" in lines
    assert not [line for line in lines if "Traceback" in line]


def test_sigterm_saves_the_step_and_leaves_with_75(tmp_path: Path) -> None:
    root = tmp_path / "run"
    lines: list[str] = []
    pids: list[int] = []

    def line(host: str, text: str) -> None:
        lines.append(text)
        said = ProgressLine.parse(text)
        if said and said.step == 3 and said.loss is not None:
            os.kill(pids[0], signal.SIGTERM)

    observer = local.Observer(line, lines.append, lambda running: pids.extend(host.pid for host in running))
    command = [*TRAIN, f"--root={root}", "--steps=100000", "--save_every=1000", "--step_delay_s=0.05", *SMALL]
    rules = local.supervise.RestartPolicy(max_preemptions=0)
    code = local.run(local.LocalJob(command, 1, 4, environ=JOB_ENVIRON, policy=rules), observer)
    assert code == EXIT_PREEMPTED, lines
    (told,) = [text for text in lines if text.startswith("told to stop after step ")]
    assert oc.open_run(root).latest_step() == int(told.rpartition(" ")[2]) < 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mesh=data=3,model=2"], "train: --mesh=data=3,model=2 needs 6 devices; this job has 4 (1 processes)"),
        (["--mesh=data=3,model=-1"], "train: --mesh=data=3,model=-1 needs a multiple of 3 devices; this job has 4"),
        (["--mesh=rows=2"], "train: --mesh=rows=2: cannot use 'rows=2'; expected data=D,model=M, one of them may"),
        (["--batch_size=6"], "train: --batch_size=6: expected a multiple of 4, the mesh's data axis"),
        (["--steps=many"], "train: flag --steps=many: invalid literal"),
        (["--stpes=3"], "train: Unknown command line flag 'stpes'. Did you mean: steps"),
        (["extra"], "train: unexpected 'extra'; every setting is a flag, see --help"),
        (["--root="], "train: --root is required"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_one_line_and_exit_code_2(tmp_path: Path, flags: list[str], message: str) -> None:
    ended = train_alone(tmp_path, f"--root={tmp_path / 'run'}", "--steps=1", *flags)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_damaged_or_foreign_root_is_one_line_with_the_errors_own_code(tmp_path: Path) -> None:
    root = tmp_path / "run"
    small = [flag for flag in SMALL if flag != "--digests"]
    assert train_alone(tmp_path, f"--root={root}", "--steps=3", *small).returncode == 0

    other_text = train_alone(tmp_path, f"--root={root}", "--steps=4", *small, "--seed=7")
    assert other_text.returncode == 2
    restored, *told = other_text.stderr.splitlines()
    assert restored.startswith("restored step 2: ")
    assert told == [
        "train: data: seed is 7, the checkpoint was trained with 0; "
        "give the same --data, --seed and sizes, or another --root"
    ]

    other_model = train_alone(tmp_path, f"--root={root}", "--steps=4", *small, "--width=64")
    assert other_model.returncode == 1
    assert "leaves do not fit the target" in other_model.stderr
    assert "Traceback" not in other_model.stderr

    for step in oc.open_run(root).all_steps():
        assert main(["orchestrator", "quarantine", str(root), f"--step={step}", "--reason=x", "--force"]) == 0
    none_left = train_alone(tmp_path, f"--root={root}", "--steps=4", *small)
    assert none_left.returncode == NothingToRestore.exit_code
    assert "are quarantined (newest: step " in none_left.stderr
    assert len(none_left.stderr.splitlines()) == 1

    newest = sorted((root / "journal").iterdir())[-1]
    newest.chmod(0o644)
    newest.write_bytes(newest.read_bytes().replace(b'"epoch"', b'"epohc"'))
    damaged = train_alone(tmp_path, f"--root={root}", "--steps=4", *small)
    assert damaged.returncode == 4
    assert damaged.stderr.startswith("train: ")
    assert newest.name in damaged.stderr
    assert len(damaged.stderr.splitlines()) == 1

    a_file = tmp_path / "file"
    a_file.write_text("not a directory")
    on_a_file = train_alone(tmp_path, f"--root={a_file}", "--steps=4", *small)
    assert on_a_file.returncode == 1
    assert len(on_a_file.stderr.splitlines()) == 1


# The parts, in this process.


def take(loader: Loader, count: int) -> list[bytes]:
    return [loader.next().tobytes() for _ in range(count)]


def test_the_loader_resumes_with_unseen_batches_and_each_window_comes_once_a_pass() -> None:
    text = (np.arange(1001) % 251).astype(np.uint8).tobytes()
    settings = {"batch_size": 4, "length": 10, "seed": 3}
    one = Loader(text, **settings)
    first = take(one, 30)  # 25 batches are one pass
    state = one.state_bytes()
    rest = take(one, 30)
    other = Loader(text, **settings)
    other.restore([state, state, state])
    assert take(other, 30) == rest

    windows = [batch[at : at + 44] for batch in first[:25] for at in range(0, 176, 44)]
    assert sorted(windows) == sorted(
        np.frombuffer(text, np.uint8)[at : at + 11].astype(np.int32).tobytes() for at in range(0, 1000, 10)
    )
    assert first[:5] != first[25:], "the next pass has another order"


def test_the_loader_rejects_a_position_in_another_text_and_positions_that_differ() -> None:
    one = Loader(b"x" * 1000, batch_size=4, length=10, seed=3)
    state = one.state_bytes()
    one.next()
    with pytest.raises(oc.Damaged, match="2 different data positions"):
        one.restore([state, one.state_bytes()])
    with pytest.raises(oc.UsageError, match=r"data: text is \w+, the checkpoint was trained with \w+"):
        Loader(b"y" * 1000, batch_size=4, length=10, seed=3).restore([state])
    with pytest.raises(oc.UsageError, match="the text has 5 bytes"):
        Loader(b"short", batch_size=4, length=10, seed=3)


def test_the_text_is_all_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1").write_bytes(b"second")
    (tmp_path / "a.txt").write_bytes(b"first ")
    assert read_text(tmp_path) == b"first second"
    assert len(read_text()) > 1_000_000


def test_the_digest_sees_every_bit_and_no_sharding(mesh8: jax.sharding.Mesh) -> None:
    value = np.arange(32, dtype=np.float32).reshape(8, 4)

    def placed(value: np.ndarray, *axes: str) -> dict[str, jax.Array]:
        spec = jax.sharding.PartitionSpec(*axes)
        return {"w": jax.device_put(value, jax.sharding.NamedSharding(mesh8, spec))}

    split, whole = placed(value, "data", "model"), placed(value)
    assert state_digest(split, mesh8) == state_digest(whole, mesh8)
    changed = value.copy()
    changed.view(np.uint32)[7, 3] ^= 1
    assert state_digest(placed(changed, "data"), mesh8) != state_digest(whole, mesh8)
    assert state_digest({"v": whole["w"]}, mesh8) != state_digest(whole, mesh8)


@pytest.mark.parametrize(
    "line",
    [ProgressLine(3, 1.5), ProgressLine(12345, 0.25, "0badcafe"), ProgressLine(7), ProgressLine(7, digest="ab12")],
)
def test_a_line_of_progress_can_be_read_back(line: ProgressLine) -> None:
    assert ProgressLine.parse(str(line)) == line
    assert ProgressLine.parse("restored step 3") is None
