"""A whole run as a directory that Orbax's own CheckpointManager opens, reads and goes on in.

Each step is gathered under a name that Orbax takes for a save that has not ended (`5.orbax-checkpoint-tmp`), made
durable and renamed: its rule for file systems, so that nothing half-written is taken for a step. The files are copies,
each compared with the manifest. A mark says of which run and attempt a directory is: exporting again takes what is new.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.compat import root_metadata, step_directories
from orchestrator.compat.adopt import EXTRA
from orchestrator.compat.stored_items import StoredItems
from orchestrator.compat.stored_steps import StoredSteps
from orchestrator.errors import Damaged, StorageError, UsageError
from orchestrator.rules import arguments, chunk_index
from orchestrator.rules.records import LiveStep
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import local_path
from orchestrator.storage.directory import sync
from orchestrator.tools.export import copy_state

MARK = ".orchestrator-export"  # in the destination, and in each step there
_UNFINISHED = ".orbax-checkpoint-tmp"  # what Orbax calls a save that has not ended, and cleans up
_STATE = ".state"  # of the step that is being gathered


@dataclass
class ExportedRun:
    """steps: written now, and their bytes. there: exported before. left_out: what of a step is not there, and why; of
    one that is damaged, all of it."""

    steps: dict[int, int] = field(default_factory=dict)
    there: list[int] = field(default_factory=list)
    left_out: list[tuple[int, str]] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)


def to_do(store: JournalStore, destination: str) -> list[LiveStep]:
    """The steps that an export to `destination` would write. Changes nothing. Raises as `export_run`."""
    folder = _folder(destination)
    try:
        return _Export(store, folder, lambda count: None).to_do()
    except OSError as error:
        raise StorageError(f"export to {folder}: {error.strerror or error}") from error


def export_run(
    store: JournalStore, destination: str, on_bytes: Callable[[int], None] = lambda count: None
) -> ExportedRun:
    """Write every restorable step that is not there yet to `destination`. A damaged one is left out, and named.

    Raises UsageError for a destination that is neither empty nor an earlier export of this run, or in which a step of
    the run is something else; StorageError. Steps that were finished stay; calling it again goes on.
    """
    folder = _folder(destination)
    try:
        return _Export(store, folder, on_bytes).run()
    except OSError as error:
        raise StorageError(f"export to {folder}: {error.strerror or error}; exporting again goes on") from error


def _folder(destination: str) -> Path:
    arguments.path("DEST", destination)
    return Path(os.path.abspath(os.path.expanduser(destination)))


class _Export:
    def __init__(self, store: JournalStore, folder: Path, on_bytes: Callable[[int], None]) -> None:
        self._store, self._folder, self._on_bytes = store, folder, on_bytes
        self._head = store.require_head()
        self._stored = StoredSteps(store)
        self._live = [live for live in self._head.live if live.restorable]

    def to_do(self) -> list[LiveStep]:
        """Oldest first: what is interrupted ends with an older step, as any run does. Raises UsageError, OSError."""
        there = self._earlier()
        return [live for live in sorted(self._live, key=lambda live: live.step) if live.step not in there]

    def run(self) -> ExportedRun:
        steps = self.to_do()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._check_room(steps)
        done = ExportedRun(there=sorted({live.step for live in self._live} - {live.step for live in steps}))
        for live in self._head.quarantined:
            why = live.quarantine.reason if live.quarantine else ""
            done.left_out.append((live.step, f"quarantined: {why}".rstrip(": ")))
        with self._alone():
            self._write_root_metadata()
            for live in steps:
                try:
                    done.steps[live.step] = self._export(live)
                except Damaged as error:
                    done.damaged.append(live.step)
                    done.left_out.append((live.step, f"damaged: {error}"))
                    continue
                if self._native_states(live):
                    done.left_out.append((live.step, "the process states of an agent: Orbax has no place for them"))
        done.left_out.sort()
        return done

    # The destination.

    def _earlier(self) -> set[int]:
        """The steps that an earlier export has finished. Raises UsageError for a place that may not be written to."""
        root, real = local_path(self._store.url), Path(os.path.realpath(self._folder))
        if root is not None and Path(os.path.realpath(root)) in (real, *real.parents):
            raise UsageError(f"{self._folder}: is in the run itself; export to another directory")
        if not os.path.lexists(self._folder):
            return set()
        if not self._folder.is_dir():
            raise UsageError(f"{self._folder}: exists, and is no directory; export to another name")
        mark = _mark(self._folder)
        if mark is None:
            if any(self._folder.iterdir()):
                raise UsageError(f"{self._folder}: not empty, and no earlier export of a run; export to a new name")
            return set()
        marks = {live.step: _mark(self._folder / str(live.step)) for live in self._live}
        same = {live.step for live in self._live if marks[live.step] == _about(live)}
        if mark.get("root") != self._store.url and not same:
            raise UsageError(
                f"{self._folder}: an export of {mark.get('root')}, not of {self._store.url}; export to a new name"
            )
        for live in self._live:
            path = self._folder / str(live.step)
            if live.step not in same and os.path.lexists(path):
                raise UsageError(
                    f"{path}: is not {live.id.label} of this run, which would be written there; move it elsewhere"
                )
        return same

    def _check_room(self, steps: list[LiveStep]) -> None:
        needed, free = sum(live.bytes for live in steps), shutil.disk_usage(self._folder).free
        if needed > free:
            raise StorageError(f"{self._folder}: {needed} bytes are to be written, {free} are free; nothing was")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Marks the destination as ours, and keeps other exports out of it."""
        path = self._folder / MARK
        if not path.exists():
            fresh = self._folder / f"{MARK}.new"
            fresh.write_text(json.dumps({"root": self._store.url}))
            os.replace(fresh, path)
        with open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"{self._folder}: another export is writing there; wait until it has ended") from error
            except OSError:  # a file system without locks
                pass
            yield

    def _write_root_metadata(self) -> None:
        found, file = root_metadata.read(self._store.storage), self._folder / root_metadata.FILE
        if found and not file.exists():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(root_metadata.encoded(found))

    # A step.

    def _export(self, live: LiveStep) -> int:
        """Returns the bytes of its state."""
        building = self._folder / f"{live.step}{_UNFINISHED}"
        if os.path.lexists(building):  # of an export that was killed
            shutil.rmtree(building)
        building.mkdir()
        try:
            written = self._gather(live, building)
            step_directories.write_json(building / MARK, _about(live))
            _make_durable(building)
            os.rename(building, self._folder / str(live.step))
        finally:
            shutil.rmtree(building, ignore_errors=True)
        sync(str(self._folder))
        return written

    def _gather(self, live: LiveStep, building: Path) -> int:
        step, state = self._store.step(live), building / _STATE
        step.check_sizes()
        state.mkdir()
        written = copy_state(step, str(state), self._on_bytes)
        items = self._stored.items(live)
        stored = chunk_index.stored(step.manifest)
        about = self._about_orbax(live, items)
        step_directories.fill(building, state, stored, items, self._stored.metrics_tree(live), about)
        shutil.rmtree(state)
        return written

    def _about_orbax(self, live: LiveStep, items: StoredItems) -> dict[str, Any]:
        """The extra JSON of a native agent is custom metadata to Orbax."""
        about = self._stored.step_metadata(live, items)
        if not items.extra:
            about["custom_metadata"] = self._store.step(live).extra.extra
        return about

    def _native_states(self, live: LiveStep) -> bool:
        step = self._store.step(live)
        return EXTRA not in step.extra.extra and bool(step.process_states())


def _about(live: LiveStep) -> dict[str, Any]:
    return {"attempt": live.id.label, "manifest_crc32c": live.manifest_crc32c}


def _mark(folder: Path) -> dict[str, Any] | None:
    """What an export has written of a directory; None for what is none."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / MARK).read_text())
        return found if isinstance(found, dict) else None
    return None


def _make_durable(folder: Path) -> None:
    for above, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(above, name), "rb") as file:
                os.fsync(file.fileno())
        sync(above)
