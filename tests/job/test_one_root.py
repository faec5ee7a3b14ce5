"""What one host has written at a root, the others must see, though perhaps late."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator.cli.main import main
from orchestrator.job import one_root
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage
from orchestrator.storage.read_only import ReadOnlyStorage
from tests.support.fakes import HookedStorage
from tests.support.runs import fill, journal_of, now, state, store_of


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
    writer = store_of(root)
    key, head = one_root.create_mark(writer), writer.require_head()
    looks: list[Callable[[JournalStore], bool]] = [
        partial(one_root.sees, key=key),
        partial(one_root.sees_entry, version=head.version, write_id=head.write_id),
    ]
    for look in looks:
        assert one_root.sees_in_time(
            partial(look, JournalStore(Late(root, after=3, error=error), "other")), timeout_s=60
        )
        never = partial(look, JournalStore(Late(root, after=10**6, error=error), "other"))
        if error:
            with pytest.raises(oc.Unavailable, match="ESTALE"):
                one_root.sees_in_time(never, timeout_s=0.4)
        else:
            assert not one_root.sees_in_time(never, timeout_s=0.4)
    assert not one_root.sees_entry(writer, head.version, "of another journal")
    one_root.delete_mark(writer, key)
    assert not one_root.sees(writer, key)


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
    left = one_root.create_mark(store_of(root))
    assert oc.Agent(root).latest_step() is None  # still a new run
    fill(root, 1, 2, keep=oc.last(1))
    assert (root / left).is_file() and oc.open_run(root).all_steps() == [2]
    for command in ("ls", "doctor", "verify", "gc", "recover"):
        assert main(["orchestrator", command, str(root)]) == 0, command
    assert (root / left).is_file()
    with oc.Agent(root, options=now()) as agent:
        assert agent.save(3, state(3)) and journal_of(root)[-1].epoch == 2
