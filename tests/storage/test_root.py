"""A run's root: what it may be called, and what happens when it is taken away from under an open job."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import orchestrator as oc
from orchestrator.arrays import ArrayOptions, ArrayWriter
from orchestrator.arrays.tree import flatten
from orchestrator.cli import main
from orchestrator.compat.adopt import adopt
from orchestrator.errors import Fenced, RootChanged, Unavailable, UsageError
from orchestrator.job.finalize import UserData
from orchestrator.job.outcome import Aborted
from orchestrator.job.participant import ParticipantFactory
from orchestrator.job.signals import Signals
from orchestrator.observe.event_log import EventLog
from orchestrator.observe.events import Alive
from orchestrator.storage import Created, PosixStorage, open_storage
from orchestrator.storage.directory import find
from tests.storage.test_directory import KEY, OPERATIONS
from tests.support.fakes import FakeBoard, HookedStorage
from tests.support.runs import fill, now, state, store_of


@pytest.fixture
def store(root: Path) -> PosixStorage:
    made = PosixStorage(str(root))
    made.create("journal/0", b"first")
    return made


# The root itself.


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    root.symlink_to(tmp_path / "disk")
    fill(root, 1)
    assert oc.open_run(root).restore().step == 1 and (tmp_path / "disk/journal").is_dir() and root.is_symlink()


def relink(root: Path) -> None:
    other = root.parent / "other"
    other.mkdir()
    root.unlink()
    root.symlink_to(other)


def replace(root: Path) -> None:
    root.rename(root.parent / "moved")
    shutil.copytree(root.parent / "moved", root)


TAKEN: dict[str, tuple[bool, Callable[[Path], object]]] = {
    "renamed": (False, lambda root: root.rename(root.parent / "moved")),
    "renamed, and another in its place": (False, replace),
    "deleted": (False, lambda root: shutil.rmtree(root.rename(root.parent / "going"))),  # at one moment
    "deleted, and made again": (False, lambda root: (shutil.rmtree(root), root.mkdir())),
    "a file now": (False, lambda root: (shutil.rmtree(root), root.write_text(""))),
    "linked to something else": (True, relink),
    "a link removed": (True, lambda root: root.unlink()),
    "a link to nothing": (True, lambda root: root.resolve().rename(root.parent / "moved")),
}


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("how", TAKEN)
def test_a_job_whose_root_is_taken_away_ends_before_it_writes_and_makes_no_other(
    how: str, asynchronous: bool, root: Path, tmp_path: Path
) -> None:
    linked, take = TAKEN[how]
    if linked:
        (tmp_path / "disk").mkdir()
        root.symlink_to(tmp_path / "disk")
    agent = oc.Agent(root, options=oc.Options(async_save=asynchronous))
    try:
        agent.save(1, state(1))
        agent.wait_until_finished()
        agent._deletion.wait(10)
        take(root)
        before = everything(tmp_path)
        with pytest.raises(RootChanged, match=str(root)) as caught:
            agent.save(2, state(2))
            agent.wait_until_finished()
        assert isinstance(caught.value, Fenced)
        with pytest.raises(RootChanged):  # for good
            agent.save(3, state(3))
        assert everything(tmp_path) == before
    finally:
        with pytest.raises(RootChanged):
            agent.close()
    assert everything(tmp_path) == before


@pytest.mark.parametrize("moment", ["intent.json", "receipts/", "manifest.json", "journal/"])
@pytest.mark.parametrize("how", ["renamed", "renamed, and another in its place", "deleted"])
def test_a_root_may_be_taken_at_any_moment_of_a_save(how: str, moment: str, root: Path) -> None:
    armed = False

    def before(operation: str, key: str) -> None:
        nonlocal armed
        if armed and operation == "create" and moment in key:
            armed = False
            TAKEN[how][1](root)
            taken.extend(everything(root))

    taken: list[str] = []
    agent = oc.Agent(root, options=now(on_save_failure="warn"), storage=HookedStorage(PosixStorage(str(root)), before))
    agent.save(1, state(1))
    armed = True
    with pytest.raises(RootChanged):
        agent.save(2, state(2))
    with pytest.raises(RootChanged):
        agent.close()
    assert not armed and root.exists() == ("another" in how)
    assert everything(root) == taken


def test_a_save_looks_at_the_root_before_it_takes_anything_from_the_devices(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = oc.Agent(root, options=now())
    agent.save(1, state(1))
    root.rename(root.parent / "moved")
    staged: list[object] = []
    monkeypatch.setattr(ArrayWriter, "stage", lambda *arguments: staged.append(arguments))
    with pytest.raises(RootChanged):
        agent.save(2, state(2))
    assert staged == []


def test_a_host_that_alone_has_lost_the_root_says_so_to_the_others_and_ends(root: Path) -> None:
    journal_store, board = store_of(root), FakeBoard(1, 2)
    journal_store.storage.create("journal/0", b"x")
    signals = Signals(board, "i")
    participants = ParticipantFactory(
        journal_store, ArrayWriter(ArrayOptions(), 1), board, signals, None, now(), epoch=1
    )
    shutil.rmtree(root)
    save = participants.begin(1, UserData({}, {}, 0.0), None)
    signals.post_decision(save.id, Aborted("process 1 voted to abort"))
    save.start(flatten(state(1)))
    save.join(20)
    assert isinstance(save.error, RootChanged) and not root.exists()
    vote = signals.votes(save.id)[1]
    assert vote and vote.failure and vote.failure.cause.startswith("RootChanged: ") and vote.host == "host-1"


def everything(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


OF_A_TAKEN_ROOT = {name: work for name, work in OPERATIONS.items() if name != "read data"}


@pytest.mark.parametrize("operation", [*OF_A_TAKEN_ROOT, "list", "event"])
def test_nothing_is_done_to_a_root_that_is_gone(operation: str, store: PosixStorage, root: Path) -> None:
    log = EventLog(f"{root}/events", process=0, host="h", epoch=1)
    shutil.rmtree(root)
    if operation == "event":
        log.write(Alive("training", 1))
        log.close()
        assert log.dropped == 1
    else:
        work = OF_A_TAKEN_ROOT.get(operation, lambda store, key: list(store.list("journal/")))
        with pytest.raises(RootChanged, match="nothing is there any more"):
            work(store, KEY)
        log.close()
    assert not root.exists()


def test_a_root_that_comes_back_is_the_same_again(store: PosixStorage, root: Path) -> None:
    root.rename(root.parent / "moved")
    with pytest.raises(RootChanged):
        store.create("journal/1", b"x")
    (root.parent / "moved").rename(root)
    assert store.create("journal/1", b"x") == Created()


def test_whoever_opens_a_root_anew_in_the_same_process_gets_what_is_there_now(store: PosixStorage, root: Path) -> None:
    """A notebook that deletes its run and begins again, with the old objects still about."""
    shutil.rmtree(root)
    again = PosixStorage(str(root))
    assert again.get("journal/0") is None and again.create("journal/0", b"new") == Created()
    assert find(f"{root}/steps")[0] is again.root
    with pytest.raises(RootChanged):
        store.create("journal/1", b"old")


def test_what_was_opened_in_the_place_of_a_root_does_not_keep_that_one_from_coming_back(
    store: PosixStorage, root: Path
) -> None:
    root.rename(root.parent / "moved")
    with pytest.raises(RootChanged):
        store.create("journal/1", b"x")
    root.mkdir()
    intruder = PosixStorage(str(root))
    assert intruder.get("journal/0") is None
    root.rename(root.parent / "other")
    (root.parent / "moved").rename(root)
    with pytest.raises(RootChanged):
        intruder.create("journal/1", b"x")
    assert PosixStorage(str(root)).create("journal/1", b"x") == Created()


@pytest.mark.parametrize("how", ["renamed", "linked to something else", "a link removed"])
def test_a_loop_that_tries_again_in_the_same_process_begins_no_new_run(how: str, root: Path, tmp_path: Path) -> None:
    linked, take = TAKEN[how]
    if linked:
        (tmp_path / "disk").mkdir()
        root.symlink_to(tmp_path / "disk")
    agent = oc.Agent(root, options=now())
    agent.save(1, state(1))
    take(root)
    with pytest.raises(RootChanged):
        agent.save(2, state(2))
    before = everything(tmp_path)
    for _ in range(2):
        with pytest.raises(RootChanged):
            fill(root, 1)
        assert everything(tmp_path) == before
    if root.is_symlink():
        root.unlink()
    (tmp_path / ("disk" if linked else "moved")).rename(root) if not linked else root.symlink_to(tmp_path / "disk")
    fill(root, 2)  # it is back
    assert oc.open_run(root).all_steps() == [1, 2]


def test_a_server_that_does_not_answer_is_no_proof_that_the_root_is_another(
    store: PosixStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*arguments: object, **more: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    works = [lambda: store.create("journal/1", b"x"), lambda: store.delete("journal/0"), store.check_root]
    for call, tried in (("stat", works), ("open", [lambda: store.get("journal/0"), *works[:2]])):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, stale)
            for work in tried:
                with pytest.raises(Unavailable, match="ESTALE"):
                    work()
    assert store.create("journal/1", b"x") == Created()


# Names.

# With the run that a URL, or a library that takes a backslash for a slash, would take for it.
NAMES = {
    "a%41b": "aAb",
    "a%2fb": "a/b",
    "a%00b": "a",
    "a%b": "a%b~",
    "exp#12": "exp",
    "q?x": "q",
    "a|b": "a",
    "a\\b": "a/b",
    "a b": "a+b",
    "a+b": "a b",
    "é": "e\u0301",
    "a\nb": "a",
    "\x1b[2J": "2J",
    "..x": "x",
    "exp:12": "12",
    "'a\"b'": "ab",
    "$HOME": "HOME",
    "*": "b",
    "~": "home",
}
KINDS = ["plain", "compressed", "adopted", "adopted without ocdbt"]


def values(number: int) -> dict[str, Any]:
    return {"w": jnp.asarray(np.random.default_rng(number).standard_normal(3000), jnp.float32), "n": jnp.int32(number)}


def run_of(kind: str, root: str, number: int, aside: Path) -> None:
    """A run whose step 1 holds `values(number)`."""
    if kind.startswith("adopted"):
        # Orbax itself goes astray at a backslash.
        source = aside / f"orbax-{number}" / os.path.basename(root).replace("\\", "")
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=kind == "adopted")
        with ocp.CheckpointManager(source, item_handlers=handler) as manager:
            manager.save(1, args=ocp.args.PyTreeSave(values(number)))
        adopt(store_of(Path(root)), str(source))
        return
    with oc.Agent(root, options=now(compression=kind == "compressed")) as agent:
        agent.save(1, values(number))


def same(found: Any, number: int) -> bool:
    return all(bool((np.asarray(found[name]) == np.asarray(value)).all()) for name, value in values(number).items())


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main.main(["orchestrator", *words, "--json"])
    text = capsys.readouterr().out
    return code, json.loads(text) if text else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_root_of_any_name_holds_its_own_run_and_touches_no_neighbour(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, other = f"{tmp_path}/runs/{name}", f"{tmp_path}/runs/{NAMES[name]}"
    run_of(kind, other, 1, tmp_path)
    run_of(kind, root, 2, tmp_path)
    like = jax.tree.map(jnp.zeros_like, values(0))
    for _ in range(2):
        assert same(oc.open_run(root).restore(like).state, 2) and same(oc.open_run(other).restore(like).state, 1)
        assert same(oc.open_run(root).restore().state, 2)
        for words in (["verify"], ["watch", "--once"], ["plan", "--mesh=d=1"], ["doctor", "--read_only"], ["ls"]):
            code, told = command(capsys, words[0], root, *words[1:])
            assert code == 0, (words, told)
    for form in ("numpy", "orbax") if not kind.startswith("adopted") else ("numpy",):
        code, _ = command(capsys, "export", root, "1", f"{tmp_path}/out/{name}/{form}", f"--format={form}")
        assert code == 0
    assert (np.load(f"{tmp_path}/out/{name}/numpy/w.npy") == np.asarray(values(2)["w"])).all()
    code, told = command(capsys, "diff", root, "1", "1", f"--other={other}")
    assert code != 0 and told is not None
    assert sorted(os.listdir(tmp_path / "runs")) == sorted({name, NAMES[name].split("/")[0]})
    assert [step.trust for step in store_of(Path(root)).require_head().live] == ["verified"]


@pytest.mark.parametrize(
    ("root", "meant"),
    [
        ("file:run", "'run'"),
        ("file:/x", "'file:///x'"),
        ("FILE:run", "'run'"),
        ("gs:bucket/run", "'gs://bucket/run'"),
        ("gs:/bucket/run", "'gs://bucket/run'"),
        ("GS:bucket/run", "'gs://bucket/run'"),
        ("s3:bucket/run", "'s3://bucket/run'"),
        ("s3:/bucket/run", "'s3://bucket/run'"),
        ("https:x", "'https://x'"),
        ("gs:", "'gs://'"),
        ("s3://bucket/run", "no storage for s3://"),
        ("File://x/run", "no storage for File://"),
        ("file://run", "expected file:// and an absolute path"),
        ("gs://bucket", "expected gs://BUCKET/PREFIX"),
    ],
)
def test_what_was_meant_as_a_url_is_never_made_as_a_directory(
    root: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=meant):
        open_storage(root)
    assert main.main(["orchestrator", "ls", root]) == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("root", ["exp:12", "./file:run", "2026-11-26T10:00", "a:b/c", "sub/gs:x", "fileX:run"])
def test_a_plain_name_may_have_a_colon_in_it(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    open_storage(root).create("journal/0", b"x")
    assert (tmp_path / root / "journal/0").is_file()
