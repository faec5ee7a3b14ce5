"""Which processes a job has started, and their end. Linux only.

A host's processes are those of its session and group, their descendants by parent links, and whatever carries the
host's mark (a line of its environment that no other host has) however far it went: into a session of its own, or to
another parent once its own had died. Nothing else is ever signalled: a process is opened (pidfd) before its start time
is compared with the one it was found with, so that an id the kernel has given away again is never hit.

Run as a script, with a pipe from the launcher on standard input, this is the warden: it ends all hosts if the launcher
dies without a word (SIGKILL, out of memory). A line `+PID START MARK` takes a host into its care, `-PID` releases it,
`>DIRECTORY` names one to delete then, `<DIRECTORY` says that it has been; end of file means that the launcher is gone.
May import nothing of the package: it is started with `-I -S` and must be up in milliseconds.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Collection
from typing import NamedTuple

PASSES = 20  # a process may start another one while it is looked for


class ProcessInfo(NamedTuple):
    """A process as `/proc` shows it; `started` is in clock ticks since the machine's start."""

    pid: int
    state: str
    parent: int
    group: int
    session: int
    started: int


class HostIdentity(NamedTuple):
    """How the processes of one host are known: by the one that leads them, and by a line of their environment."""

    leader: int
    started: int
    mark: bytes


def process_info(pid: int) -> ProcessInfo | None:
    """None if there is no such process, or no longer."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            rest = file.read().rpartition(b")")[2].split()  # a program's name may hold anything
        return ProcessInfo(pid, rest[0].decode(), int(rest[1]), int(rest[2]), int(rest[3]), int(rest[19]))
    except (OSError, IndexError, ValueError):
        return None


def identity_of(pid: int, mark: bytes) -> HostIdentity:
    """Of a child that is not reaped yet."""
    found = process_info(pid)
    return HostIdentity(pid, found.started if found else 0, mark)


def all_processes() -> dict[int, ProcessInfo]:
    found = (process_info(int(name)) for name in os.listdir("/proc") if name.isdecimal())
    return {process.pid: process for process in found if process}


def _carries(pid: int, mark: bytes) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return mark in file.read().split(b"\0")
    except OSError:  # it has ended, or belongs to another user
        return False


def descendants(table: dict[int, ProcessInfo], roots: Collection[int]) -> set[int]:
    """The roots and all that descend from them."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found, unseen = set[int](), list(roots)
    while unseen:
        pid = unseen.pop()
        if pid not in found:
            found.add(pid)
            unseen.extend(children.get(pid, ()))
    return found


def members(table: dict[int, ProcessInfo], identity: HostIdentity) -> set[int]:
    """The host's processes among `table`, its leader included."""
    leader = table.get(identity.leader)
    roots = set[int]()
    if leader is None or leader.started == identity.started:  # else the id and its group are another's
        roots = {process.pid for process in table.values() if identity.leader in (process.group, process.session)}
    found = descendants(table, roots)
    strangers = [p.pid for p in table.values() if p.pid not in found and p.started >= identity.started]
    return descendants(table, found | {pid for pid in strangers if _carries(pid, identity.mark)})


def signal_one(process: ProcessInfo, signum: int) -> bool:
    """Send a signal to this very process; False if it has ended."""
    try:
        opened = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):  # a kernel, a sandbox or a Python without them: the comparison has to do
        opened = -1
    try:
        now = process_info(process.pid)
        if now is None or now.started != process.started or now.state in "ZX":
            return False
        if opened < 0:
            os.kill(process.pid, signum)
        else:
            signal.pidfd_send_signal(opened, signum)
        return True
    except OSError:  # it ended just now, or is another user's by now
        return False
    finally:
        if opened >= 0:
            os.close(opened)


def kill_all(find: Callable[[dict[int, ProcessInfo]], set[int]]) -> None:
    """SIGKILL what `find` finds, until it finds nothing new. Does not wait for their end."""
    known = {os.getpid()}
    for _ in range(PASSES):
        table = all_processes()
        found = find(table) - known
        for pid in found & table.keys():
            signal_one(table[pid], signal.SIGKILL)
        if not found:
            return
        known |= found


def remove(directory: str) -> None:
    """Delete a directory and all that is in it, as far as that goes; what its links point to stays."""
    for _ in range(3):  # a host that is ending may write once more
        for path, directories, files in os.walk(directory, topdown=False):
            for name in (*files, *directories):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(path, name))
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _guard() -> None:
    identities: dict[int, HostIdentity] = {}
    directories: set[str] = set()
    for line in sys.stdin.buffer:
        words = line[1:].split()
        match line[:1]:
            case b"+":
                identities[int(words[0])] = HostIdentity(int(words[0]), int(words[1]), bytes.fromhex(words[2].decode()))
            case b"-":
                identities.pop(int(words[0]), None)
            case b">":
                directories.add(os.fsdecode(bytes.fromhex(words[0].decode())))
            case b"<":
                directories.discard(os.fsdecode(bytes.fromhex(words[0].decode())))
    for identity in identities.values():
        kill_all(lambda table, identity=identity: members(table, identity))  # type: ignore[misc]  # bound now, called at once
    for directory in directories:
        remove(directory)


if __name__ == "__main__":
    # Whatever ends the launcher must not end its warden first.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    _guard()
