"""The hosts of a job, as its memory tiers see them: which processes share one, and who takes whose copies.

A host is a machine and a directory on it, `<directory>/orchestrator-<uid>`. Processes of one host reach each other's
tiers as directories, those of other hosts through the tier server that each host has (`run/tier_server`): also where
both are on one machine, as in a simulation. Main thread; `meet` is a collective.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.errors import OrchestratorError
from orchestrator.job import tier_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import gather
from orchestrator.job.tier_rounds import Place
from orchestrator.rules import pairing, survival
from orchestrator.rules.domains import Domains, Site, of_environment
from orchestrator.rules.pairing import Pairing
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory

_BOOT = "/proc/sys/kernel/random/boot_id"
_MOUNTS = "/proc/self/ns/mnt"


@dataclass(frozen=True)
class TierHost:
    """base: its directory. processes: those that run on it, ascending."""

    site: Site
    base: str
    processes: tuple[int, ...]


@dataclass(frozen=True)
class TierHosts:
    """tier: as it was asked for. me: this process. places: of each process. problem: why no steps can be held, '' if
    they can: the same on all processes."""

    tier: MemoryTier
    run: str
    me: int
    places: tuple[Place, ...]
    names: tuple[str, ...]
    problem: str = ""
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def hosts(self) -> tuple[TierHost, ...]:
        """In the order of their lowest processes."""
        return grouped(self.places, self.names)

    @cached_property
    def pairing(self) -> Pairing:
        return pairing.pair([host.site for host in self.hosts], self.tier.copies, self.tier.domain)

    def host_of(self, process: int) -> int:
        return next(number for number, host in enumerate(self.hosts) if process in host.processes)

    @property
    def own(self) -> int:
        """The host of this process."""
        return self.host_of(self.me)

    def targets(self, process: int) -> tuple[int, ...]:
        """The hosts that take the copies of a process's part."""
        return self.pairing.targets[self.host_of(process)]

    @property
    def incoming(self) -> tuple[int, ...]:
        """The processes whose copies this host takes."""
        return tuple(process for host in self.pairing.sources(self.own) for process in self.hosts[host].processes)

    @property
    def survives(self) -> str:
        """What may be lost once a step is held, in words."""
        return survival.words([host.site for host in self.hosts], self.pairing.targets)


_met: weakref.WeakKeyDictionary[Rendezvous, TierHosts] = weakref.WeakKeyDictionary()


def meet(tier: MemoryTier, rendezvous: Rendezvous, run: str, timeout_s: float) -> TierHosts:
    """Where the processes of this job hold steps of `run`. A collective; once they have met, the same answer without
    one. Raises WaitTimeout."""
    if (known := _met.get(rendezvous)) and known.run == run:
        return known
    places = gather(rendezvous, tier_rounds.PLACES, place(tier), timeout_s)
    names = tuple(rendezvous.hosts.get(process, "?") for process in range(rendezvous.count))
    found = _met[rendezvous] = TierHosts(tier, run, rendezvous.process, tuple(places), names)
    return found


def place(tier: MemoryTier) -> Place:
    """Where this process is."""
    domains = Domains()
    try:
        domains = of_environment(os.environ, _boot(), tier.domain)
        base = tier_directory.base(tier.directory)
    except OrchestratorError as error:
        return Place("", machine(), problem=str(error))
    return Place(base, machine(), domains.node, domains.rack, domains.slice)


def machine() -> str:
    """What tells machines apart whose directories are not the same ones though they are called so: containers, too."""
    mounts = ""
    with suppress(OSError):
        mounts = os.readlink(_MOUNTS)
    return f"{_boot()} {mounts}"


def _boot() -> str:
    with suppress(OSError), open(_BOOT, encoding="ascii") as file:
        return file.read().strip()
    return socket.gethostname()


def grouped(places: Sequence[Place], names: Sequence[str]) -> tuple[TierHost, ...]:
    """The hosts that processes at these places are on. names: what people call each process's host. A host that two
    share a name with is told apart by its first process."""
    together: dict[tuple[str, str], list[int]] = {}
    for process, each in enumerate(places):
        together.setdefault((each.machine, each.base), []).append(process)
    called = [names[processes[0]] for processes in together.values()]
    found = []
    for (_, base), processes in together.items():
        first, name = places[processes[0]], names[processes[0]]
        unique = name if called.count(name) == 1 else f"{name}/process-{processes[0]}"
        found.append(TierHost(Site(unique, Domains(first.node, first.rack, first.slice)), base, tuple(processes)))
    return tuple(found)
