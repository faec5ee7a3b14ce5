"""Where tiers are on a machine, and how much they may take there.

    <directory>/orchestrator-<uid>/<run>/process-00003/

`<directory>` is /dev/shm or the user's choice, and may be everybody's. Below it is ours alone: a directory that
somebody else owns, that others may enter, or that is a link is not used. `<run>` is made of the first entry of the
run's journal and of its root, so that another run at the same root, before or after, is another directory, and so is a
copy of the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat

from orchestrator import environment
from orchestrator.errors import StorageError
from orchestrator.rules.domains import of_environment
from orchestrator.rules.tier_environment import tier_environment
from orchestrator.rules.tiers import MemoryTier, memory_of
from orchestrator.run.journal_store import JournalStore
from orchestrator.storage import local_path
from orchestrator.storage.directory import storage_error

_RUN = re.compile(r"[0-9a-f]{16}")
_PROCESS = re.compile(r"process-([0-9]{5,9})")
_SPARE_BYTES = 256 << 20  # of memory, that stays free: other programs of the machine allocate, too
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat")


def chosen(tiers: object) -> MemoryTier | None:
    """The memory tier of an agent's or a reader's `tiers`, None if there is none. Raises UsageError, also for what the
    environment says of its place, its domains and its server: before anybody waits for this process."""
    tier = memory_of(tiers)
    if tier is not None:
        base(tier.directory)
        of_environment(os.environ, "", tier.domain)
        tier_environment(os.environ)
    return tier


def identity(store: JournalStore) -> str | None:
    """What a run's directory is called: the same for as long as its journal goes on at its place, and no other run's;
    nor that of a copy, which begins with the same entries. None in a new run. Raises Damaged, StorageError."""
    if store.head() is None:
        return None
    path = local_path(store.url)
    place = store.url if path is None else os.path.realpath(path)
    return hashlib.sha256(f"{store.entry(0).write_id} {place}".encode(errors="surrogateescape")).hexdigest()[:16]


def base(directory: str | None) -> str:
    """What is ours below `directory` on this machine: of all runs. Raises UsageError as `of_run` does."""
    where = os.path.expanduser(directory) if directory else environment.tier_directory()
    return os.path.join(os.path.realpath(where), f"orchestrator-{os.getuid()}")


def of_run(directory: str | None, run: str) -> str:
    """The directory of a run's tiers on this machine. Raises UsageError for what the environment says instead of a
    directory."""
    return os.path.join(base(directory), run)


def of_process(directory: str | None, run: str, process: int) -> str:
    return os.path.join(of_run(directory, run), f"process-{process:05d}")


def make(path: str) -> None:
    """Make a process's directory. The one that users share is not made. Raises StorageError."""
    run = os.path.dirname(path)
    for each in (os.path.dirname(run), run, path):
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(each, 0o700)
        except OSError as error:
            raise storage_error("make the tier's directory", each, error) from error
        check(each)


def check(path: str) -> None:
    """Raises StorageError if this is not a directory of ours that nobody else may enter."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise storage_error("look at the tier's directory", path, error) from error
    problem = ""
    if stat.S_ISLNK(found.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISDIR(found.st_mode):
        problem = "is no directory"
    elif found.st_uid != os.getuid():
        problem = f"belongs to user {found.st_uid}, this process is user {os.getuid()}"
    elif stat.S_IMODE(found.st_mode) & 0o077:
        problem = f"may be entered by others (mode {stat.S_IMODE(found.st_mode):04o}, expected 0700)"
    if problem:
        raise StorageError(f"{path}: {problem}; a tier is read and written only where nobody else can: not used")


def check_path(path: str) -> None:
    """As `check`, of a process's directory and those above it, up to the one that users share."""
    run = os.path.dirname(path)
    if not (_PROCESS.fullmatch(os.path.basename(path)) and _RUN.fullmatch(os.path.basename(run))):
        raise StorageError(f"{path}: is no directory of a tier; not used")
    for each in (os.path.dirname(run), run, path):
        check(each)


def processes(directory: str | None, run: str) -> list[str]:
    """The directories of a run's processes on this machine, of whatever incarnation. Raises StorageError."""
    above = of_run(directory, run)
    try:
        names = os.listdir(above)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error("list", above, error) from error
    return [os.path.join(above, name) for name in sorted(names) if _PROCESS.fullmatch(name)]


def beside(path: str) -> list[str]:
    """The directories of a process's run, its own included. Raises StorageError."""
    above, run = os.path.split(os.path.dirname(path))
    return processes(os.path.dirname(above), run)


def other_runs(path: str) -> list[str]:
    """The directories of other runs of this user, beside that of a process's run."""
    run = os.path.dirname(path)
    above = os.path.dirname(run)
    with contextlib.suppress(OSError):
        others = (os.path.join(above, name) for name in sorted(os.listdir(above)) if _RUN.fullmatch(name))
        return [other for other in others if other != run]
    return []


def process_of(path: str) -> int:
    found = _PROCESS.fullmatch(os.path.basename(path))
    return int(found[1]) if found else -1


def free_bytes(path: str) -> int:
    """How much can be written below a directory: what its file system has, and if that is in memory, what the machine
    and the container can spare. Raises StorageError."""
    try:
        found = os.statvfs(path)
    except OSError as error:
        raise storage_error("look at the room in", path, error) from error
    free = found.f_bavail * found.f_frsize
    if _file_system(path) not in ("tmpfs", "ramfs"):
        return free
    limits = [free, _memory_available(), _container_available()]
    return max(0, min(limit for limit in limits if limit is not None))


def _file_system(path: str) -> str:
    """Of the longest mount point above `path`; '' where the kernel does not tell."""
    best, kind = "", ""
    with contextlib.suppress(OSError), open("/proc/self/mounts", encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            _, where, name, *_ = line.split(" ")
            if len(where) >= len(best) and (path == where or path.startswith(where.rstrip("/") + "/")):
                best, kind = where, name
    return kind


def _memory_available() -> int | None:
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 - _SPARE_BYTES
    return None


def _container_available() -> int | None:
    """By its cgroup (version 2): the limit, less what is used and cannot be dropped."""
    limit, current, statistics = _CGROUPS
    with contextlib.suppress(OSError, ValueError):
        with open(limit, encoding="ascii") as file:
            most = file.read().strip()
        if most == "max":
            return None
        with open(current, encoding="ascii") as file:
            used = int(file.read())
        with open(statistics, encoding="ascii") as lines:
            cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        return int(most) - (used - cached) - _SPARE_BYTES
    return None
