"""Where the files of held steps are, on all hosts of a job: what each host tells of its own, and what follows from it.

Two rounds. In the first, each host says which steps it knows, by logs and manifests; so a host that is new learns of
them. In the second, which files of each it has. One process speaks for a host, and none for another host, but for those
that run no process of this job any more: host 0 asks their servers. All processes draw the same conclusions. Main
thread; `find` is a collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from absl import logging

from orchestrator.errors import OrchestratorError
from orchestrator.job import tier_rounds
from orchestrator.job.rendezvous import Rendezvous
from orchestrator.job.rounds import gather
from orchestrator.job.tier_hosts import TierHosts
from orchestrator.job.tier_rounds import KnownStep, OfferedPart, OfferedStep
from orchestrator.rules import held, held_files, keys
from orchestrator.rules.attempt_id import AttemptId
from orchestrator.rules.held import Offer
from orchestrator.rules.records import LiveStep, Manifest
from orchestrator.rules.restore_sources import PEERS
from orchestrator.run import held_steps
from orchestrator.run.held_steps import HeldSteps, Placed, Wrong
from orchestrator.storage.peer import Peer
from orchestrator.storage.sources import Source

_STEPS_MAX = 16  # of those that a host knows, the newest
_ASKED_MAX = 8  # of those that are wanted
_FAULT_CHARS = 500


@dataclass(frozen=True)
class Found:
    """A step, and where its files are. files: how many there are. parts: which of them, by host and directory. faults:
    why some are not offered, one line for each host that says so."""

    live: LiveStep
    files: int = 0
    parts: Mapping[tuple[int, int], frozenset[int]] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def lacking(self) -> list[int]:
        return sorted(set(range(self.files)).difference(*self.parts.values()))

    @property
    def is_whole(self) -> bool:
        return bool(self.files) and not self.lacking


class HeldOffers:
    """What the hosts of a job tell. `hosts`: as they have met. `steps`: what is on this one. `store`: the run's."""

    def __init__(
        self, hosts: TierHosts, steps: HeldSteps, store: Source, rendezvous: Rendezvous, timeout_s: float
    ) -> None:
        self._hosts, self._steps, self._store = hosts, steps, store
        self._rendezvous, self._timeout_s = rendezvous, timeout_s
        self._sources: dict[tuple[int, int], Source] = {}
        self._wrong: dict[Offer, list[Wrong]] = {}
        self._manifests: Mapping[Offer, Sequence[tuple[int, int]]] = {}
        # Hosts without a process of this job have the numbers after the last that has one.
        self._bystanders = dict(enumerate(hosts.bystanders, len(hosts.hosts)))

    def find(self, committed: Sequence[KnownStep], wanted: Callable[[AttemptId], bool]) -> dict[Offer, Found]:
        """Of the steps that are wanted, and of `committed` ones: where their files are. A collective."""
        speaks_for = self._speaks_for()
        known = gather(self._rendezvous, tier_rounds.KNOWN, _known(speaks_for, committed), self._timeout_s)
        lives, self._manifests = _asked(known, committed, wanted)
        saved = {_offer(one) for one in committed}
        mine = tuple(
            self._offered(host, steps, live, self._elsewhere(host, offer), offer in saved)
            for offer, live in lives.items()
            for host, steps in speaks_for.items()
            if steps.has(live)
        )
        offered = gather(self._rendezvous, tier_rounds.OFFERS, mine, self._timeout_s)
        found = {offer: self._found(live, offer, offered) for offer, live in lives.items()}
        for offer in [offer for offer in self._wrong if found[offer].is_whole]:
            for wrong in self._wrong[offer]:
                self._steps.tell(offer.id, wrong)
        return found

    def _speaks_for(self) -> dict[int, HeldSteps]:
        """By host: the first process of a host for that; process 0 for those that nobody is on."""
        if self._hosts.hosts[self._hosts.own].processes[0] != self._hosts.me:
            return {}
        found = {self._hosts.own: self._steps}
        for host, peer in self._bystanders.items() if self._hosts.me == 0 else ():
            try:
                parts = {process: self._source(host, process) for process in peer.parts()}
            except OrchestratorError as error:
                logging.warning("a memory tier is left out: %s", error)
            else:
                found[host] = HeldSteps(peer.url, parts)
        return found

    def _offered(
        self, host: int, steps: HeldSteps, live: LiveStep, elsewhere: Sequence[Source], is_saved: bool
    ) -> OfferedStep:
        """What a host has of a step. elsewhere: where its manifest is, if it is not there; of one that `is_saved`, in
        the store."""
        told = OfferedStep(live.step, live.attempt, live.manifest_crc32c)
        try:
            manifest = steps.manifest(live, [*elsewhere, self._store] if is_saved else elsewhere)
            files, wrong = steps.files(live, manifest)
        except OrchestratorError as error:
            return msgspec.structs.replace(told, fault=str(error)[:_FAULT_CHARS])
        parts = tuple(OfferedPart(host, process, held_files.spans(numbers)) for process, numbers in files.items())
        self._wrong.setdefault(held.offer(live), []).extend(wrong)
        fault = str(wrong[0])[:_FAULT_CHARS] if wrong else ""
        return msgspec.structs.replace(told, files=len(manifest.files) + 1, parts=parts, fault=fault)

    def _elsewhere(self, host: int, offer: Offer) -> list[Source]:
        """Where the manifest of a step is, beside a host."""
        places = self._manifests.get(offer, ())
        others = [place for place in places if place[0] != host and self._reaches(place[0])]
        return [self._source(*place) for place in held_files.spread(others, self._hosts.me)]

    def _found(self, live: LiveStep, offer: Offer, offered: Sequence[Sequence[OfferedStep]]) -> Found:
        count, parts, faults = 0, dict[tuple[int, int], frozenset[int]](), []
        for process, each in enumerate(offered):
            who = f"process {process} ({self._rendezvous.hosts.get(process, '?')})"
            for one in each:
                if Offer(one.step, one.attempt, one.manifest_crc32c) == offer:
                    count = max(count, one.files)
                    parts |= {
                        (part.host, part.process): held_files.numbers(part.files, one.files)
                        for part in one.parts
                        if self._reaches(part.host)
                    }
                    faults += [f"{who}: {one.fault}"] if one.fault else []
        return Found(live, count, parts, tuple(faults))

    def why(self, found: Found) -> str:
        """Why a step cannot be had."""
        if found.faults:
            return found.faults[0]
        number = found.lacking[0] if found.lacking else 0
        name = keys.MANIFEST
        with contextlib.suppress(OrchestratorError):
            name = held_files.names(self.manifest(found))[number]
        return f"{name} is missing: none of {len(self._hosts.hosts)} hosts has it"

    def manifest(self, found: Found) -> Manifest:
        """Of a step that is whole. Raises Damaged, StorageError."""
        return self._steps.manifest(found.live, self._elsewhere(self._hosts.own, held.offer(found.live)))

    # Reading it.

    def placed(self, found: Found) -> Placed:
        """In the order in which this process asks: what is on its host, then the others, which not all begin with the
        same one."""
        mine = [(where, files) for where, files in found.parts.items() if where[0] == self._hosts.own]
        theirs = [(where, files) for where, files in sorted(found.parts.items()) if where[0] != self._hosts.own]
        ordered = [*mine, *held_files.spread(theirs, self._hosts.me)]
        return [(self._source(*where), files) for where, files in ordered]

    def _reaches(self, host: int) -> bool:
        return host in (self._hosts.own, *self._bystanders) or self._peer(host) is not None

    def _peer(self, host: int) -> Peer | None:
        return self._bystanders.get(host) or self._hosts.peer(host)

    def _source(self, host: int, process: int) -> Source:
        """The directory of a process on a host that can be reached."""
        if host == self._hosts.own:
            return self._steps.parts[process]
        if (host, process) not in self._sources:
            peer = self._peer(host)
            assert peer is not None
            self._sources[host, process] = Source(PEERS, peer.part(process), peer.address)
        return self._sources[host, process]


