"""Which hosts take the copies of which. Pure: all processes of a job come to the same answer by themselves.

- A copy is never on its own host, and never in its own domain where another has a host for it; the copies of one host
  are on different hosts, and in different domains where there are enough.
- Each host takes in as many copies as it gives out, `copies`, unless one domain has more than half of the hosts: then
  the others share what it gives out. With several copies and domains of unequal size, at most one more or less.
- A host that comes or goes changes few pairs besides its own: with one copy fewer than 5 on average, whatever the
  number of hosts, with more at most 12 for each (tests/rules/test_pairing.py).

Domains are in a ring, in an order of their names' hashes. The first copies of a domain's hosts go to the next domain in
it, the second ones to the one after that, and so on; what finds no room goes on along the ring. Who goes to whom
between two domains is a matching by a hash of both names: the pair with the smallest is made first. That is a stable
matching, so that one host more or less moves a short chain of others.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from orchestrator.rules.domains import HOST, Site, level_used

_MIX, _MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


@dataclass(frozen=True)
class Pairing:
    """targets: of each host, the hosts that take its copies, the first copy's first. level: at which these are in
    other domains. copies: how many each host has. notes: what was asked for and is not so, for people."""

    targets: tuple[tuple[int, ...], ...]
    level: str
    copies: int
    notes: tuple[str, ...] = ()

    def sources(self, host: int) -> tuple[int, ...]:
        """The hosts whose copies this one takes."""
        return tuple(other for other, targets in enumerate(self.targets) if host in targets)


def pair(sites: Sequence[Site], copies: int, asked: str) -> Pairing:
    """Where the copies of each of `sites` go. Their names must differ; their order does not matter for who is paired
    with whom. copies: how many are asked for. asked: the level, of `domains.LEVELS`, at which domains must differ."""
    if len(sites) < 2 or not copies:
        return Pairing(((),) * len(sites), HOST, 0)
    level, problem = level_used(sites, asked)
    possible = min(copies, len(sites) - 1)
    placing = _Placing(sites, level)
    for number in range(1, possible + 1):
        placing.place(number)
    notes = [] if level == asked else [_degraded(asked, level, problem)]
    if possible < copies:
        notes.append(f"{len(sites)} hosts: {possible} of the {copies} copies that were asked for")
    return Pairing(tuple(map(tuple, placing.targets)), level, possible, tuple(notes))


def _degraded(asked: str, level: str, problem: str) -> str:
    where = "other hosts, whatever machine they are on" if level == HOST else f"other {level}s"
    return f"{problem}: copies go to {where}, and the loss of a {asked} is not survived"


class _Placing:
    """targets: of each host, so far."""

    def __init__(self, sites: Sequence[Site], level: str) -> None:
        self.targets: list[list[int]] = [[] for _ in sites]
        self._taken = [0] * len(sites)
        self._hashes = [_hash(site.name) for site in sites]
        self._domain = [site.at(level) for site in sites]
        names = sorted(set(self._domain), key=lambda name: (_hash(name), name))
        by_name = sorted(range(len(sites)), key=lambda host: sites[host].name)
        self._ring = [[host for host in by_name if self._domain[host] == name] for name in names]

    def place(self, number: int) -> None:
        """One copy more of each host, the `number`th."""
        room = {host for host, taken in enumerate(self._taken) if taken < number}
        waiting = set(range(len(self.targets)))
        made: dict[int, int] = {}  # target -> source, of this copy
        count = len(self._ring)
        for distance in [*range(number, count), *range(1, min(number, count))]:
            if not waiting:
                break
            for position, hosts in enumerate(self._ring):
                there = self._ring[(position + distance) % count]
                found = self._match(
                    [host for host in hosts if host in waiting], [host for host in there if host in room]
                )
                made |= found
                waiting -= set(found.values())
                room -= found.keys()
        for host in sorted(waiting, key=self._hashes.__getitem__):
            self._find(host, made, room)
        for target, host in made.items():
            self.targets[host].append(target)
            self._taken[target] += 1

    def _match(self, hosts: Sequence[int], there: Sequence[int]) -> dict[int, int]:
        """Target -> source: no two who are not together prefer each other to whom they have."""
        made: dict[int, int] = {}
        wishes = {
            host: deque(
                sorted((other for other in there if self._spreads(host, other)), key=partial(self._weight, host))
            )
            for host in hosts
        }
        alone = list(hosts)
        while alone:
            host = alone.pop()
            while wishes[host]:
                other = wishes[host].popleft()
                before = made.get(other)
                if before is None or self._weight(host, other) < self._weight(before, other):
                    made[other] = host
                    alone += [] if before is None else [before]
                    break
        return made

    def _find(self, host: int, made: dict[int, int], room: set[int]) -> None:
        """A target for a host that has found no room along the ring."""
        for suits in (self._spreads, self._allowed):
            if free := [other for other in room if suits(host, other)]:
                self._give(host, min(free, key=partial(self._weight, host)), made, room)
                return
            swaps = [
                other for other, its in made.items() if suits(host, other) and any(suits(its, one) for one in room)
            ]
            if swaps:
                other = min(swaps, key=partial(self._weight, host))
                its = made.pop(other)
                made[other] = host
                self._give(
                    its,
                    min((one for one in room if suits(its, one)), key=partial(self._weight, its)),
                    made,
                    room,
                )
                return
        self._overload(host, made)

    def _give(self, host: int, other: int, made: dict[int, int], room: set[int]) -> None:
        made[other] = host
        room.discard(other)

    def _overload(self, host: int, made: dict[int, int]) -> None:
        """Nobody has room: the one that takes least by now."""
        others = [other for other in range(len(self.targets)) if other != host and other not in self.targets[host]]
        suiting = [other for other in others if self._allowed(host, other)] or others
        other = min(suiting, key=lambda one: (self._taken[one] + (one in made), self._weight(host, one)))
        self.targets[host].append(other)
        self._taken[other] += 1

    def _allowed(self, host: int, other: int) -> bool:
        return self._domain[other] != self._domain[host] and other not in self.targets[host]

    def _spreads(self, host: int, other: int) -> bool:
        """Allowed, and in a domain that has no copy of it yet."""
        taken = {self._domain[target] for target in self.targets[host]}
        return self._domain[other] != self._domain[host] and self._domain[other] not in taken

    def _weight(self, host: int, other: int) -> int:
        mixed = ((self._hashes[host] ^ (self._hashes[other] * 3)) * _MIX) & _MASK
        return ((mixed ^ (mixed >> 29)) * _MIX) & _MASK


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest(), "big")
