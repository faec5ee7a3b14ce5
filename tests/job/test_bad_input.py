"""What people and broken disks hand to us: each its own error, one clear message, and the root left as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import FileEntry, Head, crc32c
from orchestrator.run.deletion import collect
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from tests.support.snapshots import snapshot

LIKE = {"w": jnp.zeros(4)}


@pytest.fixture
def run(root: Path) -> Path:
    """A run with steps 1 and 2."""
    with oc.Agent(root, options=oc.Options(async_save=False, on_save_failure="raise")) as agent:
        for step in (1, 2):
            agent.save(step, {"w": jnp.full(4, float(step))})
    return root


def entries(run: Path) -> list[Path]:
    return sorted((run / "journal").iterdir())


def signed(record: dict[str, Any]) -> bytes:
    """A record changed by somebody who knows how to sign it."""
    fields = {name: value for name, value in record.items() if name != "crc32c"}
    body = json.dumps(fields, separators=(",", ":")).encode()[:-1]
    return body + b',"crc32c":"' + crc32c(body).encode() + b'"}\n'


def rewrite(file: Path, **changes: Any) -> None:
    file.write_bytes(signed({**json.loads(file.read_bytes()), **changes}))


def rejected(root: Path, act: Callable[[], Any], kind: type[oc.OrchestratorError]) -> str:
    """`act` raises exactly `kind`, with a message for people, and changes nothing. The message."""
    before = snapshot(root.parent)
    with pytest.raises(oc.OrchestratorError) as caught:
        act()
    assert type(caught.value) is kind, caught.value
    assert snapshot(root.parent) == before
    text = str(caught.value)
    assert "Traceback" not in text and text == text.strip() and text
    return text


def everything_that_opens(root: Path) -> dict[str, Callable[[], Any]]:
    """Each way into a run."""
    return {"reader": lambda: oc.open_run(root), "agent": lambda: oc.Agent(root)}


# Not a run.


NOT_RUNS = {
    "nothing there": "there is no such directory",
    "empty directory": "the directory is empty",
    "other files": "the directory has no journal/ in it",
    "a file": "it is a file, and a run is a directory",
    "empty journal": "the directory has no journal/ in it",
}


@pytest.mark.parametrize("what", NOT_RUNS)
def test_what_is_not_a_run_cannot_be_opened_for_reading(root: Path, what: str) -> None:
    if what == "a file":
        root.write_text("text")
    elif what != "nothing there":
        root.mkdir()
    if what == "other files":
        (root / "checkpoint.pt").write_bytes(b"torch")
        (root / "steps").mkdir()
    if what == "empty journal":
        (root / "journal").mkdir()
        (root / "journal" / "README").write_text("hand-made")
    text = rejected(root, lambda: oc.open_run(root), oc.NotARun)
    assert text == f"file://{root}: not a run: {NOT_RUNS[what]}"
    assert oc.NotARun.exit_code == 3


@pytest.mark.parametrize("root_given", ["", "s3://bucket/run"])
def test_a_root_that_no_store_serves(root: Path, root_given: str) -> None:
    for act in (lambda: oc.open_run(root_given), lambda: oc.Agent(root_given)):
        rejected(root, act, oc.UsageError)


# The journal.


@pytest.mark.parametrize("way", ["reader", "agent"])
@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), oc.Damaged, "do not end in a checksum; truncated"),
        (lambda file: file.write_bytes(b""), oc.Damaged, "0 bytes that do not end in a checksum"),
        (
            lambda file: file.write_bytes(file.read_bytes().replace(b'"step":2', b'"step":7')),
            oc.Damaged,
            "it was edited or damaged, not used",
        ),
        (
            lambda file: rewrite(file, version=99),
            oc.Damaged,
            "says it is version 99, expected 2; it was copied or renamed",
        ),
        (lambda file: rewrite(file, live="none"), oc.Damaged, "not a Head"),
        (lambda file: rewrite(file, format=2, anything=True), oc.NewerFormat, "format 2, this version reads up to 1"),
        (
            lambda file: rewrite(file, retired=[{"step": 1, "attempt": "../../..", "reason": "gotcha"}]),
            oc.UnsafeKey,
            "attempt name '../../..'",
        ),
    ],
    ids=["cut", "empty", "edited", "copied", "wrong type", "newer", "hostile"],
)
def test_a_newest_journal_entry_that_cannot_be_trusted_stops_everybody(
    run: Path, way: str, damage: Callable[[Path], Any], kind: type[oc.OrchestratorError], said: str
) -> None:
    damage(entries(run)[-1])
    text = rejected(run, everything_that_opens(run)[way], kind)
    assert said in text
    if kind is not oc.UnsafeKey:
        assert text.startswith(f"file://{entries(run)[-1]}: ")


def test_an_older_journal_entry_that_is_damaged_does_not_matter_as_an_entry_is_complete(run: Path) -> None:
    entries(run)[0].write_bytes(b"")
    assert oc.open_run(run).restore(LIKE).step == 2


def test_a_journal_entry_that_is_a_directory_is_an_error_not_a_gap(run: Path) -> None:
    newest = entries(run)[-1]
    newest.unlink()
    newest.mkdir()
    for opened in everything_that_opens(run).values():  # what was there is not to be overlooked
        with pytest.raises(oc.StorageError, match=f"{newest}: is a directory; expected a regular file"):
            opened().latest_step()


# Steps.


@pytest.mark.parametrize("step", [3, 0, -1, 10**9])
def test_a_step_that_is_not_there_names_those_that_are(run: Path, step: int) -> None:
    wanted = f"file://{run}: step {step} is not in this run; restorable steps: 1, 2"
    assert rejected(run, lambda: oc.open_run(run).restore(LIKE, step=step), oc.StepNotFound) == wanted
    agent = oc.Agent(run)
    assert rejected(run, lambda: agent.restore(LIKE, step=step), oc.StepNotFound) == wanted
    assert oc.StepNotFound.exit_code == 6


def test_a_step_asked_of_a_run_without_steps(root: Path) -> None:
    agent = oc.Agent(root)
    assert agent.restore(LIKE) is None
    text = rejected(root, lambda: agent.restore(LIKE, step=1), oc.StepNotFound)
    assert text.endswith("step 1 is not in this run; restorable steps: none")
    text = rejected(root, lambda: oc.open_run(root).restore(LIKE), oc.NothingToRestore)
    assert text.endswith("nothing to restore: no step has been committed yet")


HOSTILE = ["../../../../outside", "/etc/passwd", "state/../../../e0009-a01/x", "a//b", "state\\..\\x", ""]


@pytest.mark.parametrize("key", HOSTILE)
def test_a_manifest_that_names_a_file_outside_its_attempt_is_not_followed(run: Path, key: str) -> None:
    """The journal's checksum is made to fit: whoever wrote this could sign it."""
    (run.parent / "outside").write_text("secret")
    (manifest,) = run.glob("steps/00000002/*/manifest.json")
    fields = json.loads(manifest.read_bytes())
    fields["files"].append({"path": key, "bytes": 6, "crc32c": "00000000"})
    manifest.write_bytes(signed(fields))
    newest = entries(run)[-1]
    live = json.loads(newest.read_bytes())["live"]
    live[-1]["manifest_crc32c"] = crc32c(manifest.read_bytes())
    rewrite(newest, live=live)
    text = rejected(run, lambda: oc.open_run(run).restore(LIKE, step=2), oc.UnsafeKey)
    said = "is not a plain relative path; the record is damaged or hostile, not used"
    assert text == f"file://{manifest}: files: key {key!r} {said}"
    assert oc.open_run(run).restore(LIKE).step == 1


