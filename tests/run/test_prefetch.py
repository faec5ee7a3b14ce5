"""What `orchestrator prefetch` brings into a host's tier: from peers what is held, from the store each byte once."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest

import orchestrator as oc
from orchestrator.run import prefetched, tier_directory, tier_process
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.prefetch import COMMITTED, HELD, Fetched, Here, Prefetch
from orchestrator.storage import PosixStorage, open_storage
from orchestrator.storage.peer import Peer
from tests.support.damage import flip
from tests.support.fakes import HookedStorage
from tests.support.gcs import BUCKET, emulator, new_root
from tests.support.runs import LIKE, fill, now, state, store_of
from tests.support.tiers import agent, crashed_at_14, train

SECRET = bytes(range(32))


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[str]:
    """The address of a tier server for what is below a directory."""
    directory.mkdir(exist_ok=True)
    server = tier_process.start(tier_directory.base(str(directory)), SECRET)
    try:
        yield server.address
    finally:
        server.close()


def prefetch(root: Path, directory: Path, *peers: str, host: int = 0, hosts: int = 1, **more: float) -> Fetched:
    directory.mkdir(exist_ok=True)

    def here(run: str) -> Here:
        return Here(str(directory), host, hosts, [Peer(address, SECRET, run, 10.0) for address in peers])

    return Prefetch(store_of(root), here, **more).run()  # type: ignore[arg-type]


def there(root: Path, directory: Path) -> dict[str, bytes]:
    """What has been fetched into a tier, by its key."""
    run = tier_directory.identity(store_of(root))
    assert run
    where = Path(prefetched.of_run(str(directory), run))
    return {path.relative_to(where).as_posix(): path.read_bytes() for path in where.rglob("*") if path.is_file()}


def stored(root: Path, step: int) -> dict[str, bytes]:
    [attempt] = (root / "steps" / f"{step:08d}").iterdir()
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in attempt.rglob("*") if path.is_file()}


def test_every_byte_of_a_committed_step_leaves_the_store_once(tmp_path: Path) -> None:
    root = tmp_path / "run"
    fill(root, 1, 2)
    made = [prefetch(root, tmp_path / f"host-{host}", host=host, hosts=3) for host in range(3)]
    assert {(one.step, one.kind, tuple(one.problems)) for one in made} == {(2, COMMITTED, ())}
    parts = [there(root, tmp_path / f"host-{host}") for host in range(3)]
    everything = stored(root, 2)
    [manifest] = [key for key in everything if key.endswith("/manifest.json")]
    assert {part.pop(manifest) for part in parts} == {everything.pop(manifest)}, "by which a restore finds it"
    assert sum(map(len, parts)) == len(everything) and {**parts[0], **parts[1], **parts[2]} == everything
    assert [one.store_bytes for one in made] == [sum(map(len, part.values())) for part in parts]
    assert min(one.store_bytes for one in made) > 0
    again = prefetch(root, tmp_path / "host-0", host=0, hosts=3)
    assert (again.store_bytes, again.here_bytes) == (0, made[0].store_bytes), "and not twice"
    with serving(tmp_path / "host-0") as one, serving(tmp_path / "host-1") as two:
        new = prefetch(root, tmp_path / "new", one, two, host=1, hosts=3)
    assert (new.store_bytes, new.peers_bytes) == (0, 0), "what a peer has need not leave the store again"


def test_a_bucket_is_asked_for_each_object_by_one_host_alone(tmp_path: Path) -> None:
    root, server = new_root(), emulator()
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(1, state(1), process_state=b"here")
    store = JournalStore(open_storage(root), "test")
    made = []
    for host in range(3):
        (tmp_path / f"{host}").mkdir()
        made.append(Prefetch(store, lambda run, at=host: Here(str(tmp_path / f"{at}"), at, 3)).run())  # type: ignore[misc]
    assert [one.problems for one in made] == [[], [], []]
    log = json.loads(server.ask("GET", "/_emulator/requests")[2])
    below = f"{root.removeprefix(f'gs://{BUCKET}/')}/steps/"
    read = Counter(one["name"] for one in log if one["operation"] == "media" and below in one["name"])
    files = store.step(store.require_head().live[-1]).manifest.files
    assert sum(one.store_bytes for one in made) == sum(entry.bytes for entry in files)
    assert {count for name, count in read.items() if not name.endswith("/manifest.json")} == {1}
    assert len(read) == len(files) + 1, "and the manifest, by which each host knows the files"


def test_a_store_of_another_kind_gives_files_whole_and_says_which_is_missing(tmp_path: Path) -> None:
    fill(tmp_path / "run", 1)
    expected = stored(tmp_path / "run", 1)
    for path in list((tmp_path / "run").rglob("extra.json")):
        path.unlink()
    store = JournalStore(HookedStorage(PosixStorage(str(tmp_path / "run"))), "test")
    (tmp_path / "tier").mkdir()
    made = Prefetch(store, lambda run: Here(str(tmp_path / "tier"), 0, 1)).run()
    assert len(made.problems) == 1 and "extra.json: is missing" in made.problems[0]
    assert there(tmp_path / "run", tmp_path / "tier") == {
        key: body for key, body in expected.items() if not key.endswith("/extra.json")
    }


def test_the_newest_step_is_fetched_and_what_was_fetched_before_makes_room(tmp_path: Path) -> None:
    root, host = tmp_path / "run", tmp_path / "host"
    fill(root, 1)
    assert prefetch(root, host).step == 1
    fill(root, 2)
    assert prefetch(root, host).step == 2 and there(root, host) == stored(root, 2)
    assert prefetch(root, host, back=1).step == 1, "one restorable step back, as the restore in a crash loop"
    assert prefetch(root, host, back=2).step is None


def test_a_new_host_takes_its_part_of_a_held_step_from_a_peer_and_nothing_from_the_store(tmp_path: Path) -> None:
    root = crashed_at_14(tmp_path / "run")
    with serving(tmp_path / "tier") as address:
        made = prefetch(root, tmp_path / "new", address)
        assert (made.step, made.kind, made.store_bytes, made.problems) == (14, HELD, 0, [])
        held = {key: body for key, body in there(root, tmp_path / "new").items() if "/state/" in key}
        assert held and made.peers_bytes >= sum(map(len, held.values()))
        back = prefetch(root, tmp_path / "other", address, back=1)
        assert (back.step, back.kind) == (0, COMMITTED), "in a crash loop memory is left out"
        more = prefetch(root, tmp_path / "more", address, host=1, hosts=2)
        assert (more.step, more.kind, more.peers_bytes) == (14, HELD, 0), "which part it will need, nobody knows"
    own = prefetch(root, tmp_path / "tier")
    assert (own.step, own.kind, own.peers_bytes) == (14, HELD, 0) and own.here_bytes, "a survivor has it"


def test_what_a_peer_hands_over_is_checked_and_the_next_one_is_asked(tmp_path: Path) -> None:
    root = crashed_at_14(tmp_path / "run")
    subprocess.run(["cp", "-r", tmp_path / "tier", tmp_path / "copy"], check=True)
    [data] = [
        path for path in (tmp_path / "copy").rglob("steps/00000014/*/state/ocdbt.process_0/d/*") if path.is_file()
    ]
    flip(data)
    with serving(tmp_path / "copy") as bad:
        alone = prefetch(root, tmp_path / "alone", bad)
        assert len(alone.problems) == 1 and bad in alone.problems[0] and "the manifest says" in alone.problems[0]
        assert not [key for key in there(root, tmp_path / "alone") if key.endswith(data.name)], "nothing wrong is kept"
        with serving(tmp_path / "tier") as good:
            both = prefetch(root, tmp_path / "both", bad, good)
        assert both.problems == []
        [got] = [body for key, body in there(root, tmp_path / "both").items() if key.endswith(data.name)]
        assert got == next((tmp_path / "tier").rglob(f"steps/00000014/*/state/*/d/{data.name}")).read_bytes()
    gone = prefetch(root, tmp_path / "gone", bad)
    assert (gone.step, gone.kind) == (10, COMMITTED), "a peer that does not answer has nothing"


def test_what_cannot_be_had_is_left_to_the_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    fill(root, 1)
    late = prefetch(root, tmp_path / "late", timeout_s=0.0)
    assert late.problems and "the time is up" in late.problems[0] and len(there(root, tmp_path / "late")) == 1
    monkeypatch.setattr(tier_directory, "free_bytes", lambda path: 500)
    small = prefetch(root, tmp_path / "small")
    said = re.search(r"no room: needs (\d+) bytes, there are (\d+) ", small.problems[0])
    assert said and int(said[1]) > int(said[2]) <= 500
    assert small.store_bytes > 0
    assert all(len(body) <= 500 for key, body in there(root, tmp_path / "small").items() if "manifest" not in key)
    monkeypatch.undo()
    [data] = [path for path in root.rglob("state/ocdbt.process_0/d/*") if path.is_file()]
    flip(data)
    damaged = prefetch(root, tmp_path / "damaged")
    assert len(damaged.problems) == 1 and str(data) in damaged.problems[0]
    assert prefetch(tmp_path / "none", tmp_path / "nothing") == Fetched(), "a new run"


def test_what_was_fetched_stays_until_the_first_step_is_held_again(tmp_path: Path) -> None:
    """Also where logs list something newer that is not whole any more: then it is what is being restored."""
    root = crashed_at_14(tmp_path / "run")
    for path in list((tmp_path / "tier").rglob("steps/*/*/state/ocdbt.process_0/d/*")):
        if path.is_file():
            path.unlink()
    made = prefetch(root, tmp_path / "tier")
    assert (made.step, made.kind) == (10, COMMITTED)
    fetched = there(root, tmp_path / "tier")
    assert fetched == stored(root, 10)
    running = agent(root)
    try:
        assert (restored := running.restore(LIKE)) and restored.step == 10
        running._holding._freeing.wait(60.0)
        assert there(root, tmp_path / "tier") == fetched, "another host may still be reading it"
        train(running, 11, 12)
        running._holding._freeing.wait(60.0)
        assert there(root, tmp_path / "tier") == {}
    finally:
        running.close()


def data_of(root: Path, directory: Path) -> Path:
    """The data file of what was fetched."""
    run = tier_directory.identity(store_of(root))
    assert run
    found = Path(prefetched.of_run(str(directory), run)).rglob("state/ocdbt.process_0/d/*")
    [data] = [path for path in found if path.is_file()]
    return data


@pytest.mark.parametrize("case", ["whole", "not there yet", "half there", "damaged"])
def test_a_restore_takes_what_has_been_fetched_and_the_rest_from_the_store(tmp_path: Path, case: str) -> None:
    root = tmp_path / "run"
    fill(root, 1)
    assert prefetch(root, tmp_path / "tier").kind == COMMITTED
    data = data_of(root, tmp_path / "tier")
    if case == "damaged":
        flip(data)
    elif case == "half there":  # of which nothing has its name before it is whole
        temporaries = data.parents[7] / ".tmp"
        temporaries.mkdir(exist_ok=True)
        (temporaries / "0123").write_bytes(data.read_bytes()[:100])
    if case in ("not there yet", "half there"):
        data.unlink()
    running = agent(root)
    try:
        restored = running.restore(LIKE)
        assert restored and restored.step == 1 and jnp.array_equal(restored.state["w"], state(1)["w"])
        assert restored.sources.keys() == ({"memory"} if case == "whole" else {"store"})
    finally:
        running.close()


PLAIN = """if True:
    import sys
    from orchestrator.cli.main import main
    code = main(["orchestrator", "prefetch", *sys.argv[1:]])
    assert "orchestrator.run.prefetch" in sys.modules
    assert not {"jax", "jaxlib", "orbax", "tensorstore", "gcsfs"} & sys.modules.keys()
    sys.exit(code)
"""


def test_the_command_needs_no_jax(tmp_path: Path) -> None:
    fill(tmp_path / "run", 1)
    (tmp_path / "tier").mkdir()
    words = [str(tmp_path / "run"), "--directory", str(tmp_path / "tier")]
    subprocess.run([sys.executable, "-c", PLAIN, *words], check=True, timeout=60)
    assert there(tmp_path / "run", tmp_path / "tier") == stored(tmp_path / "run", 1)
