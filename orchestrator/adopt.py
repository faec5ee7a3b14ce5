"""Taking over a directory of Orbax's CheckpointManager: its steps become steps of a run, read where they are.

Each file of an Orbax step gets a second name (hard link) in an attempt of ours, so nothing is copied and Orbax's
directory is not changed; intent, manifest and journal entry are written as for any save. Every byte is read once, for
its checksum: from then on damage is noticed, which Orbax's own format does not do.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from orchestrator import arrays, journal, layout
from orchestrator.catalog import Catalog
from orchestrator.errors import Damaged, UsageError
from orchestrator.records import (
    FORMAT,
    Extra,
    FileEntry,
    Intent,
    Json,
    LeafSpec,
    LiveStep,
    Manifest,
    Record,
    TreeSpec,
    crc32c,
    encode,
)
from orchestrator.storage import PosixStorage

EXTRA = "orbax"  # our member of a step's extra JSON: what Orbax knew beside the arrays
DEFAULT = "default"  # Orbax's name for a single, unnamed item
_STEP = re.compile(r"(?:.*_)?0*(\d+)")  # with CheckpointManagerOptions(step_prefix=..., step_format_fixed_length=...)
_METRICS = "metrics"
_ITERATOR = re.compile(r"process_(\d+)-of-\d+\.json")


@dataclass(frozen=True)
class Adopted:
    """steps: adopted now. older: left where they are, because the run has newer ones. bytes: of the adopted files."""

    steps: tuple[int, ...]
    older: tuple[int, ...]
    bytes: int


@dataclass
class _Found:
    """What one Orbax step holds. `files`: name below `state/` -> where it is now."""

    leaves: list[LeafSpec] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    json: dict[str, Json] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    iterators: dict[int, dict[str, str]] = field(default_factory=dict)
    custom_metadata: dict[str, Json] = field(default_factory=dict)
    single: bool = False
    time: float = 0.0


def orbax_steps(directory: str) -> dict[int, Path]:
    """The finished steps in a directory of Orbax's CheckpointManager; {} if it is none. Local directories only."""
    base = Path(directory.removeprefix("file://"))
    if "://" in str(base) or not base.is_dir():
        return {}
    found = {}
    for path in base.iterdir():
        named = _STEP.fullmatch(path.name)
        if named and path.is_dir() and (path / "_CHECKPOINT_METADATA").is_file():
            found[int(named[1])] = path
    return found


def adopt(
    catalog: Catalog, source: str, *, skip: frozenset[str] = frozenset(), on_file: Callable[[str], None] | None = None
) -> Adopted:
    """Make every Orbax step in directory `source` that is newer than the run's newest a step of the run.

    Opens an epoch, as the start of a job does: no job may be saving to the run. A crash leaves whole steps; calling it
    again goes on. `skip`: items to leave out. Raises UsageError for a source that holds no steps, for items that cannot
    be adopted, and for roots that are not on a file system; Damaged naming what cannot be read.
    """
    if not isinstance(catalog.storage, PosixStorage):
        raise UsageError(f"{catalog.url}: adopting needs a local or shared file system, as it links to Orbax's files")
    found = orbax_steps(source)
    if not found:
        raise UsageError(f"{source}: no steps of an Orbax CheckpointManager in it; check the path")
    head, _ = catalog.look()  # refused before an epoch is opened, as a job is
    newest = max((live.step for live in head.live), default=-1) if head else -1
    steps = sorted(step for step in found if step > newest)
    known = {live.step for live in head.live} if head else set()
    older = tuple(sorted(step for step in found if step <= newest and step not in known))
    # Everything is looked at before anything is written: a step that cannot be adopted leaves the run as it was.
    described = {step: _look(found[step], skip) for step in steps}
    if not steps:
        return Adopted((), older, 0)
    catalog.probe()
    opened = catalog.append(journal.open_epoch)
    assert opened is not None
    adopted_bytes = 0
    for step in steps:
        writer = _Writer(catalog, catalog.storage, opened.epoch, step, on_file)
        adopted_bytes += writer.write(described[step], f"adopted from {found[step]}")
    return Adopted(tuple(steps), older, adopted_bytes)


