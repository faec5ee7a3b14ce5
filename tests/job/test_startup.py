"""One job, one place, one configuration: hosts that do not share their root, or were given different things, all hear
of it when they meet, and nothing was opened or written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.job import startup
from orchestrator.rules import configuration
from orchestrator.rules.configuration import OPTIONS, ORBAX, RULES, Rule, described, differences, digest, of_agent, who
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.storage.read_only import ReadOnlyStorage
from tests.support import gcs
from tests.support.fakes import HookedStorage
from tests.support.processes import free_port
from tests.support.runs import catalog_of, fill, journal_of, now, state

JOB = Path(__file__).parents[1] / "support" / "jobs" / "meeting_job.py"
HOSTS = 3


@dataclass
class Met:
    """What each process said in each row, and the folder in which they met."""

    folder: Path
    rows: dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Met]:
    folder = tmp_path_factory.mktemp("meeting")
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


# What a network file system's cache shows late.


class Late(HookedStorage):
    """A store whose objects are seen only when it has been asked to look again `after` times."""

    def __init__(self, root: Path, after: int, error: bool = False) -> None:
        super().__init__(PosixStorage(str(root)))
        self.after, self.error = after, error

    def get(self, key: str, *most_bytes: int) -> bytes | None:
        if self.after <= 0:
            return super().get(key, *most_bytes)
        if self.error:
            self.after -= 1
            raise oc.Unavailable(f"read {key}: ESTALE")
        return None

    def refresh(self, key: str) -> None:
        self.after -= 1


@pytest.mark.parametrize("error", [False, True])
def test_what_another_host_wrote_may_be_seen_late(root: Path, error: bool) -> None:
    fill(root, 1)
    writer = catalog_of(root)
    key, head = startup.mark(writer), writer.require_head()
    looks: list[Callable[[JournalStore], bool]] = [
        partial(startup.has, key=key),
        partial(startup._has_entry, version=head.version, write_id=head.write_id),
    ]
    for look in looks:
        assert startup.awaited(partial(look, JournalStore(Late(root, after=3, error=error), "other")), timeout_s=60)
        never = partial(look, JournalStore(Late(root, after=10**6, error=error), "other"))
        if error:
            with pytest.raises(oc.Unavailable, match="ESTALE"):
                startup.awaited(never, timeout_s=0.4)
        else:
            assert not startup.awaited(never, timeout_s=0.4)
    assert not startup._has_entry(writer, head.version, "of another journal")
    startup.unmark(writer, key)
    assert not startup.has(writer, key)


def test_whoever_looks_again_opens_all_directories_from_the_top_and_makes_none(tmp_path: Path) -> None:
    """As NFS asks its server when a directory is opened. What is not there yet is no error."""
    root = tmp_path / "above" / "run"
    down = ["/", *(f"{path}/" for path in reversed([root, *[*root.parents][:-1]]))]
    opened: list[str] | None = None
    sys.addaudithook(
        lambda event, args: opened.append(str(args[0])) if opened is not None and event == "open" else None
    )
    there: list[Path] = []
    for made in (None, root.parent, root, root / "steps"):
        if made:
            made.mkdir()
            there.append(made)
        opened = []
        ReadOnlyStorage(PosixStorage(str(root))).refresh("steps/.probe-x")
        found, opened = opened, None
        assert [path for path in found if path.endswith("/")] == down[: len(down) - 1 + min(len(there), 1)]
        assert found.count(".") == max(0, len(there) - 1)
        assert sorted(tmp_path.rglob("*")) == there


def test_a_mark_that_a_crash_has_left_is_no_part_of_the_run(root: Path) -> None:
    left = startup.mark(catalog_of(root))
    assert oc.Agent(root).latest_step() is None  # still a new run
    fill(root, 1, 2, keep=oc.last(1))
    assert (root / left).is_file() and oc.open_run(root).all_steps() == [2]
    for command in ("ls", "doctor", "verify", "gc", "recover"):
        assert main(["orchestrator", command, str(root)]) == 0, command
    assert (root / left).is_file()
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(3, state(3)) and journal_of(root)[-1].epoch == 2


# The rules, pure.


def test_every_option_has_a_rule_and_nothing_else_has() -> None:
    assert [field.name for field in fields(oc.Options)] == list(OPTIONS)
    own = {name for name, rule in OPTIONS.items() if rule is Rule.OWN}
    assert of_agent(None, None, oc.Options()).keys() == {"save", "keep"} | {
        f"Options.{n}" for n in OPTIONS.keys() - own
    }
    assert startup.surroundings().keys() <= RULES.keys()
    assert {*configuration.PACKAGES, *configuration.JAX_SETTINGS, *configuration.ENVIRONMENT} <= RULES.keys()


class Own:
    """A policy of the user's own; `made` differs from host to host."""

    def __init__(self, made: object) -> None:
        self.made = made

    def keep(self, steps: Any, now: float) -> frozenset[int]:
        return frozenset()


