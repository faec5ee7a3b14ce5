"""Which losses a held step survives: every loss of small jobs, one by one, and many of large ones.

    python -m tests.proof.survival                        # prints the table (5 seconds)
    python -m tests.proof.survival --write=docs/tiers.md  # writes it into the page

Where copies go is the shipped rule (`rules/pairing`). What is left after a loss is found out here without any other
rule: hosts are sets of parts, lost ones are taken away, and a step is there if the others have all of its parts. Each
answer is compared with `rules/survival`, which is what people are told; a difference ends this with 1.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from math import comb
from pathlib import Path

from orchestrator.rules import pairing, survival
from orchestrator.rules.domains import Domains, Site

BEGIN, END = "<!-- survival: begin -->", "<!-- survival: end -->"
ALL_MAX = 5_000  # losses of a kind; of more, DRAWN are drawn
DRAWN = 1_000
SEED = 23
HOSTS_LOST = (1, 2, 3, 10)
HOSTS_MAX, DOMAINS_MAX, COPIES_MAX = 12, 4, 3  # of the jobs of which every loss is tried


@dataclass(frozen=True)
class Layout:
    """hosts: in each domain. level: what a domain is; copies are asked to be in others."""

    hosts: tuple[int, ...]
    copies: int
    level: str = "slice"

    @property
    def domains(self) -> list[list[int]]:
        firsts = [sum(self.hosts[:number]) for number in range(len(self.hosts))]
        return [list(range(first, first + count)) for first, count in zip(firsts, self.hosts, strict=True)]

    @property
    def sites(self) -> list[Site]:
        return [self._site(domain, host) for domain, hosts in enumerate(self.domains) for host in hosts]

    def _site(self, domain: int, host: int) -> Site:
        node = f"node-{domain if self.level == 'node' else host}"
        return Site(f"host-{host}", Domains(node, slice=f"slice-{domain}" if self.level == "slice" else ""))

    def __str__(self) -> str:
        total, count = sum(self.hosts), len(self.hosts)
        sizes = "each its own" if count == total else "one" if count == 1 else str(count)
        uneven = f" of {', '.join(map(str, self.hosts))}" if max(self.hosts) - min(self.hosts) > 1 else ""
        return f"{total} | {self.level}s: {sizes}{uneven} | {self.copies}"


def evenly(hosts: int, domains: int) -> tuple[int, ...]:
    return tuple(hosts // domains + (number < hosts % domains) for number in range(domains))


PUBLISHED = (
    *(Layout(evenly(4, 4), copies, "node") for copies in range(4)),
    *(Layout(evenly(8, 2), copies) for copies in (1, 2)),
    *(Layout(evenly(12, 3), copies) for copies in (1, 2, 3)),
    Layout((12,), 1),
    Layout((7, 3, 2), 1),
    *(Layout(evenly(1000, 32), copies) for copies in (1, 2)),
)


class Wrong(Exception):
    """What is promised, and what happens, differ."""


class Placed:
    """A layout with its copies placed, and how each loss of it ends."""

    def __init__(self, layout: Layout) -> None:
        self.layout, self.sites = layout, layout.sites
        self.targets = pairing.pair(self.sites, layout.copies, layout.level).targets
        self._has = [{host} for host in range(len(self.targets))]
        for host, takers in enumerate(self.targets):
            for taker in takers:
                self._has[taker].add(host)

    @property
    def promised(self) -> str:
        return survival.words(self.sites, self.targets)

    def survives(self, lost: Collection[int]) -> bool:
        """Whether the hosts that are left have the parts of all. Raises Wrong if the rule says something else."""
        gone = frozenset(lost)
        left = (parts for host, parts in enumerate(self._has) if host not in gone)
        found = len(set(chain.from_iterable(left))) == len(self._has)
        if found != survival.survives(self.targets, gone):
            raise Wrong(f"{self.layout}: {sorted(gone)} are lost: the rule says {not found}, expected {found}")
        return found

    def losses(self, count: int) -> tuple[list[tuple[int, ...]], bool]:
        """All sets of so many hosts; or some of them, and False."""
        hosts = len(self.targets)
        if comb(hosts, count) <= ALL_MAX:
            return list(combinations(range(hosts), count)), True
        chance = random.Random(SEED)
        return [tuple(chance.sample(range(hosts), count)) for _ in range(DRAWN)], False

    def domain_losses(self, count: int) -> list[list[int]]:
        return [list(chain.from_iterable(chosen)) for chosen in combinations(self.layout.domains, count)]


def try_all(layout: Layout) -> int:
    """Every set of hosts is lost. Returns how many; raises Wrong if a promise is not kept, or is too small."""
    placed = Placed(layout)
    hosts = len(placed.targets)
    ends = {count: [placed.survives(lost) for lost in placed.losses(count)[0]] for count in range(hosts + 1)}
    safe = next(count for count in range(hosts + 1) if not all(ends.get(count + 1, [False])))
    if survival.any_hosts(placed.targets) != safe:
        raise Wrong(f"{layout}: any {survival.any_hosts(placed.targets)} hosts may be lost, expected {safe}")
    one = all(placed.survives(lost) for lost in placed.domain_losses(1))
    if survival.any_one(placed.sites, placed.targets, layout.level) != one:
        raise Wrong(f"{layout}: the rule says of any one {layout.level}: {not one}")
    if layout.copies and len(layout.hosts) > 1 and not one:
        raise Wrong(f"{layout}: there are other domains, and copies are not in them")
    return sum(map(len, ends.values()))


def layouts(hosts_max: int) -> Iterator[Layout]:
    for hosts in range(1, hosts_max + 1):
        for sizes in _partitions(hosts, hosts, DOMAINS_MAX):
            for copies in range(COPIES_MAX + 1):
                yield Layout(sizes, copies)


def _partitions(total: int, largest: int, parts: int) -> Iterator[tuple[int, ...]]:
    if not total:
        yield ()
    elif parts:
        for first in range(min(total, largest), 0, -1):
            yield from ((first, *rest) for rest in _partitions(total - first, first, parts - 1))


def row(layout: Layout) -> str:
    placed = Placed(layout)
    cells = []
    for count in HOSTS_LOST:
        sets, whole = placed.losses(count) if count <= len(placed.targets) else ([], True)
        cells.append(_share([placed.survives(lost) for lost in sets], whole))
    domains = [_share([placed.survives(lost) for lost in placed.domain_losses(count)], True) for count in (1, 2)]
    return f"| {layout} | {placed.promised} | {' | '.join([*cells, *domains])} |"


def _share(ends: list[bool], whole: bool) -> str:
    if not ends:
        return ""
    if not whole:
        return f"{100 * sum(ends) / len(ends):.1f}%"
    return "all" if all(ends) else f"{sum(ends)} of {len(ends)}"


def table() -> str:
    counts = " | ".join(f"{count} host{'s' * (count > 1)}" for count in HOSTS_LOST)
    lines = [
        f"| hosts | domains | copies | promised | {counts} | 1 domain | 2 domains |",
        "|---|---|---|---|" + "---|" * (len(HOSTS_LOST) + 2),
        *map(row, PUBLISHED),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page that has the marks")
    args = parser.parse_args()
    try:
        tried = [try_all(layout) for layout in layouts(HOSTS_MAX)]
        text = table()
    except Wrong as error:
        print(f"wrong: {error}", file=sys.stderr)
        return 1
    told = (
        f"Every loss of {len(tried):,} layouts, up to {HOSTS_MAX} hosts in up to {DOMAINS_MAX} domains with up to "
        f"{COPIES_MAX} copies: {sum(tried):,} losses, and the rule is right about each."
    )
    print(f"{text}\n\n{told}")
    if args.write:
        page = args.write.read_text()
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        args.write.write_text(f"{before}{BEGIN}\n{text}\n\n{told}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
