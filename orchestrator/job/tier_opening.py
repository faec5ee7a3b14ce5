"""Opening the memory tiers of a job for an incarnation: where each process holds, that all are reached, and the store
that held steps are written to. Main thread; `open_tiers` is a collective.

Process 0's log says what is held, so every process reads it; and each process asks the hosts that are to take its
copies, which thereby learn of the epoch. Nobody else is asked: a job of a thousand hosts opens by a thousand small
reads of one server, and as many requests as there are copies.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from absl import logging

from orchestrator.errors import OrchestratorError, StorageError
from orchestrator.job import tier_hosts, tier_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import agree, gather
from orchestrator.job.tier_hosts import TierHosts
from orchestrator.job.tier_rounds import Opened
from orchestrator.rules import keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.codec import encode
from orchestrator.rules.placement import PlacedHost, Placement
from orchestrator.rules.records import FORMAT, Head
from orchestrator.rules.tiers import MemoryTier
from orchestrator.run import tier_directory
from orchestrator.run.journal_store import JournalStore
from orchestrator.run.tier import Beside, LogOf, OwnTier, log_to_read
from orchestrator.run.tier_keeping import Keeper
from orchestrator.run.tier_room import Room
from orchestrator.storage import PosixStorage
from orchestrator.storage.copied import CopiedStorage
from orchestrator.storage.joined import JoinedStorage
from orchestrator.storage.parts import Parts
from orchestrator.storage.port import Reads
from orchestrator.storage.read_only import ReadOnlyStorage

_TRIES, _PAUSE_S = 3, 1.0


@dataclass(frozen=True)
class OpenTiers:
    """own: this process's part. storage: it, with its copies. of_all: the tiers of all processes, with the log of
    process 0's. keeper: what frees memory."""

    hosts: TierHosts
    own: OwnTier
    storage: CopiedStorage
    of_all: JournalStore
    keeper: Keeper

    @property
    def incoming(self) -> float:
        """How many parts of other hosts come here for each of this host's own."""
        return len(self.hosts.incoming) / len(self.hosts.hosts[self.hosts.own].processes)

    def follow(self) -> Head:
        """Process 0's log; what it says is held is now in this process's, too. Raises StorageError, Fenced."""
        if self.hosts.me == 0:
            return self.of_all.require_head()
        for tries in range(_TRIES):
            try:
                return self.own.follow(self.of_all)
            except StorageError:  # thousands ask one server at once
                if tries == _TRIES - 1:
                    raise
                time.sleep(random.uniform(0, _PAUSE_S))
            finally:
                if peer := self.hosts.peer(self.hosts.host_of(0)):
                    peer.close()  # until the next held step the connection is somebody else's
        raise AssertionError("unreachable")


def open_tiers(
    tier: MemoryTier, store: JournalStore, rendezvous: Rendezvous, epoch: int, timeout_s: float
) -> OpenTiers | None:
    """Incarnation `epoch` is open in the run's journal: open it in the tiers. None, and a warning, if no steps can be
    held: on all processes. Raises WaitTimeout."""
    run = agree(rendezvous, tier_rounds.RUN, timeout_s, partial(_run, store))
    hosts = tier_hosts.meet(tier, rendezvous, run, timeout_s)
    own, mine = _open(tier, hosts, store, epoch)
    places = gather(rendezvous, tier_rounds.OPENED, mine, timeout_s)
    failed = any(place.problem for place in places)
    reached = gather(rendezvous, tier_rounds.REACHED, "" if failed else _reach(hosts, places, epoch), timeout_s)
    if problem := _problem(hosts, places, reached):
        logging.warning("no steps are held in memory, saves to the store go on: %s", problem)
        return None
    assert own is not None
    if rendezvous.process == 0:
        for note in hosts.pairing.notes:
            logging.warning("held steps: %s", note)
        logging.info("held steps survive the loss of %s", hosts.survives)
    _record(hosts, own, epoch)
    return _joined(hosts, own, store, places, epoch)


def _record(hosts: TierHosts, own: OwnTier, epoch: int) -> None:
    """For whoever looks at the tier. It is in the place of an older start's."""
    placed = Placement(
        format=FORMAT,
        epoch=epoch,
        time=time.time(),
        asked=hosts.tier.domain,
        copies_asked=hosts.tier.copies,
        level=hosts.pairing.level,
        hosts=tuple(
            PlacedHost(
                name=host.name,
                processes=host.processes,
                targets=targets,
                node=host.site.domains.node,
                rack=host.site.domains.rack,
                slice=host.site.domains.slice,
            )
            for host, targets in zip(hosts.hosts, hosts.pairing.targets, strict=True)
        ),
        notes=hosts.pairing.notes,
    )
    try:
        own.storage.delete(keys.PLACEMENT)
        own.storage.create(keys.PLACEMENT, encode(placed))
    except OrchestratorError as error:
        logging.warning("%s: where copies are is not recorded: %s", own.path, error)