def _known(speaks_for: Mapping[int, HeldSteps], committed: Sequence[KnownStep]) -> tuple[KnownStep, ...]:
    """What the hosts that this process speaks for know: the newest of it."""
    found: dict[Offer, KnownStep] = {}
    for host, steps in speaks_for.items():
        lives = {offer: (live, True) for offer, live in steps.listed.items()}
        lives |= {_offer(one): (live, True) for one in committed if steps.has(live := _live(one))}
        others = steps.unlogged(AttemptId(one.step, one.attempt) for one in committed)
        lives |= {offer: (live, False) for offer, live in others.items()}
        for offer, (live, logged) in lives.items():
            before = found.get(offer) or KnownStep(*offer.id, offer.manifest_crc32c, live.bytes, live.time, False)
            where = steps.where_manifest(live)
            found[offer] = msgspec.structs.replace(
                before,
                logged=before.logged or logged,
                manifests=before.manifests + (((host, where),) if where is not None else ()),
            )
    newest = sorted(found.values(), key=lambda one: held.rank(AttemptId(one.step, one.attempt)), reverse=True)
    return tuple(newest[:_STEPS_MAX])


def _asked(
    known: Iterable[Sequence[KnownStep]], committed: Sequence[KnownStep], wanted: Callable[[AttemptId], bool]
) -> tuple[dict[Offer, LiveStep], dict[Offer, list[tuple[int, int]]]]:
    """Of which steps the hosts are asked what they have, the newest first, and where their manifests are. The same on
    all processes."""
    told = [one for each in known for one in each]
    logged = {_offer(one) for one in told if one.logged}
    in_logs = {offer.id for offer in logged}
    manifests: dict[Offer, list[tuple[int, int]]] = {}
    lives: dict[Offer, LiveStep] = {}
    for one in told:
        attempt = AttemptId(one.step, one.attempt)
        if _offer(one) in logged or attempt not in in_logs:  # else it is another manifest than the logs'
            manifests.setdefault(_offer(one), []).extend(one.manifests)
            if wanted(attempt):
                lives.setdefault(_offer(one), _live(one))
    newest = sorted(lives.items(), key=lambda one: (held.rank(one[0].id), one[0].manifest_crc32c), reverse=True)
    in_tiers = {_offer(one): _live(one) for one in committed if _offer(one) in manifests}
    return dict(newest[:_ASKED_MAX]) | in_tiers, manifests


def _offer(one: KnownStep) -> Offer:
    return Offer(one.step, one.attempt, one.manifest_crc32c)


def _live(one: KnownStep) -> LiveStep:
    return held_steps.known(AttemptId(one.step, one.attempt), one.manifest_crc32c, one.bytes, one.time)