@dataclass(frozen=True)
class OwnValue(Own):
    made: object
    score: Callable[[Any], float] = len

    def __or__(self, other: Any) -> Any: ...


ONE_AND_THE_SAME: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "every": lambda: oc.every(3),
    "at": lambda: oc.at([*range(100, 0, -1), 10**6]),
    "at, too long": lambda: oc.at(range(1000)),
    "combined": lambda: oc.every(3) | oc.every_seconds(2) | oc.auto(60),
    "kept": lambda: oc.last(2) | oc.best("loss", 2) | oc.within(3) | oc.every_nth(4),
    "own": lambda: Own(object()),
    "own, combined": lambda: oc.last(1) | Own(object()),
    "own value": lambda: OwnValue(3, lambda found: 0.0),
    "function": lambda: lambda step: True,
    "partial": lambda: partial(print, object()),
    "nested": lambda: {"b": {2, "x", None}, "a": [object(), (1, 2.5)]},
}


@pytest.mark.parametrize("what", ONE_AND_THE_SAME)
def test_what_was_made_alike_is_described_alike_and_shortly(what: str) -> None:
    one, other = (described(ONE_AND_THE_SAME[what]()) for _ in range(2))
    assert one == other and len(one) <= configuration.TEXT_CHARS and "0x" not in one


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (oc.every(3), oc.every(4)),
        (oc.every(3), oc.every_seconds(3)),
        (oc.every(3), None),
        (oc.at(range(1000)), oc.at(range(1001))),
        (oc.at(range(1000)), oc.at([*range(998), 5000, 5001])),
        (oc.every(3) | oc.at([1]), oc.every(3) | oc.at([2])),
        (oc.best("loss"), oc.best("loss", mode="max")),
        (oc.last(2) | oc.best("loss"), oc.last(2) | oc.best("val_loss")),
        (OwnValue(3), OwnValue(4)),
        (Own(1), OwnValue(1)),
        (60.0, None),
        (True, "True"),
    ],
)
def test_what_was_made_otherwise_is_described_otherwise(one: object, other: object) -> None:
    assert described(one) != described(other)
    assert digest({"save": described(one)}) != digest({"save": described(other)})


def test_differences_are_listed_by_rule_with_process_0_first_and_the_first_of_many() -> None:
    told = [{"save": "a", "jax": "1", "numpy": "2", "Options.attest": "'off'"} for _ in range(40)]
    assert differences(told, partial(who, {})) == ([], [])
    for process in range(1, 40):
        told[process]["save"] = "b"
    told[7] |= {"jax": "2", "Options.attest": "'full'", "of a later version": "1"}
    errors, notes = differences(told, partial(who, {process: f"h{process}" for process in range(40)}))
    some = "1 (h1), 2 (h2), 3 (h3), 4 (h4), 5 (h5), 6 (h6), 7 (h7), 8 (h8) and 31 more"
    assert errors[0] == f"save: a on process 0 (h0); b on processes {some}"
    assert errors[1].endswith("; 'full' on process 7 (h7)") and len(errors) == 2
    assert [note.partition(":")[0] for note in notes] == ["jax", "of a later version"]
    assert notes[1].startswith("of a later version: not known on processes 0 (h0), 1 (h1)")


def test_options_that_are_each_hosts_own_are_not_compared() -> None:
    mine = oc.Options(events_dir="a", metrics_port=1, metrics_address="::1", metrics_file="m", traces=True)
    assert of_agent(None, None, mine) == of_agent(None, None, oc.Options())