def _run(store: JournalStore) -> str:
    """'' if the journal does not tell."""
    try:
        return tier_directory.identity(store) or ""
    except OrchestratorError as error:
        logging.warning("which run this is cannot be read: %s", error)
        return ""


def _open(tier: MemoryTier, hosts: TierHosts, store: JournalStore, epoch: int) -> tuple[OwnTier | None, Opened]:
    if not hosts.run:
        return None, Opened("", problem="the first entry of the run's journal cannot be read")
    if hosts.problem:  # which names the process
        return None, Opened("")
    path = ""
    try:
        path = tier_directory.of_process(tier.directory, hosts.run, hosts.me)
        own = OwnTier(path, store.writer, store)
        head = own.open_epoch(epoch, store.durable_version)
        if hosts.first_here:
            Room(os.path.dirname(path)).record(tier.bytes_max)
    except OrchestratorError as error:
        return None, Opened(path, problem=str(error))
    return own, Opened(path, head.version, head.write_id, tuple((one.step, one.attempt) for one in head.live))


def _reach(hosts: TierHosts, places: Sequence[Opened], epoch: int) -> str:
    """Why this process cannot read what others have just written to their tiers, or the hosts that are to take its
    copies do not answer; '' if all is well."""
    if hosts.problem:
        return ""
    for process in sorted({0, *hosts.hosts[hosts.own].processes} - {hosts.me}):
        place = places[process]
        try:
            seen = log_to_read(_part(hosts, process, place.path)).entry(place.version).write_id
            problem = "" if seen == place.write_id else "another one of that name is there"
        except OrchestratorError as error:
            problem = str(error)
        if problem:
            return f"cannot reach the tier of process {process} ({hosts.names[process]}): {problem}"
    for host in hosts.targets(hosts.me):
        try:
            if peer := hosts.peer(host):
                peer.announce(epoch)
        except OrchestratorError as error:
            return f"cannot reach {hosts.hosts[host].name}, which is to take its copies: {error}"
    return ""


def _problem(hosts: TierHosts, places: Sequence[Opened], reached: Sequence[str]) -> str:
    if hosts.problem:
        return hosts.problem
    for process, problem in enumerate([place.problem for place in places]):
        if problem:
            return f"process {process} ({hosts.names[process]}): {problem}"
    for process, problem in enumerate(reached):
        if problem:
            return f"process {process} ({hosts.names[process]}) {problem}"
    return ""


def _part(hosts: TierHosts, process: int, path: str) -> Reads:
    """What another process writes, as this one reads it. Raises StorageError where that is not to be had."""
    if hosts.host_of(process) == hosts.own:
        tier_directory.check_path(path)
        return PosixStorage(path)
    peer = hosts.peer(hosts.host_of(process))
    if peer is None:
        raise StorageError(f"{hosts.hosts[hosts.host_of(process)].name} has no tier server")
    return peer.part(process)


def _joined(hosts: TierHosts, own: OwnTier, store: JournalStore, places: Sequence[Opened], epoch: int) -> OpenTiers:
    here = hosts.hosts[hosts.own].processes
    # Process 0 decides, so it reads what all have written; the others read its log, and its part.
    read = range(len(places)) if hosts.me == 0 else sorted({0, *here})
    others = {process: _part(hosts, process, places[process].path) for process in read if process != hosts.me}
    near = [part for process, part in others.items() if process in here]
    far = Parts(f"the other hosts of {own.storage.url}", {p: part for p, part in others.items() if p not in here})
    storage = CopiedStorage(own.storage, _sender(hosts), len(hosts.targets(hosts.me)), has_log=hosts.me == 0)
    log = LogOf(storage) if hosts.me == 0 else LogOf(ReadOnlyStorage(others[0]))
    of_all = JournalStore(JoinedStorage(storage, [*near, far], log=log), store.writer, run=store)
    of_all.note_durable(places[0].version, places[0].write_id)
    listed = {AttemptId(*one) for place in places for one in place.listed}
    beside = Beside(own.path, here) if hosts.first_here else None
    name = hosts.hosts[hosts.own].name
    keeper = Keeper(own, beside, epoch, listed, decides=hosts.me == 0, host=name, processes=len(here))
    return OpenTiers(hosts, own, storage, of_all, keeper)


def _sender(hosts: TierHosts) -> Callable[[Sequence[str]], None]:
    """What sends objects of this process's part to the hosts that take its copies, by the server of its own host: no
    byte of them passes through this interpreter."""
    targets = hosts.targets(hosts.me)
    names = {hosts.address(host): hosts.hosts[host].name for host in targets}
    limit = hosts.tier.copy_bytes_per_s
    share = None if limit is None else max(1, limit // len(hosts.hosts[hosts.own].processes))

    def send(keys: Sequence[str]) -> None:
        server = hosts.own_server
        assert server is not None  # there are targets, so there are servers
        try:
            server.send(hosts.me, keys, list(names), share)
        except StorageError as error:
            who = ", ".join(name for address, name in names.items() if address in str(error)) or "its own tier server"
            raise type(error)(f"no copy on {', '.join(names.values())}: {who}: {error}") from error

    return send