def _look(path: Path, skip: frozenset[str]) -> _Found:
    """Read what an Orbax step is made of; no array data."""
    try:
        told = json.loads((path / "_CHECKPOINT_METADATA").read_text())
    except ValueError as error:
        raise Damaged(f"{path}/_CHECKPOINT_METADATA: not JSON: {error}") from error
    found = _Found(custom_metadata=told.get("custom_metadata") or {})
    found.time = (told.get("commit_timestamp_nsecs") or 0) / 1e9 or path.stat().st_mtime
    items = {each.name: each for each in sorted(path.iterdir()) if each.is_dir() and each.name not in skip}
    if arrays.is_tree(path):  # written by a Checkpointer without items
        items = {DEFAULT: path}
    found.single = items.keys() - {_METRICS} == {DEFAULT}
    for name, directory in items.items():
        _look_at_item(found, name, directory)
    if not found.leaves:
        raise UsageError(f"{path}: holds no pytree of arrays; nothing to adopt")
    return found


def _look_at_item(found: _Found, name: str, directory: Path) -> None:
    files = {str(each.relative_to(directory)): each for each in sorted(directory.rglob("*")) if each.is_file()}
    iterators = {int(named[1]): each for each in files.values() if (named := _ITERATOR.fullmatch(each.name))}
    if arrays.is_tree(directory):
        item = "" if found.single else name
        found.leaves += arrays.describe(directory, item)
        found.files |= {f"{item}/{relative}" if item else relative: each for relative, each in files.items()}
    elif name == _METRICS and (directory / _METRICS).is_file():
        metrics = json.loads((directory / _METRICS).read_text())
        found.metrics = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    elif (directory / "metadata").is_file():  # JsonSave
        found.json[name] = json.loads((directory / "metadata").read_text())
    elif iterators:
        for index, each in iterators.items():
            found.iterators.setdefault(index, {})[name] = each.read_text()
    else:
        raise UsageError(
            f"{directory}: item {name!r} is neither a pytree, JSON nor a grain iterator, and cannot be adopted; "
            f"--skip={name} leaves it where it is"
        )


class _Writer:
    """Writes one attempt out of an Orbax step, and commits it."""

    def __init__(
        self, catalog: Catalog, storage: PosixStorage, epoch: int, step: int, on_file: Callable[[str], None] | None
    ) -> None:
        self._catalog, self._storage, self._step, self._epoch = catalog, storage, step, epoch
        self._attempt = layout.attempt_name(epoch, 1)
        self._prefix = layout.attempt_prefix(step, self._attempt)
        self._on_file = on_file or (lambda path: None)

    def write(self, found: _Found, reason: str) -> int:
        """Returns the attempt's bytes."""
        tree = TreeSpec(leaves=tuple(found.leaves))
        self._create(layout.INTENT, self._intent(tree))
        told = {"single": found.single, "json": found.json, "custom_metadata": found.custom_metadata}
        extra = Extra(
            **self._signed(), step=self._step, timestamp=found.time, metrics=found.metrics, extra={EXTRA: told}
        )
        self._create(layout.EXTRA, extra)
        for index, states in found.iterators.items():
            self._storage.create(self._prefix + layout.process_state_name(index), json.dumps(states).encode())
        for name, source in found.files.items():
            self._storage.link(str(source.absolute()), self._prefix + layout.STATE + name)
        manifest = Manifest(
            **self._signed(),
            step=self._step,
            attempt=self._attempt,
            process_count=1,
            files=tuple(self._sealed()),
            hosts=(socket.gethostname(),),
            seconds=({},),
            built_on=self._catalog.durable_version,
        )
        body = self._create(layout.MANIFEST, manifest)
        entry = LiveStep(
            step=self._step,
            attempt=self._attempt,
            manifest_crc32c=crc32c(body),
            tree=tree.fingerprint(),
            bytes=manifest.total_bytes + len(body),
            metrics=found.metrics,
            time=found.time,
        )
        self._catalog.append(partial(journal.commit, epoch=self._epoch, entry=entry, keep=None, reason=reason))
        return entry.bytes

    def _sealed(self) -> Iterator[FileEntry]:
        for there in list(self._storage.list(self._prefix)):
            (sealed,) = self._storage.seal([there.key])
            self._on_file(there.key)
            yield replace(sealed, path=sealed.path.removeprefix(self._prefix))

    def _signed(self) -> dict[str, Any]:
        return {"format": FORMAT, "write_id": self._catalog.stamp().write_id}

    def _intent(self, tree: TreeSpec) -> Intent:
        return Intent(
            **self._signed(),
            step=self._step,
            attempt=self._attempt,
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
        self._storage.create(self._prefix + name, body)
        return body
