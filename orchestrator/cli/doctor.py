"""`orchestrator doctor`: what could hurt this run next, and what to do about it. Reads records, not array data.

Each check is a function that yields findings; one that fails is itself a finding. With --read_only nothing is written;
else one small object is created under `.tmp/` and deleted, to see what the store really does.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from orchestrator.cli import render
from orchestrator.cli.commands import open_catalog
from orchestrator.errors import EXIT_DAMAGED, EXIT_FAILED, EXIT_OK, Damaged, JournalLost, OrchestratorError, StepRetired
from orchestrator.observe.event_log import DIRECTORY, Tail, directory_of
from orchestrator.rules import evidence, journal
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.journal import Found
from orchestrator.rules.records import Event, Head
from orchestrator.run.journal_store import Catalog
from orchestrator.storage import Exists, PosixStorage
from orchestrator.storage.directory import Root

Level = Literal["ok", "warn", "bad", "damage"]
LEVELS: tuple[Level, ...] = ("ok", "warn", "bad", "damage")
_CLOCK_S = 2.0  # more than this between two clocks makes logs misleading
_STALE_S = 3600.0
_RECENT = 20  # decided saves that the abort rate is about
_STRANGERS_SHOWN = 10
_ENTRIES_MAX = 2000  # of the journal that are read, the newest: the older ones decide nothing any more
_LOST_FSYNC_S = 20e-6  # no disk is faster; a file system in memory is
_VOLATILE = {"tmpfs": "is in memory", "ramfs": "is in memory", "overlay": "may belong to a container"}
_PACKAGE = "checkpoint-orchestrator"
_RECOVER = "stop the job; orchestrator recover ROOT lists what is whole, and with --write the run goes on from there"
_NO_HEAD = Head(format=0, version=-1, epoch=0, writer="", write_id="", time=0.0, event=Event(kind=""))


class Finding(msgspec.Struct, forbid_unknown_fields=True):
    """`level`: ok, warn (will hurt some day), bad (will hurt the next save or restore), damage. `do`: '' if ok."""

    check: str
    level: Level
    text: str
    do: str = ""


class Diagnosis(msgspec.Struct, forbid_unknown_fields=True):
    root: str
    worst: Level
    findings: list[Finding]


@dataclass
class Patient:
    """The run, read once for all checks."""

    catalog: Catalog
    read_only: bool
    events_dir: str | None
    head: Head

    @property
    def local(self) -> Path | None:
        url = self.catalog.url
        return Path(url.removeprefix("file://")) if url.startswith("file://") else None

    @property
    def root(self) -> Root | None:
        """The run's directory, None in an object store."""
        return self.catalog.storage.root if isinstance(self.catalog.storage, PosixStorage) else None

    @cached_property
    def stored(self) -> dict[AttemptId, Found]:
        return self.catalog.stored()


def doctor(root: str, flags: dict[str, Any]) -> int:
    """Exit code 4 if something is damaged, 1 if something will hurt the next save or restore, else 0."""
    catalog = open_catalog(root)
    events_dir = directory_of(catalog.url, flags["events_dir"])
    checks = CHECKS
    findings: list[Finding] = []
    try:
        head = catalog.require_head()
    except (JournalLost, Damaged) as error:
        findings.append(Finding("journal", "damage", str(error), _RECOVER))
        head = _NO_HEAD
        checks = {name: CHECKS[name] for name in WITHOUT_HEAD}
    patient = Patient(catalog, flags["read_only"], events_dir, head)
    findings += [finding for name, check in checks.items() for finding in _run(name, check, patient)]
    for finding in findings:
        finding.do = re.sub(r"\bROOT\b", lambda found: shlex.quote(root), finding.do)
    worst: Level = max((finding.level for finding in findings), key=LEVELS.index, default="ok")
    if flags["json"]:
        render.give(msgspec.to_builtins(Diagnosis(catalog.url, worst, findings)))
    else:
        for finding in findings:
            level = finding.level if finding.level == "ok" else finding.level.upper()
            render.say(f"{level:<6}  {finding.check:<11}  {finding.text}")
            if finding.do:
                render.say(f"{'':<21}do: {finding.do}")
    return {"damage": EXIT_DAMAGED, "bad": EXIT_FAILED}.get(worst, EXIT_OK)


def _run(name: str, check: Callable[[Patient], Iterator[Finding]], patient: Patient) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(check(patient))
    except (OrchestratorError, OSError) as error:
        found.append(Finding(name, "bad", f"could not be checked: {error}", "mend this, then run doctor again"))
    return found


