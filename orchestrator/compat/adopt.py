"""Taking over a directory of Orbax's CheckpointManager: its steps become steps of a run, read where they are.

Each file of an Orbax step gets a second name (hard link) in an attempt of ours, so nothing is copied (but from another
file system or a store) and Orbax's directory is not changed; intent, manifest and journal entry are written as for any
save. Every byte is read once, for its checksum: from then on damage is noticed, which Orbax's own format does not do.
Within a store the store itself copies, and knows the checksums.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace

from orchestrator.compat import adopt_plan, root_metadata
from orchestrator.compat.adopt_plan import Choice, Plan, PlannedStep, existing
from orchestrator.compat.orbax_steps import OrbaxStep
from orchestrator.errors import Damaged, OrchestratorError, StorageError, UsageError
from orchestrator.job import one_root
from orchestrator.rules import journal, json_numbers, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import (
    FORMAT,
    Extra,
    FileEntry,
    Intent,
    LiveStep,
    Manifest,
    Record,
    TreeSpec,
    crc32c,
)
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, local_path
from orchestrator.storage.store_path import AnyPath, StorePath

EXTRA = "orbax"  # our member of a step's extra JSON: what Orbax knew beside the arrays
_ALL = Choice()
_AT_ONCE = 8  # files copied from a store
_ASKED_AT_ONCE = 64  # objects whose checksums a store is asked for between two steps of the bar


@dataclass(frozen=True)
class Adopted:
    """plan: what was found, step by step. bytes: of the adopted files."""

    plan: Plan
    bytes: int

    @property
    def steps(self) -> tuple[int, ...]:
        """Adopted now."""
        return tuple(each.step for each in self.plan.having(adopt_plan.ADOPT))

    @property
    def older(self) -> tuple[int, ...]:
        """Left where they are, because the run has newer ones."""
        return tuple(each.step for each in self.plan.having(adopt_plan.OLDER))


def plan(store: JournalStore, source: str, choice: Choice = _ALL, *, copy: bool = False) -> Plan:
    """What `adopt` would do. Changes nothing; raises as it does, but not for a single step that cannot be adopted."""
    head, _ = store.look()  # rejected before an epoch is opened, as a job is
    made = adopt_plan.make(store.url, source, head, choice)
    checked = tuple(_checked(store, each) for each in made.steps)
    return dataclasses.replace(made, steps=checked, copied=made.copied or copy)


def _checked(store: JournalStore, planned: PlannedStep) -> PlannedStep:
    if planned.found is None:
        return planned
    try:
        _Writer(store, 1, planned, None).check(planned.found)
    except OrchestratorError as error:
        return PlannedStep(planned.step, planned.path, adopt_plan.CANNOT, str(error), error)
    return planned


def adopt(
    store: JournalStore, source: str, made: Plan | None = None, on_bytes: Callable[[int], None] | None = None
) -> Adopted:
    """Make every Orbax step in directory `source` that is newer than the run's newest a step of the run, or do as a
    plan says. From another file system than the run's, and from a store, the files are copied, a few at a time and in
    pieces; so many bytes as that takes must be free.

    Opens an epoch, as the start of a job does: no job may be saving to the run. A crash leaves whole steps; calling it
    again goes on with the next step. Raises UsageError for a source that holds no steps, for what cannot be adopted,
    and for a source on this host where the run is in a store; Damaged naming what is not as Orbax leaves it;
    StorageError. If it raises for a step that cannot be adopted, nothing was changed.
    """
    made = made or plan(store, source)
    made.check()  # everything was looked at before anything is written
    steps = made.having(adopt_plan.ADOPT)
    if not steps:
        return Adopted(made, 0)
    _check_room(store.url, made)
    one_root.delete_mark(store, one_root.create_mark(store))
    opened = store.append(journal.open_epoch)
    assert opened is not None
    if made.root_metadata:
        root_metadata.keep(store.storage, made.root_metadata)
    adopted_bytes = 0
    for planned in steps:
        writer = _Writer(store, opened.epoch, planned, on_bytes, copied=made.copied)
        adopted_bytes += writer.write(f"adopted from {planned.path}")
    return Adopted(made, adopted_bytes)


def _check_room(root: str, made: Plan) -> None:
    where = local_path(root)
    if where is None or not made.copied:
        return
    needed = sum(each.bytes for each in made.having(adopt_plan.ADOPT))
    free = shutil.disk_usage(existing(where)).free
    if needed > free:
        raise StorageError(f"{root}: {needed} bytes are to be copied there, {free} are free; nothing was")


class _Writer:
    """Writes one attempt out of an Orbax step, and commits it."""

    def __init__(
        self,
        store: JournalStore,
        epoch: int,
        planned: PlannedStep,
        on_bytes: Callable[[int], None] | None,
        *,
        copied: bool = False,
    ) -> None:
        self._store, self._storage, self._epoch = store, store.storage, epoch
        self._id = AttemptId.of(planned.step, epoch, 1)
        self._planned, self._copied = planned, copied
        self._on_bytes = on_bytes or (lambda count: None)

    def check(self, found: OrbaxStep) -> None:
        """Nothing is written of a step whose records could not be read back. Raises Damaged."""
        try:
            for record in (self._intent(TreeSpec(leaves=tuple(found.leaves))), self._extra(found)):
                decode(encode(record), type(record), str(self._planned.path))
        except (UsageError, ValueError, TypeError, RecursionError) as error:  # a name that is not UTF-8, say
            raise Damaged(f"{self._planned.path}: cannot be described here: {error}") from error

    def write(self, reason: str) -> int:
        """Returns the attempt's bytes."""
        found = self._planned.found
        assert found is not None
        tree = TreeSpec(leaves=tuple(found.leaves))
        self._create(keys.INTENT, self._intent(tree))
        self._create(keys.EXTRA, self._extra(found))
        for index, states in found.iterators.items():
            self._storage.create(self._id.process_state_key(index), json.dumps(states).encode())
        self._take_all({self._id.state_prefix + name: source for name, source in found.files.items()})
        manifest = Manifest(
            **self._signed(),
            step=self._id.step,
            attempt=self._id.name,
            process_count=1,
            files=tuple(self._sealed()),
            hosts=(socket.gethostname(),),
            seconds=({},),
            built_on=self._store.durable_version,
        )
        body = self._create(keys.MANIFEST, manifest)
        entry = LiveStep(
            step=self._id.step,
            attempt=self._id.name,
            manifest_crc32c=crc32c(body),
            tree=tree.fingerprint(),
            bytes=manifest.total_bytes + len(body),
            stored_metrics=json_numbers.stored_all(found.metrics),
            time=found.time,
        )
        self._store.append(partial(journal.commit, epoch=self._epoch, entry=entry, keep=None, reason=reason))
        return entry.bytes

    def _take_all(self, files: Mapping[str, AnyPath]) -> None:
        if not any(isinstance(each, StorePath) for each in files.values()):
            for key, source in files.items():
                self._take(source, key)
            return
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="gcs") as pool:
            taken = [pool.submit(self._take, source, key) for key, source in files.items()]
            try:
                for each in taken:
                    each.result()
            finally:  # after the first that fails, no other is begun
                for each in taken:
                    each.cancel()

    def _take(self, source: AnyPath, key: str) -> None:
        storage = self._storage
        if isinstance(source, StorePath):
            if isinstance(storage, PosixStorage):
                storage.copy(str(source), key, self._on_bytes, source.pieces())
            else:
                source.copy_to(storage, key, self._on_bytes)
            return
        assert isinstance(storage, PosixStorage)
        if self._copied:
            storage.copy(str(source.absolute()), key, self._on_bytes)
        else:
            storage.link(str(source.absolute()), key)

    def _sealed(self) -> Iterator[FileEntry]:
        there = [each.key for each in self._storage.list(self._id.prefix)]
        step = 1 if local_path(self._storage.url) is not None else _ASKED_AT_ONCE
        for first in range(0, len(there), step):
            for sealed in self._storage.make_durable(there[first : first + step]):
                self._on_bytes(sealed.bytes)
                yield replace(sealed, path=sealed.path.removeprefix(self._id.prefix))

    def _signed(self) -> dict[str, Any]:
        return {"format": FORMAT, "write_id": self._store.stamp().write_id}

    def _extra(self, found: OrbaxStep) -> Extra:
        extra: dict[str, Any] = {"single": found.single, "json": found.json, "custom_metadata": found.custom_metadata}
        extra |= {"json_files": found.json_files} if found.json_files else {}
        return Extra(
            **self._signed(),
            step=self._id.step,
            timestamp=found.time,
            stored_metrics=json_numbers.stored_all(found.metrics),
            stored_extra={EXTRA: json_numbers.pack(extra)},
        )

    def _intent(self, tree: TreeSpec) -> Intent:
        return Intent(
            **self._signed(),
            step=self._id.step,
            attempt=self._id.name,
            epoch=self._epoch,
            opened_by=self._store.writer,
            time=time.time(),
            process_count=1,
            device_count=0,
            mesh={},
            tree=tree,
            built_on=self._store.durable_version,
        )

    def _create(self, name: str, record: Record) -> bytes:
        body = encode(record)
        self._storage.create(self._id.prefix + name, body)
        return body
