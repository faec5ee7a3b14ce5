"""One job, one place, one configuration: hosts that do not share their root, or were given different things, all hear
of it when they meet, and nothing was opened or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.rules.configuration import ORBAX
from tests.support import gcs
from tests.support.processes import free_port
from tests.support.runs import fill

JOB = Path(__file__).parents[1] / "support" / "jobs" / "startup_job.py"
HOSTS = 3


@dataclass
class Met:
    """What each process said in each row, and the folder in which they met."""

    folder: Path
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Met]:
    folder = tmp_path_factory.mktemp("startup")
    namespaces = bool(shutil.which("unshare")) and not subprocess.run(["unshare", "-m", "true"], check=False).returncode
    fill(folder / "seed", 1, 2, 3)
    shim = folder / "shim" / "tensorstore-9.9.9.dist-info"
    for made in (shim, folder / "own", *(folder / f"{name}-{index}" for name in ("own", "cwd") for index in range(3))):
        made.mkdir(parents=True)
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorstore\nVersion: 9.9.9\n")
    bucket, port = gcs.new_root(), free_port()
    processes = []
    for index in range(HOSTS):
        own = folder / ("own" if namespaces else f"own-{index}")
        command = [sys.executable, str(JOB), *map(str, (index, HOSTS, port, folder, own, bucket))]
        if namespaces:  # the same path, and another file system behind it for each
            inside = 'mount -t tmpfs none "$0" && exec "$@"'
            command = ["unshare", "-m", "--propagation", "private", "sh", "-c", inside, str(own), *command]
        paths = [*([shim.parent] if index == 1 else []), JOB.parents[3]]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        with (folder / f"{index}.jsonl").open("w") as out, (folder / f"{index}.err").open("w") as err:
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environ))
    try:
        end = time.monotonic() + 300
        for process in processes:
            process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.wait(10)
    outputs = [(folder / f"{index}.jsonl").read_text().splitlines() for index in range(HOSTS)]
    lines = [[json.loads(line) for line in output if line.startswith("{")] for output in outputs]
    story = "\n".join((folder / f"{index}.err").read_text()[-2000:] for index in range(HOSTS))
    assert [process.returncode for process in processes] == [0] * HOSTS, story
    yield Met(folder, {row[0]["event"]: list(row) for row in zip(*lines, strict=True)})


PLACES = {
    "not shared: save": ("processes 1 (host-1), 2 (host-2)", "do not see what process 0 (host-0) wrote there just now"),
    "not shared: restore": ("processes 1 (host-1), 2 (host-2)", "do not see what process 0 (host-0) wrote"),
    "one is elsewhere": ("job: process 2 (host-2) (at file://", "does not see what process 0 (host-0) wrote"),
    "relative": ("processes 1 (host-1), 2 (host-2) (at file://", "cwd-1/run, file://", "a relative path begins at"),
    "copies of a run: restore": ("processes 1 (host-1), 2 (host-2)", "do not see what process 0 (host-0) wrote"),
    "copies of a run: save": ("processes 1 (host-1), 2 (host-2)", "do not see what process 0 (host-0) wrote"),
    "a run for process 0 only": ("processes 1 (host-1), 2 (host-2)", "the journal that process 0 (host-0) sees"),
    "a run for process 2 only": ("processes 0 (host-0), 1 (host-1)", "the journal that process 2 (host-2) sees"),
    "a bucket": ("process 2 (host-2) (at gs://", "does not see what process 0 (host-0) wrote there just now"),
    "compat: a reader": ("processes 1 (host-1), 2 (host-2)", "the journal that process 0 (host-0) sees"),
}


@pytest.mark.jobs
@pytest.mark.parametrize("row", PLACES)
def test_hosts_whose_roots_are_not_one_place_are_named_on_all_of_them(row: str, met: Met) -> None:
    told = met.rows[row]
    assert [(each["kind"], each["epoch"]) for each in told] == [("UsageError", None)] * HOSTS
    assert len({each["text"] for each in told}) == 1
    text = told[0]["text"]
    assert "is not one place for all hosts of this job" in text and "nothing was opened or saved" in text
    for part in PLACES[row]:
        assert part in text, text


ALIKE = "the hosts of this job are not configured alike; give all of them the same:\n  "
DIFFER = {
    "save": ["save: Every(n=1) on processes 0 (host-0), 2 (host-2); Every(n=5) on process 1 (host-1)"],
    "keep": ["keep: None on process 0 (host-0); Last(n=2) on processes 1 (host-1), 2 (host-2)"],
    "options": [
        "Options.save_timeout_s: 60.0 on processes 0 (host-0), 2 (host-2); 61.0 on process 1 (host-1)",
        "Options.attest: 'off' on processes 0 (host-0), 1 (host-1); 'full' on process 2 (host-2)",
    ],
    "tiers": [
        "tiers: \"memory(every=20, copies=1, domain='node', keep=2)\" on process 0 (host-0); "
        "\"memory(every=20, copies=2, domain='rack', keep=2)\" on process 1 (host-1); None on process 2 (host-2)"
    ],
    "x64": ["jax_enable_x64: False on processes 0 (host-0), 2 (host-2); True on process 1 (host-1)"],
    "compat: options": [f"{ORBAX}max_to_keep: 3 on process 0 (host-0); 4 on processes 1 (host-1), 2 (host-2)"],
}


@pytest.mark.jobs
@pytest.mark.parametrize("row", DIFFER)
def test_hosts_that_were_given_different_things_are_named_with_what_they_were_given(row: str, met: Met) -> None:
    told = met.rows[row]
    assert [(each["kind"], each["epoch"]) for each in told] == [("UsageError", None)] * HOSTS
    assert {each["text"] for each in told} == {ALIKE + "\n  ".join(DIFFER[row])}


RIGHTS = {
    "no right to write": "create steps/",
    "no right to read": "list journal-index/: EACCES",
    "no right to read a run": "get journal/00000000000000000003.json: EACCES",
}


@pytest.mark.jobs
@pytest.mark.parametrize("row", RIGHTS)
def test_a_host_without_a_right_is_named_on_all_before_the_epoch_is_opened(row: str, met: Met) -> None:
    told = met.rows[row]
    assert [(each["kind"], each["epoch"]) for each in told] == [("StorageError", None)] * HOSTS
    assert told[0]["text"] == told[1]["text"] and told[0]["text"].startswith(f"process 2: {RIGHTS[row]}")


@pytest.mark.jobs
def test_versions_and_surroundings_that_differ_are_said_where_they_do_and_stop_nothing(met: Met) -> None:
    version = "tensorstore: {0} on processes 0 (host-0), 2 (host-2); 9.9.9 on process 1 (host-1)"
    deadline = "ORCHESTRATOR_STORE_DEADLINE_S: not set on processes 0 (host-0), 2 (host-2); '33' on process 1 (host-1)"
    for row, notes in (("alike", [version]), ("environment", [deadline, version])):
        for each in met.rows[row]:
            assert "kind" not in each
            expected = [] if each["process"] == 2 else notes  # process 0, and whoever is not as it
            assert len(each["said"]) == len(expected)
            for said, note in zip(each["said"], expected, strict=True):
                before, after = note.split("{0}") if "{0}" in note else (note, "")
                assert f"the hosts of this job differ in {before}" in said and said.endswith(after)


@pytest.mark.jobs
def test_who_is_rejected_leaves_no_file_at_any_root_and_who_is_not_saves(met: Met) -> None:
    assert all(each["steps"] == [1] and each["epoch"] == 1 for each in met.rows["alike"])
    assert all(each["steps"] == [1] for each in met.rows["relative, in one directory"])
    assert [(each["value"], each["epoch"]) for each in met.rows["in the end"]] == [(1, 3)] * HOSTS  # and `environment`
    for name in ("one", "no", "x64", "rights", "cwd-1", "cwd-2"):
        assert [path for path in (met.folder / name).rglob("*") if path.is_file()] == []
    seed = {str(path.relative_to(met.folder / "seed")) for path in (met.folder / "seed").rglob("*") if path.is_file()}
    copies = {0: ("copy", "copy again", "zero", "reader"), 1: ("copy", "copy again"), 2: ("copy", "copy again", "two")}
    for process, names in copies.items():
        there = {name for name in met.rows["in the end"][process]["own"] if not name.startswith("events/")}
        assert there - {"metrics"} == {f"{name}/{each}" for name in names for each in seed}
        # Who is not at process 0's place has not even made a directory at its own.
        probed = {"save", "restore"} if process == 0 else set()
        assert set(met.rows["in the end"][process]["roots"]) - {"events", "metrics"} == {*names, *probed}
    assert not (met.folder / "cwd-1" / "run").exists()