def _journal(patient: Patient) -> Iterator[Finding]:
    """Every entry can be read, none is missing, epochs and times do not go back."""
    catalog = patient.catalog
    try:
        catalog.look()
    except JournalLost as error:
        yield Finding("journal", "damage", str(error), _RECOVER)
    versions = catalog.versions()
    heads: list[Head] = []
    with render.progress() as display:
        bar = render.Bar(display, "journal", min(len(versions), _ENTRIES_MAX))
        for version in versions[-_ENTRIES_MAX:]:
            try:
                heads.append(catalog.entry(version))
            except OrchestratorError as error:
                do = "restores are not affected: only the newest entry counts; find out what wrote below the root"
                yield Finding("journal", "damage", str(error), do)
            bar.add(1)
    recovered = {head.version for head in heads if head.event.kind == "recovered"}
    for first, last in evidence.holes(versions):
        text = f"entries {first} to {last} are missing" if last > first else f"entry {first} is missing"
        if last + 1 in recovered:
            yield Finding("journal", "ok", f"{text}, which the one after it knows (recovered)")
        elif last < max(recovered, default=-1):
            yield Finding("journal", "warn", f"{text}, from before the journal was recovered", "nothing: it is history")
        else:
            yield Finding("journal", "damage", text, _RECOVER)
    for before, after in itertools.pairwise(heads):
        if after.epoch < before.epoch:
            text = f"epoch goes back from {before.epoch} to {after.epoch} at version {after.version}"
            yield Finding("journal", "damage", text, "two runs share this root; give each its own")
        if after.time < before.time - _CLOCK_S:
            back = render.duration(before.time - after.time)
            text = f"version {after.version} by {after.writer} is {back} older than the one before by {before.writer}"
            yield Finding("clocks", "warn", text, "synchronize the clocks of these hosts (NTP)")
    decided = [head.event for head in heads if head.event.kind in ("committed", "aborted")][-_RECENT:]
    aborted = [event for event in decided if event.kind == "aborted"]
    if len(aborted) * 5 > len(decided):
        said = {failure.cause for event in aborted for failure in event.failures}
        causes = said or {event.reason for event in aborted}
        text = f"{len(aborted)} of the last {len(decided)} saves were aborted: {'; '.join(sorted(causes))[:300]}"
        yield Finding("saves", "bad", text, "orchestrator log ROOT --last=20 names hosts and phases")
    more = "" if len(heads) == len(versions) else f" of {len(versions)}"
    yield Finding("journal", "ok", f"{len(heads)} entries{more} can be read; version {patient.head.version}")


def _steps(patient: Patient) -> Iterator[Finding]:
    """Every live step has its manifest and all files in their sizes; the newest was proven."""
    head = patient.head
    for live in head.live:
        try:
            patient.catalog.check_sizes(live, patient.catalog.manifest(live))
        except Damaged as error:
            do = f"orchestrator verify ROOT --step={live.step}; then restore from another step, or quarantine this one"
            yield Finding("steps", "damage", str(error), do)
        except StepRetired:
            continue  # a job is at work beside us
        except OrchestratorError as error:
            do = "this says nothing about what is stored: fix what keeps it from being read, then run doctor again"
            yield Finding("steps", "bad", f"step {live.step} could not be read: {error}", do)
    newest = journal.newest(head)
    if newest is None:
        yield Finding("steps", "bad", "no step can be restored", "a job that dies now starts anew; save soon")
    elif newest.trust == "committed":
        text = f"newest step {newest.step} has never been read back"
        yield Finding("steps", "warn", text, f"orchestrator verify ROOT --step={newest.step}")
    size = render.size(sum(live.bytes for live in head.live))
    yield Finding("steps", "ok", f"{len(head.live)} steps, {size}; proven: {_proven(head)}")


def _quarantined(patient: Patient) -> Iterator[Finding]:
    """What is kept as evidence, why, and what it holds."""
    evidence = patient.head.quarantined
    for live in evidence:
        why = f": {live.quarantine.reason}" if live.quarantine and live.quarantine.reason else ""
        text = f"{live.id.label} is quarantined and holds {render.size(live.bytes)}{why}"
        do = (
            f"orchestrator verify ROOT --step={live.step}; orchestrator release ROOT --step={live.step} brings it "
            f"back, and only this deletes it: orchestrator gc ROOT --quarantined={live.step}"
        )
        yield Finding("quarantine", "warn", text, do)
    if not evidence:
        yield Finding("quarantine", "ok", "no step is quarantined")


def _proven(head: Head) -> str:
    return ", ".join(str(live.step) for live in head.live if live.trust in ("verified", "restored")) or "none"


