"""What stands where the launchers expect a small file: anything, and none of it stops or blocks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import plainfile, supervise
from launch.command import LaunchError
from launch.engines import gke, local
from launch.heartbeats import Heartbeats
from orchestrator import environment
from orchestrator.observe import heartbeat

pytestmark = pytest.mark.timeout(60)

BEAT = {"doing": "training", "step": 7, "pid": 1}


def text(body: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(body.encode() if isinstance(body, str) else body)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def held_fifo(path: Path) -> None:
    os.mkfifo(path)
    os.open(path, os.O_RDWR)  # until this process ends; a reader waits for what never comes


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "a list": text("[]"),
    "null": text("null"),
    "a number": text("3"),
    "a string": text('"step"'),
    "true": text("true"),
    "nothing": text(""),
    "half": text('{"doing": "tra'),
    "bytes": text(b"\xff\xfe\x00"),
    "deep": text("[" * 60_000),
    "long": text('{"step": 7, "doing": "' + "x" * 70_000 + '"}'),
    "a number without end": text('{"step": ' + "9" * 6000 + "}"),
    "a directory": lambda path: path.mkdir(),
    "a FIFO": lambda path: os.mkfifo(path),
    "a FIFO with a writer": held_fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "a terabyte": sparse,
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_heartbeat_that_no_agent_wrote_counts_for_nothing(what: str) -> None:
    beats = Heartbeats()
    try:
        UNREADABLE[what](beats.path(0))
        beats.path(1).write_text(json.dumps(BEAT))
        assert beats.poll(5.0) == {1: 0.0}
        assert (beats.steps, beats.doing) == ({1: 7}, {1: "training at step 7"})
    finally:
        beats.close()


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        ({"step": True}, {}),
        ({"step": "7"}, {}),
        ({"step": None}, {}),
        ({"step": 7.0}, {}),
        ({"step": [7]}, {}),
        ({"step": {"a": 1}, "doing": {"b": [2]}}, {}),
        ({"step": -1, "doing": "x" * 9999}, {0: -1}),
        ({}, {}),
    ],
)
def test_a_heartbeats_members_of_another_type_are_left_out(said: dict[str, object], steps: dict[int, int]) -> None:
    beats = Heartbeats()
    try:
        beats.path(0).write_text(json.dumps(said))
        assert beats.poll(1.0) == {0: 0.0}
        assert beats.steps == steps and len(beats.doing[0]) <= 200
    finally:
        beats.close()


def test_other_names_are_left_out_and_a_lost_directory_makes_nobody_silent() -> None:
    beats = Heartbeats()
    try:
        for name in ("²", "٣", "1.77", "-1", " 2", "x"):
            beats.path(0).with_name(name).write_text(json.dumps(BEAT))
        assert beats.poll(1.0) == {}
        beats.path(3).write_text(json.dumps(BEAT))
        assert beats.poll(1.0) == {3: 0.0} and beats.poll(2.0) == {3: 1.0}
    finally:
        beats.close()
    assert beats.poll(9999.0) == {}, "who cannot be heard is not known to be silent"


def test_a_heartbeat_that_finds_no_room_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "beat"
    monkeypatch.setenv(environment.HEARTBEAT_FILE, str(file))
    monkeypatch.setattr(heartbeat, "_last", heartbeat._Last())
    heartbeat.record("training", 1)
    os.utime(file, (0, 0))
    (tmp_path / f"beat.{os.getpid()}").mkdir()  # in the way of the new one, as a full disk is
    heartbeat.record("saving", 2)
    assert file.stat().st_mtime > 0 and json.loads(file.read_text())["step"] == 1


NOT_A_LIST_OF_HOSTS = {
    name: make
    for name, make in UNREADABLE.items()
    if name in ("bytes", "a directory", "a FIFO with a writer", "a device", "a link to nothing", "a terabyte")
}


@pytest.mark.parametrize("what", NOT_A_LIST_OF_HOSTS)
def test_a_hosts_file_that_is_none_is_one_line(what: str, tmp_path: Path) -> None:
    NOT_A_LIST_OF_HOSTS[what](tmp_path / "hosts")
    job = local.LocalJob(
        ["true"], 2, hosts_file=tmp_path / "hosts", policy=supervise.RestartPolicy(elastic=(1, 2)), wait_for_hosts_s=1.0
    )
    with pytest.raises(LaunchError, match=r"^--hosts_file .*/hosts: [^\n]+$"):
        local._hosts_there(job, supervise.JobHistory(2, restarts=2), time.sleep)


@pytest.mark.parametrize(
    "body",
    [
        "a: &a [*a]",
        "[" * 3000,
        "a: !!python/object/apply:os.system [x]",
        "? [1, 2]\n: 3",
        "- 1",
        "",
        "a: 0x_",
        "\n".join(["n0: &n0 [1]", *(f"n{i + 1}: &n{i + 1} [{', '.join([f'*n{i}'] * 10)}]" for i in range(12))]),
        "\xff\0",
    ],
)
def test_yaml_that_is_no_manifest_is_one_line(body: str, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(body)
    with pytest.raises(LaunchError, match=r"^--check=[^\n]+$"):
        gke.read(tmp_path)


@pytest.mark.parametrize("what", ["a FIFO", *(name for name in NOT_A_LIST_OF_HOSTS if name != "bytes")])
def test_what_is_no_file_among_manifests_is_one_line(what: str, tmp_path: Path) -> None:
    UNREADABLE[what](tmp_path / "m.yaml")
    with pytest.raises(LaunchError, match=r"^--check=[^\n]+$"):
        gke.read(tmp_path)


@pytest.mark.parametrize(
    "body",
    [
        'kind: "\\e]0;x\\a"\napiVersion: "\\x9b\\u202e"\nmetadata: {name: "\\r"}',
        "kind: []",
        "kind: {a: b}\napiVersion: 3",
        "kind: Job\napiVersion: batch/v1\nmetadata: [1]\nspec: 3",
        'kind: JobSet\napiVersion: jobset.x-k8s.io/v1alpha2\nmetadata: "\\e[2J"\nspec: {replicatedJobs: [3]}',
    ],
)
def test_a_manifest_of_wrong_types_is_faults_fit_for_a_terminal(body: str, tmp_path: Path) -> None:
    pytest.importorskip("kubernetes_validate")
    (tmp_path / "m.yaml").write_text(body)
    done = subprocess.run(
        [sys.executable, "-m", "launch", "gke", f"--check={tmp_path}"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.replace("\n", "").isprintable()


def test_an_ordinary_file_is_read_and_a_larger_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("Grüße")
    (tmp_path / "b").symlink_to("a")
    assert plainfile.read_text(tmp_path / "a") == plainfile.read_text(tmp_path / "b", 7) == "Grüße"
    with pytest.raises(OSError, match="more than 6 bytes"):
        plainfile.read_text(tmp_path / "a", 6)
