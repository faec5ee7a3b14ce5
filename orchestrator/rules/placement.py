"""Where the parts of held steps and their copies are, as each process's tier records it for whoever looks, in
`placement.json`, when an incarnation begins to hold. Nothing goes by it: a restore looks where files are. Pure.
"""

from __future__ import annotations

from orchestrator.rules import survival
from orchestrator.rules.domains import Domains, Site
from orchestrator.rules.records import Record


class PlacedHost(Record, frozen=True, omit_defaults=True):
    """A host: its name, the processes that run on it, and the hosts, by index, that take the copies of their parts."""

    name: str
    processes: tuple[int, ...]
    targets: tuple[int, ...] = ()
    node: str = ""
    rack: str = ""
    slice: str = ""

    @property
    def site(self) -> Site:
        return Site(self.name, Domains(self.node, self.rack, self.slice))


class Placement(Record, frozen=True):
    """Of incarnation `epoch`. asked, copies_asked: as `oc.memory` was given them. level: at which copies are in other
    domains. notes: what was asked for and is not so, for people."""

    format: int
    epoch: int
    time: float
    asked: str
    copies_asked: int
    level: str
    hosts: tuple[PlacedHost, ...]
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> list[tuple[int, ...]]:
        return [host.targets for host in self.hosts]

    @property
    def survives(self) -> str:
        """What may be lost once a step is held, in words: `any one slice`."""
        return survival.words([host.site for host in self.hosts], self.targets)
