"""The hosts of a job, as its memory tiers see them: which processes share one, who takes whose copies, and how they are
reached.

A host is a machine and a directory on it, `<directory>/orchestrator-<uid>`. Processes of one host reach each other's
tiers as directories, those of other hosts through the tier server that each host has (`run/tier_server`): also where
both are on one machine, as in a simulation. A job on one host has no server. Main thread; `meet` is a collective.
"""

from __future__ import annotations

import os
import secrets
import socket
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.job import tier_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import agree, gather
from orchestrator.job.tier_address import listen_address
from orchestrator.job.tier_rounds import Place, Serving
from orchestrator.rules import pairing, survival
from orchestrator.rules.domains import Domains, Site, of_environment
from orchestrator.rules.pairing import Pairing
from orchestrator.rules.peer_protocol import Secret
from orchestrator.rules.tier_environment import TierEnvironment, tier_environment
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory, tier_process
from orchestrator.run.tier_process import TierServer
from orchestrator.storage.peer import Peer

_BOOT = "/proc/sys/kernel/random/boot_id"
_MOUNTS = "/proc/self/ns/mnt"
_SECRET_BYTES = 32
_WHICH = "which secret this is"
_PEER_S = 30.0  # how long a peer may say nothing


@dataclass(frozen=True)
class TierHost:
    """base: its directory. processes: those that run on it, ascending."""

    site: Site
    base: str
    processes: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.site.name


@dataclass
class _Reach:
    """How other hosts are reached. addresses: of each host's server, '' where there is none. extra: of servers on hosts
    that no process of this job runs on. server: the one that this process has started, if it has."""

    secret: bytes = field(default=b"", repr=False)
    addresses: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    server: TierServer | None = None
    peers: dict[str, Peer] = field(default_factory=dict)


@dataclass(frozen=True)
class TierHosts:
    """tier: as it was asked for. me: this process. places: of each process. names: of their hosts. problem: why no
    steps can be held, '' if they can: the same on all processes."""

    tier: MemoryTier
    run: str
    me: int
    places: tuple[Place, ...]
    names: tuple[str, ...]
    problem: str = ""
    reach: _Reach = field(default_factory=_Reach)

    @cached_property
    def hosts(self) -> tuple[TierHost, ...]:
        """In the order of their lowest processes."""
        return grouped(self.places, self.names)

    @cached_property
    def pairing(self) -> Pairing:
        return pairing.pair([host.site for host in self.hosts], self.tier.copies, self.tier.domain)

    @cached_property
    def _host_of(self) -> dict[int, int]:
        return {process: number for number, host in enumerate(self.hosts) for process in host.processes}

    def host_of(self, process: int) -> int:
        return self._host_of[process]

    @property
    def own(self) -> int:
        """The host of this process."""
        return self.host_of(self.me)

    @property
    def first_here(self) -> bool:
        """Whether this process is the first of its host: it does what is done once for a host."""
        return self.hosts[self.own].processes[0] == self.me

    def targets(self, process: int) -> tuple[int, ...]:
        """The hosts that take the copies of a process's part."""
        return self.pairing.targets[self.host_of(process)]

    @cached_property
    def incoming(self) -> tuple[int, ...]:
        """The processes whose copies this host takes."""
        return tuple(process for host in self.pairing.sources(self.own) for process in self.hosts[host].processes)

    @cached_property
    def survives(self) -> str:
        """What may be lost once a step is held, in words."""
        return survival.words([host.site for host in self.hosts], self.pairing.targets)

    # Reaching them.

    def address(self, host: int) -> str:
        return self.reach.addresses[host] if host < len(self.reach.addresses) else ""

    def peer(self, host: int) -> Peer | None:
        """The tier server of another host; None of one's own, and of one that has none."""
        return None if host == self.own else self._peer(self.address(host))

    @property
    def own_server(self) -> Peer | None:
        """The tier server of this host: it sends what is here to others."""
        return self._peer(self.address(self.own))

    @property
    def peers(self) -> list[Peer]:
        """The tier servers of all other hosts, those without a process of this job last."""
        found = [self.peer(host) for host in range(len(self.hosts))]
        return [peer for peer in found if peer] + self.bystanders

    @property
    def bystanders(self) -> list[Peer]:
        """The tier servers of hosts that no process of this job runs on: what they hold is alive all the same."""
        return [peer for peer in map(self._peer, self.reach.extra) if peer]

    def _peer(self, address: str) -> Peer | None:
        if not address:
            return None
        if address not in self.reach.peers:
            self.reach.peers[address] = Peer(address, self.reach.secret, self.run, _PEER_S)
        return self.reach.peers[address]

    def look_after_server(self) -> None:
        """Start this process's server again, at the same address, should it have died. Raises StorageError."""
        server = self.reach.server
        if server is not None and not server.running:
            server.close()
            self.reach.server = _start(self.tier, self.hosts[self.own].base, self.reach.secret, server.address)

    def close(self) -> None:
        """End the server that this process has started: once no other one needs it. Idempotent."""
        if self.reach.server:
            self.reach.server.close()
        for peer in self.reach.peers.values():
            peer.close()


