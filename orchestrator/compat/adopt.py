"""Taking over a directory of Orbax's CheckpointManager: its steps become steps of a run, read where they are.

Each file of an Orbax step gets a second name (hard link) in an attempt of ours, so nothing is copied and Orbax's
directory is not changed; intent, manifest and journal entry are written as for any save. Every byte is read once, for
its checksum: from then on damage is noticed, which Orbax's own format does not do.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from orchestrator.compat import orbax_steps
from orchestrator.errors import Damaged, UsageError
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
from orchestrator.run import orbax_directory
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import PosixStorage, local_path

EXTRA = "orbax"  # our member of a step's extra JSON: what Orbax knew beside the arrays


@dataclass(frozen=True)
class Adopted:
    """steps: adopted now. older: left where they are, because the run has newer ones. bytes: of the adopted files."""

    steps: tuple[int, ...]
    older: tuple[int, ...]
    bytes: int


def adopt(
    catalog: JournalStore,
    source: str,
    *,
    skip: frozenset[str] = frozenset(),
    on_file: Callable[[str], None] | None = None,
) -> Adopted:
    """Make every Orbax step in directory `source` that is newer than the run's newest a step of the run.

    Opens an epoch, as the start of a job does: no job may be saving to the run. A crash leaves whole steps; calling it
    again goes on. `skip`: items to leave out. Raises UsageError for a source that holds no steps, for what cannot be
    adopted, and for roots that are not on a file system; Damaged naming what is not as Orbax leaves it; StorageError.
    """
    base = local_path(source)
    if not isinstance(catalog.storage, PosixStorage) or base is None:
        raise UsageError(f"{catalog.url}: adopting needs a local or shared file system, as it links to Orbax's files")
    there = orbax_directory.survey(Path(base))
    head, _ = catalog.look()  # rejected before an epoch is opened, as a job is
    newest = max((live.step for live in head.live), default=-1) if head else -1
    if there.strange:
        raise UsageError(orbax_directory.elsewhere(source, [path.name for path in there.strange]))
    found = there.steps
    if not found:
        raise UsageError(f"{source}: no steps of an Orbax CheckpointManager in it; check the path")
    steps = sorted(step for step in found if step > newest)
    known = {live.step for live in head.live} if head else set()
    older = tuple(sorted(step for step in found if step <= newest and step not in known))
    # Everything is looked at before anything is written: a step that cannot be adopted leaves the run as it was.
    described = {step: orbax_steps.read_step(found[step], skip) for step in steps}
    for step in steps:
        _Writer(catalog, catalog.storage, 1, step, on_file).check(described[step], str(found[step]))
    if not steps:
        return Adopted((), older, 0)
    one_root.delete_mark(catalog, one_root.create_mark(catalog))
    opened = catalog.append(journal.open_epoch)
    assert opened is not None
    adopted_bytes = 0
    for step in steps:
        writer = _Writer(catalog, catalog.storage, opened.epoch, step, on_file)
        adopted_bytes += writer.write(described[step], f"adopted from {found[step]}")
    return Adopted(tuple(steps), older, adopted_bytes)


class _Writer:
    """Writes one attempt out of an Orbax step, and commits it."""

    def __init__(
        self, catalog: JournalStore, storage: PosixStorage, epoch: int, step: int, on_file: Callable[[str], None] | None
    ) -> None:
        self._catalog, self._storage, self._epoch = catalog, storage, epoch
        self._id = AttemptId.of(step, epoch, 1)
        self._on_file = on_file or (lambda path: None)

    def check(self, found: orbax_steps.OrbaxStep, where: str) -> None:
        """Nothing is written of a step whose records could not be read back. Raises Damaged."""
        try:
            for record in (self._intent(TreeSpec(leaves=tuple(found.leaves))), self._extra(found)):
                decode(encode(record), type(record), where)
        except (UsageError, ValueError, TypeError, RecursionError) as error:  # a name that is not UTF-8, say
            raise Damaged(f"{where}: cannot be described here: {error}") from error

    def write(self, found: orbax_steps.OrbaxStep, reason: str) -> int:
        """Returns the attempt's bytes."""
        tree = TreeSpec(leaves=tuple(found.leaves))
        self._create(keys.INTENT, self._intent(tree))
        self._create(keys.EXTRA, self._extra(found))
        for index, states in found.iterators.items():
            self._storage.create(self._id.process_state_key(index), json.dumps(states).encode())
        for name, source in found.files.items():
            self._storage.link(str(source.absolute()), self._id.state_prefix + name)
        manifest = Manifest(
            **self._signed(),
            step=self._id.step,
            attempt=self._id.name,
            process_count=1,
            files=tuple(self._sealed()),
            hosts=(socket.gethostname(),),
            seconds=({},),
            built_on=self._catalog.durable_version,
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
        self._catalog.append(partial(journal.commit, epoch=self._epoch, entry=entry, keep=None, reason=reason))
        return entry.bytes

    def _sealed(self) -> Iterator[FileEntry]:
        for there in list(self._storage.list(self._id.prefix)):
            (sealed,) = self._storage.make_durable([there.key])
            self._on_file(there.key)
            yield replace(sealed, path=sealed.path.removeprefix(self._id.prefix))

    def _signed(self) -> dict[str, Any]:
        return {"format": FORMAT, "write_id": self._catalog.stamp().write_id}

    def _extra(self, found: orbax_steps.OrbaxStep) -> Extra:
        extra = {"single": found.single, "json": found.json, "custom_metadata": found.custom_metadata}
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
            opened_by=self._catalog.writer,
            time=time.time(),
            process_count=1,
            device_count=0,
            mesh={},
            tree=tree,
            built_on=self._catalog.durable_version,
        )

    def _create(self, name: str, record: Record) -> bytes:
        body = encode(record)
        self._storage.create(self._id.prefix + name, body)
        return body
