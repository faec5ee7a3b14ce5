"""A memory tier for each simulated host: a directory of its own and its tier server, which go with the host, as memory
does.

What a host holds outlives a restart of its process, which is what a tier is for, and not the host: with `lose_on_kill`
a process that dies as it would with its machine takes its tier along. One thread.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch import contract, warden
from launch.command import LaunchError
from launch.hosts import Orphans, Warden
from launch.supervise import Exit
from launch.tier_servers import TierServers
from orchestrator import environment
from orchestrator.errors import UsageError

SECRET_BYTES = 32
OWNED = "owned"  # a file that the launcher has locked as long as it lives; not where the tiers are to stay


@dataclass(frozen=True)
class TierOptions:
    """What the user chose. `directory`: where the hosts' tiers are, and stay; None: a new one in memory, which goes
    with the job unless `keep`. `domains`: the hosts are spread evenly over so many."""

    directory: Path | None = None
    keep: bool = False
    lose_on_kill: bool = False
    domains: int | None = None

    def validate(self, hosts: int) -> None:
        """Raises LaunchError with one line."""
        if self.domains is not None and not 1 <= self.domains <= hosts:
            raise LaunchError(f"--domains={self.domains}: expected 1 to --processes ({hosts})")


def machines(hosts: int, before: Sequence[int], lost: Sequence[int]) -> tuple[int, ...]:
    """On which machine each process of a start runs; `before`: of the one before it. Pure.

    Each stays where it was: whoever is lost is replaced. Where there are fewer than before, the machines that are still
    there come first.
    """
    if hosts < len(before):
        there = [machine for machine in before if machine not in lost]
        return tuple(sorted([*there, *(machine for machine in before if machine in lost)][:hosts]))
    more = (machine for machine in range(len(before) + hosts) if machine not in before)
    return (*before, *(next(more) for _ in range(hosts - len(before))))


def domain(machine: int, hosts: int, domains: int | None) -> str:
    """What a machine of `hosts` is lost with: itself, or its domain, of neighbours, as in a rack. One word is whichever
    domain the program asks for. Pure."""
    if domains is None:
        return f"node=host-{machine}"
    return f"domain-{min(machine * domains // hosts, domains - 1)}"


def _ours() -> str:
    return f"orchestrator-launch-{os.getuid()}-"


def free_left_over(above: Path) -> None:
    """Remove what launchers have left here that are gone, and whose wardens were killed with them: it is memory."""
    for path in above.glob(f"{_ours()}*"):
        with suppress(OSError):
            found = path.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                continue
            with open(path / OWNED, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                warden.remove(str(path))


class HostTiers:
    """The tiers of one job, over all of its starts. options None: it has none."""

    def __init__(
        self,
        options: TierOptions | None,
        hosts: int,
        environ: Mapping[str, str],
        warden: Warden,
        orphans: Orphans,
        note: Callable[[str], None],
    ) -> None:
        self._options, self._hosts, self._environ = options, hosts, environ
        self._warden, self._note = warden, note
        self._machines: tuple[int, ...] = ()  # of each process of this start
        self._lost: set[int] = set()
        self._secret = secrets.token_hex(SECRET_BYTES)
        self._directory = Path()
        self._lock: IO[bytes] | None = None
        self._servers = TierServers(bytes.fromhex(self._secret), warden, orphans, note)

    def __enter__(self) -> HostTiers:
        """Raises LaunchError if the tiers cannot be where they are to be."""
        if self._options is None:
            return self
        given = self._options.directory
        try:
            if given is not None:
                given.mkdir(parents=True, exist_ok=True)
                self._directory = given.absolute()
            else:
                self._directory = self._new()
                if not self._options.keep:
                    self._warden.remove_afterwards(self._directory)
        except OSError as error:
            where = f"--tier_dir={given}" if given else f"--tiers: {error.filename}"
            raise LaunchError(f"{where}: {error.strerror}") from error
        if self._options.keep and given is None:
            self._note(f"held steps stay in {self._directory}; --tier_dir finds them again")
        return self

    def _new(self) -> Path:
        try:
            above = environment.tier_directory(self._environ)
        except UsageError as error:
            raise LaunchError(f"--tiers: {error}") from error
        free_left_over(Path(above))
        path = Path(above, f"{_ours()}{secrets.token_hex(4)}")
        path.mkdir(mode=0o700)
        if self._options and not self._options.keep:
            self._lock = open(path / OWNED, "wb")  # noqa: SIM115  (as long as the job)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path

    def start(self, hosts: int, logs: Path | None) -> dict[int, int]:
        """Make ready for a start of so many hosts; servers log into the directory `logs`. Returns the ids of new
        servers by machine. Raises LaunchError."""
        if self._options is None:
            return {}
        self._machines = machines(hosts, self._machines, sorted(self._lost))
        self._lost -= set(self._machines)  # each is a new machine now, of the same name
        started = {}
        for machine in self._machines:
            try:
                self._path(machine).mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise LaunchError(f"{self._path(machine)}: {error.strerror}") from error
            if machine not in self._servers:
                started[machine] = self._servers.start(machine, self._path(machine), logs)
        return started

    def _path(self, machine: int) -> Path:
        return self._directory / f"host-{machine}"

    def environ(self, process: int) -> dict[str, str]:
        """What a process of this start is told. Peers: in the order of the processes; then machines that are there, but
        have none."""
        if self._options is None:
            return {}
        machine = self._machines[process]
        idle = sorted(set(self._servers) - set(self._machines))
        return {
            contract.TIER_DIR: str(self._path(machine)),
            contract.TIER_SECRET: self._secret,
            contract.TIER_SERVER: self._servers.address(machine),
            contract.TIER_PEERS: ",".join(self._servers.address(one) for one in (*self._machines, *idle)),
            contract.DOMAIN: domain(machine, self._hosts, self._options.domains),
        }

    def may_hold(self, restarts: int) -> bool:
        """Whether there may be something in the tiers, or in the store, before the hosts of this start write it."""
        return self._options is not None and (restarts > 0 or self._options.directory is not None)

    def watch(self) -> None:
        """Start servers again that have died."""
        self._servers.watch()

    def ended(self, exits: Sequence[Exit]) -> frozenset[int]:
        """Processes have ended, by themselves or not. Returns those whose machines have lost their tiers with that."""
        if self._options is None or not self._options.lose_on_kill:
            return frozenset()
        lost = frozenset(exit_.index for exit_ in exits if exit_.from_outside)
        for index in sorted(lost):
            machine = self._machines[index]
            self._lost.add(machine)
            self._servers.lose(machine)
            warden.remove(str(self._path(machine)))
            self._note(f"host-{index} has lost its memory tier")
        return lost

    def __exit__(self, *_: object) -> None:
        self._servers.close()
        if self._options is not None and self._options.directory is None and not self._options.keep:
            warden.remove(str(self._directory))
            self._warden.removed(self._directory)
        if self._lock:
            self._lock.close()