def _orphans(patient: Patient) -> Iterator[Finding]:
    """What nobody needs any more."""
    gone = journal.collectable(patient.head, patient.stored)
    size = sum(patient.stored.get(each.id, Found()).bytes for each in gone)
    if size:
        text = f"{len(gone)} attempts that can never be restored hold {render.size(size)}"
        yield Finding("orphans", "warn", text, "orchestrator gc ROOT (--dry_run first)")
    stale = _stale(patient.root) if patient.root else 0
    if stale:
        text = f"{stale} unfinished files of an hour ago or more in {patient.local}/.tmp"
        yield Finding("orphans", "warn", text, "the next process that writes to the run removes them")
    if not size:
        yield Finding("orphans", "ok", "nothing is left over")


def _stale(root: Root) -> int:
    try:
        with root.directory(".tmp") as temporaries:
            names = os.listdir(temporaries)
            times = [os.stat(name, dir_fd=temporaries, follow_symlinks=False).st_mtime for name in names]
    except FileNotFoundError:  # or gone since
        return 0
    return sum(time_s < time.time() - _STALE_S for time_s in times)


def _strangers(patient: Patient) -> Iterator[Finding]:
    """What stands among the run's files and is none: nothing follows it or opens it."""
    if patient.root is None:  # a bucket has only objects, and those with odd names are not listed
        return
    odd = [entry for entry in patient.catalog.storage.list("") if entry.problem]
    for entry in odd[:_STRANGERS_SHOWN]:
        do = "move what it points to back to its place, or take it away; until then nothing is read through it"
        level: Level = "warn" if entry.key.startswith(f"{DIRECTORY}/") else "bad"
        yield Finding("strangers", level, f"{patient.catalog.url}/{entry.key} {entry.problem}", do)
    if len(odd) > _STRANGERS_SHOWN:
        yield Finding("strangers", "bad", f"... and {len(odd) - _STRANGERS_SHOWN} more", "look through the root")
    if not odd:
        yield Finding("strangers", "ok", "everything below the root is a plain file with a plain name")


def _space(patient: Patient) -> Iterator[Finding]:
    """Room for the next save, which stands beside all kept steps until retention has let one go."""
    if patient.local is None:
        return
    file_system = os.statvfs(patient.local)
    next_bytes = max((live.bytes for live in patient.head.live[-5:]), default=0)
    inodes = file_system.f_favail if file_system.f_files else None
    yield from room(file_system.f_bavail * file_system.f_frsize, inodes, next_bytes)


def room(free: int, inodes: int | None, next_bytes: int) -> Iterator[Finding]:
    """Whether `free` bytes and `inodes` (None: not limited) are enough for saves of `next_bytes`."""
    text = f"{render.size(free)} free; the next save needs about {render.size(next_bytes)}"
    if free < next_bytes * 1.1:
        yield Finding("space", "bad", text, "free space or keep fewer steps: orchestrator gc ROOT --keep_last=N")
    elif free < next_bytes * 3:
        yield Finding("space", "warn", text, "room for fewer than three saves; free space or keep fewer steps")
    else:
        yield Finding("space", "ok", text)
    if inodes is not None and inodes < 1000:
        yield Finding("space", "bad", f"{inodes} free inodes", "delete files: the next save cannot create its own")


def _permissions(patient: Patient) -> Iterator[Finding]:
    if patient.local is None:
        return
    places = [patient.local, *(patient.local / name for name in ("journal", "steps", ".tmp"))]
    there = [path for path in places if path == patient.local or (path.is_dir() and not path.is_symlink())]
    rejected = [path for path in there if not os.access(path, os.R_OK | os.W_OK | os.X_OK)]
    for path in rejected:
        status = path.stat()
        whose = f"owner {status.st_uid}, mode {status.st_mode & 0o777:o}"
        text = f"{path} ({whose}) cannot be written by user {os.getuid()}"
        yield Finding("permissions", "bad", text, "run the job as the owner, or give it the directory (chown -R)")
    if not rejected:
        yield Finding("permissions", "ok", f"user {os.getuid()} may write here")


def _store(patient: Patient) -> Iterator[Finding]:
    """Create, reject to replace, read back, delete: what the protocol rests on, tried on the store itself."""
    if patient.read_only:
        return
    storage, key, body = patient.catalog.storage, f".tmp/doctor-{uuid.uuid4().hex}", b"doctor"
    started = time.monotonic()
    try:
        storage.create(key, body)
        taken = isinstance(storage.create(key, b"another"), Exists)
        same = storage.get(key) == body
    finally:
        storage.delete(key)
    took = render.duration(time.monotonic() - started)
    if not taken:
        text = "creating an object that exists was not rejected"
        yield Finding("store", "bad", text, "two jobs could both commit: use a file system with hard links, or gs://")
    elif not same:
        yield Finding("store", "bad", "an object read back is not what was written", "replace this disk or mount")
    else:
        yield Finding("store", "ok", f"create, rejection to replace, read and delete work ({took})")