_met: weakref.WeakKeyDictionary[Rendezvous, TierHosts] = weakref.WeakKeyDictionary()


def meet(tier: MemoryTier, rendezvous: Rendezvous, run: str, timeout_s: float) -> TierHosts:
    """Where the processes of this job hold steps of `run`; the servers run. A collective; once they have met, the same
    answer without one. Raises WaitTimeout."""
    if (known := _met.get(rendezvous)) and known.run == run:
        return known
    given = tier_environment(os.environ)
    places = tuple(gather(rendezvous, tier_rounds.PLACES, place(tier, given), timeout_s))
    names = tuple(rendezvous.hosts.get(process, "?") for process in range(rendezvous.count))
    found = TierHosts(tier, run, rendezvous.process, places, names)
    extra = given.peers[rendezvous.count :]
    if len(found.hosts) > 1 or any(extra):
        found = _connected(found, rendezvous, given, timeout_s)
    _met[rendezvous] = found
    return found


def left(rendezvous: Rendezvous) -> None:
    """The agent of this rendezvous is closed."""
    if known := _met.pop(rendezvous, None):
        known.close()


def _connected(hosts: TierHosts, rendezvous: Rendezvous, given: TierEnvironment, timeout_s: float) -> TierHosts:
    """With secret and servers. A collective."""
    problem = _problem(hosts)
    secret = given.secret or b""
    if not problem and not hosts.places[0].secret:
        made = agree(rendezvous, tier_rounds.SECRET, timeout_s, lambda: secrets.token_hex(_SECRET_BYTES))
        secret = bytes.fromhex(made)
    server, mine = None, Serving()
    if hosts.first_here and not problem:
        try:
            server = None if given.server else _start(hosts.tier, hosts.hosts[hosts.own].base, secret, given.listen)
            mine = Serving(server.address if server else given.server)
        except OrchestratorError as error:
            mine = Serving(problem=str(error))
    serving = gather(rendezvous, tier_rounds.SERVING, mine, timeout_s)
    for process, each in enumerate(serving):
        if each.problem and not problem:
            problem = f"process {process} ({hosts.names[process]}): {each.problem}"
    addresses = tuple(serving[host.processes[0]].address for host in hosts.hosts)
    extra = tuple(peer for peer in given.peers[rendezvous.count :] if peer and peer not in addresses)
    reach = _Reach(secret, addresses, extra, server)
    return TierHosts(hosts.tier, hosts.run, hosts.me, hosts.places, hosts.names, problem, reach)


def _problem(hosts: TierHosts) -> str:
    """Why these processes cannot reach each other, before anything is started."""
    for process, each in enumerate(hosts.places):
        if each.problem:
            return f"process {process} ({hosts.names[process]}): {each.problem}"
    first = hosts.places[0].secret
    for process, each in enumerate(hosts.places):
        if each.secret != first:
            missing = "has none" if not each.secret else "has another one" if first else "has one, process 0 has none"
            return (
                f"process {process} ({hosts.names[process]}) {missing}: ORCHESTRATOR_TIER_SECRET must be the same on "
                "all hosts of a job, or on none"
            )
    return ""


def _start(tier: MemoryTier, base: str, secret: bytes, listen: str) -> TierServer:
    """Raises StorageError, UsageError."""
    if not os.path.isdir(os.path.dirname(base)):
        raise StorageError(f"{os.path.dirname(base)}: there is no such directory; it is to hold the tier")
    return tier_process.start(base, secret, listen=listen or listen_address())


def place(tier: MemoryTier, given: TierEnvironment) -> Place:
    """Where this process is."""
    secret = Secret(given.secret).sign(_WHICH)[:16] if given.secret else ""
    try:
        domains = of_environment(os.environ, f"machine-{_boot()[:8]}", tier.domain)
        base = tier_directory.base(tier.directory)
    except OrchestratorError as error:
        return Place("", machine(), secret=secret, problem=str(error))
    return Place(base, machine(), domains.node, domains.rack, domains.slice, secret)


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