@pytest.mark.parametrize("attempt", ["..", "../../../victim", "e0001-a01/../../00000001/e0001-a01", "/victim"])
def test_a_journal_that_retires_something_outside_the_run_deletes_nothing(run: Path, attempt: str) -> None:
    victim = run.parent / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    rewrite(entries(run)[-1], retired=[{"step": 1, "attempt": attempt, "reason": "gotcha"}])
    store = JournalStore(PosixStorage(str(run)), "test")
    rejected(run, lambda: collect(store), oc.UnsafeKey)


def test_a_receipt_that_names_a_file_outside_its_attempt_never_gets_into_a_commit(run: Path) -> None:
    store = JournalStore(PosixStorage(str(run)), "test")
    with pytest.raises(oc.UnsafeKey):
        AttemptId(2, "e0001-a01").key("../x")
    with pytest.raises(oc.UnsafeKey):
        store.storage.create("steps/../../x", b"")


# Targets.


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ({"w": jnp.zeros(5)}, "w: checkpoint f32[4], target f32[5]; shapes must be equal"),
        (
            {"w": jax.ShapeDtypeStruct((4,), jnp.bfloat16)},
            "w: checkpoint f32[4], target bf16[4]; restore as f32 and cast, or pass cast=True",
        ),
        ({"w": jnp.zeros(4), "v": jnp.zeros(4)}, "v: not in the checkpoint, target f32[4]; it holds under (root): w"),
        ({}, "w: checkpoint f32[4], not in the target; add it, or restore with partial=True"),
        ({"w": 3}, "w: checkpoint f32[4], target int"),
        ({"w": {"kernel": jnp.zeros(4)}}, "w/kernel: not in the checkpoint, target f32[4]; it holds under (root): w"),
    ],
)
def test_a_target_that_does_not_fit_says_path_got_wanted_and_what_next(run: Path, like: Any, said: str) -> None:
    agent = oc.Agent(run)
    for act in (lambda: oc.open_run(run).restore(like), lambda: agent.restore(like)):
        text = rejected(run, act, oc.Mismatch)
        assert said in [line.strip() for line in text.splitlines()]
        assert "step 2" in text.splitlines()[0]
    assert agent.latest_step() == 2  # a wrong target is no damage: nothing is quarantined