def _disk(patient: Patient) -> Iterator[Finding]:
    """What fsync and the file system are worth, and whose clock they have."""
    root = patient.root
    if root is None:
        return
    kind = _file_system(root.path)
    if kind in _VOLATILE:
        text = f"the root is on {kind}, which {_VOLATILE[kind]}: committed steps may not survive a restart"
        yield Finding("durability", "warn", text, "use a directory on a disk or on a shared file system")
    if patient.read_only or not os.access(root.path, os.W_OK):
        return
    probe = f".tmp/doctor-{uuid.uuid4().hex}"
    spent = []
    root.ready()
    with open(root.create(probe), "wb", buffering=0) as file:
        try:
            for _ in range(5):
                file.write(bytes(4096))
                started = time.monotonic()
                os.fsync(file.fileno())
                spent.append(time.monotonic() - started)
            skew_s = os.fstat(file.fileno()).st_mtime - time.time()
        finally:
            root.remove(probe)
    fsync_s = statistics.median(spent)
    text = f"{kind or 'file system'}: fsync takes {fsync_s * 1e3:.2f} ms"
    if fsync_s < _LOST_FSYNC_S and kind not in _VOLATILE:
        do = "no disk is that quick: see that writes reach it (mount options, the virtual machine's cache mode)"
        yield Finding("durability", "warn", text, do)
    else:
        yield Finding("durability", "ok", text)
    yield from _skew("the file system", skew_s)


def _skew(whose: str, skew_s: float) -> Iterator[Finding]:
    if abs(skew_s) > _CLOCK_S:
        ahead = "ahead of" if skew_s > 0 else "behind"
        text = f"the clock of {whose} is {render.duration(abs(skew_s))} {ahead} this machine's"
        yield Finding("clocks", "warn", text, "synchronize the clocks (NTP); ages and rates are wrong until then")


def _clocks(patient: Patient) -> Iterator[Finding]:
    """The writers' clocks against this machine's: nothing is decided by clocks, but people read them."""
    ahead_s = patient.head.time - time.time()
    if ahead_s > _CLOCK_S:
        yield from _skew(patient.head.writer, ahead_s)
    else:
        yield Finding("clocks", "ok", "no entry is from the future")
    tail = Tail(patient.events_dir)
    for process, line in {line.process: line for line in tail.more(whole=False)}.items():
        if process in tail.newest:
            yield from _skew(f"{line.machine} ({line.host})", line.time - tail.newest[process])
    for problem in tail.problems.values():
        yield Finding("events", "warn", problem, "watch and report do without it; take away what is no event log")
    if tail.skipped:
        text = f"{tail.skipped} lines among the events in {patient.events_dir} are none"
        yield Finding("events", "warn", text, "watch and report do without them; a crash in mid-line leaves one")


def _versions(patient: Patient) -> Iterator[Finding]:
    """The installed libraries against the bounds that this package was tested with."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield Finding("versions", "warn", f"{_PACKAGE} is not installed as a package", "pip install it")
        return
    told = []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", "bad", f"{requirement.name} is missing", f"pip install '{requirement}'")
            continue
        if have not in requirement.specifier:
            text = f"{requirement.name} {have}, tested with {requirement.specifier}"
            yield Finding("versions", "warn", text, f"pip install '{requirement}'")
        elif requirement.name in ("jax", "orbax-checkpoint", "tensorstore"):
            told.append(f"{requirement.name} {have}")
    yield Finding("versions", "ok", f"{_PACKAGE} {metadata.version(_PACKAGE)}, {', '.join(told)}")


def _file_system(path: str) -> str:
    """The type of the file system that `path` is on; '' where the kernel does not tell."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    above = [(mount[1], mount[2]) for mount in mounts if os.path.commonpath([real, mount[1]]) == mount[1]]
    return max(above, key=lambda mount: len(mount[0]), default=("", ""))[1]


CHECKS: dict[str, Callable[[Patient], Iterator[Finding]]] = {
    "journal": _journal,
    "steps": _steps,
    "quarantine": _quarantined,
    "orphans": _orphans,
    "strangers": _strangers,
    "space": _space,
    "permissions": _permissions,
    "store": _store,
    "durability": _disk,
    "clocks": _clocks,
    "versions": _versions,
}
# What can be looked at where the journal's newest entry cannot be read.
WITHOUT_HEAD = ("permissions", "store", "durability", "versions")
