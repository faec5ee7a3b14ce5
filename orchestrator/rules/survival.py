"""What may be lost, and all parts of a held step are still there. Pure: of where copies are, not of what has happened.

A part is lost with its host and all hosts that have copies of it. That copies are complete is another matter: they are
in the moment in which a step counts as held, and from then on until something is lost; after a loss a step held by the
new start makes up for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

from orchestrator.rules.domains import HOST, LEVELS, Site

Targets = Sequence[Sequence[int]]  # of each host, the hosts that have copies of its part


def lost_parts(targets: Targets, lost: Collection[int]) -> list[int]:
    """The hosts whose part is nowhere any more, once all of `lost` are lost."""
    gone = set(lost)
    return [host for host in sorted(gone) if gone.issuperset(targets[host])]


def survives(targets: Targets, lost: Collection[int]) -> bool:
    return not lost_parts(targets, lost)


def domains(sites: Sequence[Site], level: str) -> list[list[int]]:
    """The hosts of each domain at a level. A host whose domain is not known is counted as one by itself."""
    found: dict[tuple[str, int], list[int]] = {}
    for host, site in enumerate(sites):
        name = site.at(level)
        found.setdefault((name, -1 if name else host), []).append(host)
    return list(found.values())


def any_one(sites: Sequence[Site], targets: Targets, level: str) -> bool:
    """Whether the loss of any one whole domain at this level is survived. False where its extent is not known."""
    if any(not site.at(level) for site in sites):
        return False
    return bool(sites) and all(survives(targets, lost) for lost in domains(sites, level))


def any_hosts(targets: Targets) -> int:
    """The largest number such that the loss of any so many hosts is survived."""
    return min((len(set(each)) for each in targets), default=0)


def losses(sites: Sequence[Site], level: str, count: int) -> Iterator[list[int]]:
    """All ways to lose `count` domains of a level at once: the hosts that are lost."""
    for chosen in combinations(domains(sites, level), count):
        yield sorted(host for domain in chosen for host in domain)


def words(sites: Sequence[Site], targets: Targets) -> str:
    """What may be lost, for people: `any one slice`, `any one node or any 2 hosts`, `no host`."""
    hosts = any_hosts(targets)
    found = [f"any one {level}" for level in reversed(LEVELS) if any_one(sites, targets, level)][:1]
    if hosts > 1 or (hosts and not found):
        found.append(f"any {hosts} hosts" if hosts > 1 else f"any one {HOST}")
    return " or ".join(found) or f"no {HOST}"