def test_a_target_with_something_that_cannot_be_restored(run: Path) -> None:
    text = rejected(run, lambda: oc.open_run(run).restore({"w": object()}), oc.UnsupportedLeaf)
    assert text.startswith("w: builtins.object is neither an array nor a plain value")


# Roots that cannot be written.


@pytest.mark.parametrize("way", ["a file", "below a file", "journal is a file", "a full name"])
def test_a_root_that_cannot_be_written_names_path_and_cause(root: Path, way: str) -> None:
    where, cause = root, "ENOTDIR"
    if way == "below a file":
        root.write_text("text")
        where = root / "run"
    elif way == "a file":
        root.write_text("text")
    elif way == "journal is a file":
        root.mkdir()
        (root / ".tmp").mkdir()
        (root / "steps").mkdir()
        (root / "journal").write_text("text")
    else:
        where, cause = root / ("x" * 300), "ENAMETOOLONG"
        root.mkdir()
    begins = f"list {where}/journal" if way == "a full name" else f"create {where}/"
    for act in (lambda agent: agent.save(1, LIKE), lambda agent: agent.restore(LIKE)):
        text = rejected(root, lambda act=act: act(oc.Agent(where)), oc.StorageError)  # type: ignore[misc]
        assert text.startswith(begins) and cause in text


# Other jobs, other runs.


def test_another_jobs_run_is_left_alone(run: Path) -> None:
    agent = oc.Agent(run, options=oc.Options(async_save=False))
    text = rejected(run, lambda: agent.save(3, {"layers": [jnp.zeros(2)]}), oc.OtherJob)
    assert text.splitlines() == [
        f"file://{run} holds another job's state (step 2); use another root, or Options(other_tree=True):",
        "  layers/0: the run has nothing, this job f32[2]",
        "  w: the run has f32[4], this job nothing",
    ]


def test_a_run_copied_elsewhere_is_whole(run: Path) -> None:
    copy = run.parent / "copy"
    shutil.copytree(run, copy)
    shutil.rmtree(run)
    assert oc.open_run(copy).restore(LIKE).step == 2


def test_a_run_without_the_data_of_its_newest_step_steps_down(run: Path) -> None:
    shutil.rmtree(run / "steps" / "00000002")
    assert oc.open_run(run).restore(LIKE).step == 1
    text = rejected(run, lambda: oc.open_run(run).restore(LIKE, step=2), oc.Damaged)
    assert "manifest.json: is missing" in text


def test_a_head_that_promises_more_bytes_than_there_are(run: Path) -> None:
    """Sizes are compared before anything is read."""
    newest = entries(run)[-1]
    head = decode(newest.read_bytes(), Head, "here")
    store = JournalStore(PosixStorage(str(run)), "test")
    step = store.step(head.live[-1])
    manifest = step.manifest
    grown = [FileEntry(path=entry.path, bytes=entry.bytes + 1, crc32c=entry.crc32c) for entry in manifest.files]
    larger = type(manifest)(
        **{**{name: getattr(manifest, name) for name in manifest.__struct_fields__}, "files": tuple(grown)}
    )
    step.manifest = larger
    with pytest.raises(oc.Damaged, match=r"has \d+ bytes, the manifest says \d+"):
        step.check_sizes()
    assert encode(larger) != encode(manifest)


def test_every_error_has_an_exit_code_that_programs_can_rely_on() -> None:
    codes = {name: getattr(oc, name).exit_code for name in oc.__all__ if hasattr(getattr(oc, name), "exit_code")}
    assert codes == {
        **dict.fromkeys(
            [
                "Mismatch",
                "OrchestratorError",
                "OtherJob",
                "OutcomeUnknown",
                "SaveFailed",
                "StorageError",
                "Unavailable",
            ],
            1,
        ),
        "WaitTimeout": 1,
        **dict.fromkeys(["UnsupportedLeaf", "UsageError"], 2),
        **dict.fromkeys(["NewerFormat", "NotARun"], 3),
        **dict.fromkeys(["Damaged", "JournalLost", "UnsafeKey"], 4),
        **dict.fromkeys(["Fenced", "RootChanged"], 5),
        **dict.fromkeys(["NothingToRestore", "StepNotFound", "StepRetired"], 6),
    }
