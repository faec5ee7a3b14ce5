"""The checks of `orchestrator doctor` that try what the run stands on: store, disk, clocks, installed libraries."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from orchestrator.cli import render
from orchestrator.cli.finding import CLOCK_S, ExaminedRun, Finding
from orchestrator.observe.event_log import RECENT, Tail
from orchestrator.rules import keys
from orchestrator.storage import Exists
from orchestrator.versions import newer

_LOST_FSYNC_S = 20e-6  # no disk is faster; a file system in memory is
_VOLATILE = {"tmpfs": "is in memory", "ramfs": "is in memory", "overlay": "may belong to a container"}
_PACKAGE = "checkpoint-orchestrator"


def space(run: ExaminedRun) -> Iterator[Finding]:
    """Room for the next save, which stands beside all kept steps until retention has expired one."""
    if run.local is None:
        return
    file_system = os.statvfs(run.local)
    next_bytes = max((live.bytes for live in run.head.live[-5:]), default=0)
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


def permissions(run: ExaminedRun) -> Iterator[Finding]:
    if run.local is None:
        return
    places = [run.local, *(run.local / name for name in ("journal", "steps", ".tmp"))]
    there = [path for path in places if path == run.local or (path.is_dir() and not path.is_symlink())]
    rejected = [path for path in there if not os.access(path, os.R_OK | os.W_OK | os.X_OK)]
    for path in rejected:
        status = path.stat()
        whose = f"owner {status.st_uid}, mode {status.st_mode & 0o777:o}"
        text = f"{path} ({whose}) cannot be written by user {os.getuid()}"
        yield Finding("permissions", "bad", text, "run the job as the owner, or give it the directory (chown -R)")
    if not rejected:
        yield Finding("permissions", "ok", f"user {os.getuid()} may write here")


def store(run: ExaminedRun) -> Iterator[Finding]:
    """What the protocol rests on, tried on the store itself: create, be rejected the second time, read back, delete."""
    if run.read_only:
        return
    storage, key, body = run.store.storage, f".tmp/doctor-{uuid.uuid4().hex}", b"doctor"
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
        yield Finding("store", "ok", f"create, rejection of a second create, read and delete work ({took})")


def disk(run: ExaminedRun) -> Iterator[Finding]:
    """What fsync and the file system are worth, and whose clock they have."""
    root = run.root
    if root is None:
        return
    kind = _file_system(root.path)
    if kind in _VOLATILE:
        text = f"the root is on {kind}, which {_VOLATILE[kind]}: committed steps may not survive a restart"
        yield Finding("durability", "warn", text, "use a directory on a disk or on a shared file system")
    if run.read_only or not os.access(root.path, os.W_OK):
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
    if abs(skew_s) > CLOCK_S:
        ahead = "ahead of" if skew_s > 0 else "behind"
        text = f"the clock of {whose} is {render.duration(abs(skew_s))} {ahead} this machine's"
        yield Finding("clocks", "warn", text, "synchronize the clocks (NTP); ages and rates are wrong until then")


def clocks(run: ExaminedRun) -> Iterator[Finding]:
    """The writers' clocks against this machine's: nothing is decided by clocks, but people read them. A host's is told
    from when its last line was written, by the file system's clock; in a copy of a run that is when it was copied."""
    ahead_s = run.head.time - time.time()
    if ahead_s > CLOCK_S:
        yield from _skew(run.head.writer, ahead_s)
    else:
        yield Finding("clocks", "ok", "no entry is from the future")
    tail = Tail(run.events_dir, RECENT)
    last = {line.process: line for line in tail.more(whole=False)}
    for process, line in {} if _is_copy(run) else last.items():
        if process in tail.newest:
            yield from _skew(f"{line.machine} ({line.host})", line.time - tail.newest[process])
    for problem in tail.problems.values():
        yield Finding("events", "warn", problem, "watch and report do without it; take away what is no event log")
    if tail.skipped:
        text = f"{tail.skipped} lines among the events in {run.events_dir} are not events"
        yield Finding("events", "warn", text, "watch and report do without them; a crash in mid-line leaves one")


def _is_copy(run: ExaminedRun) -> bool:
    """Whether even the oldest entry's file was made after the newest entry."""
    if run.root is None:
        return False
    with run.root.directory(keys.JOURNAL.rstrip("/")) as journal:
        oldest = os.stat(min(os.listdir(journal)), dir_fd=journal, follow_symlinks=False)
    return oldest.st_mtime > run.head.time + CLOCK_S


def versions(run: ExaminedRun) -> Iterator[Finding]:
    """The installed libraries against the oldest that this package works with, and the newest it was tested with."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
    except metadata.PackageNotFoundError:
        yield Finding("versions", "warn", f"{_PACKAGE} is not installed as a package", "pip install it")
        return
    installed = []
    for requirement in required:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            have = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding("versions", "bad", f"{requirement.name} is missing", f"pip install '{requirement}'")
            continue
        if have not in requirement.specifier:
            text = f"{requirement.name} {have}, expected {requirement.specifier}"
            yield Finding("versions", "warn", text, f"pip install '{requirement}'")
        elif requirement.name in ("jax", "orbax-checkpoint", "tensorstore"):
            installed.append(f"{requirement.name} {have}")
    for line in newer():
        yield Finding("versions", "warn", line, f"if something is amiss: pip install --upgrade {_PACKAGE}")
    yield Finding("versions", "ok", f"{_PACKAGE} {metadata.version(_PACKAGE)}, {', '.join(installed)}")


def _file_system(path: str) -> str:
    """The type of the file system that `path` is on; '' where the kernel does not say."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    real = os.path.realpath(path)
    above = [(mount[1], mount[2]) for mount in mounts if os.path.commonpath([real, mount[1]]) == mount[1]]
    return max(above, key=lambda mount: len(mount[0]), default=("", ""))[1]
