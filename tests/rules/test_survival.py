"""Which losses a placement survives: by looking at all of them, and in words."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.rules import survival
from orchestrator.rules.domains import Domains, Site
from orchestrator.rules.pairing import pair


def sites(slices: int, racks: int, hosts: int) -> list[Site]:
    return [
        Site(f"h{s}{r}{h}", Domains(f"n{s}{r}{h}", f"r{s}{r}", f"s{s}"))
        for s in range(slices)
        for r in range(racks)
        for h in range(hosts)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 3),
    st.sampled_from(["node", "rack", "slice"]),
)
def test_what_is_promised_is_what_losing_everything_in_turn_finds(
    slices: int, racks: int, hosts: int, copies: int, asked: str
) -> None:
    all_sites = sites(slices, racks, hosts)
    paired = pair(all_sites, copies, asked)

    def alive(lost: tuple[int, ...]) -> bool:
        return all(host not in lost or set(paired.targets[host]) - set(lost) for host in range(len(all_sites)))

    most = survival.any_hosts(paired.targets)
    assert most == paired.copies
    for count in range(min(len(all_sites), 3) + 1):
        every = all(alive(lost) for lost in combinations(range(len(all_sites)), count))
        assert every == (count <= most)
    for level in ("node", "rack", "slice"):
        each = survival.losses(all_sites, level, 1)
        assert survival.any_one(all_sites, paired.targets, level) == all(alive(tuple(lost)) for lost in each)
    if paired.copies and paired.level == asked:
        assert survival.any_one(all_sites, paired.targets, asked)


@pytest.mark.parametrize(
    ("shape", "copies", "asked", "expected"),
    [
        ((2, 1, 2), 1, "slice", "any one slice"),
        ((3, 1, 2), 2, "slice", "any one slice or any 2 hosts"),
        ((1, 2, 2), 1, "rack", "any one rack"),
        ((1, 1, 3), 1, "slice", "any one node"),
        ((1, 1, 3), 2, "node", "any one node or any 2 hosts"),
        ((2, 2, 2), 0, "node", "no host"),
        ((1, 1, 1), 1, "node", "no host"),
    ],
)
def test_what_may_be_lost_is_said_in_words(shape: tuple[int, int, int], copies: int, asked: str, expected: str) -> None:
    all_sites = sites(*shape)
    assert survival.words(all_sites, pair(all_sites, copies, asked).targets) == expected


def test_where_domains_are_not_known_only_hosts_are_promised() -> None:
    unknown = [Site("a"), Site("b"), Site("c")]
    paired = pair(unknown, 1, "rack")
    assert survival.words(unknown, paired.targets) == "any one host"
    on_one_machine = [Site("a", Domains("m")), Site("b", Domains("m"))]
    assert survival.words(on_one_machine, pair(on_one_machine, 1, "node").targets) == "any one host"
    assert not survival.survives(paired.targets, [0, 1, 2]) and survival.lost_parts(paired.targets, [0]) == []
