"""Where copies go: elsewhere, evenly, and mostly where they went before."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.rules.domains import Domains, Site
from orchestrator.rules.pairing import Pairing, pair


def in_slices(*sizes: int) -> list[Site]:
    return [
        Site(f"h{slice_}-{host}", Domains(f"n{slice_}-{host}", slice=f"s{slice_}"))
        for slice_, size in enumerate(sizes)
        for host in range(size)
    ]


def by_name(sites: list[Site], paired: Pairing) -> dict[str, tuple[str, ...]]:
    return {
        site.name: tuple(sites[target].name for target in targets)
        for site, targets in zip(sites, paired.targets, strict=True)
    }


def taken(paired: Pairing) -> list[int]:
    counted = Counter(target for targets in paired.targets for target in targets)
    return [counted[host] for host in range(len(paired.targets))]


jobs = st.lists(st.integers(1, 9), min_size=1, max_size=6).map(lambda sizes: in_slices(*sizes))


@settings(max_examples=300, deadline=None)
@given(jobs, st.integers(0, 4), st.randoms(use_true_random=False))
def test_copies_are_elsewhere_each_on_a_host_of_its_own_and_all_processes_agree(
    sites: list[Site], copies: int, order: random.Random
) -> None:
    paired = pair(sites, copies, "slice")
    assert paired.copies == min(copies, len(sites) - 1)
    for host, targets in enumerate(paired.targets):
        assert len(set(targets)) == len(targets) == paired.copies and host not in targets
        if paired.level == "slice":
            own = sites[host].domains.slice
            elsewhere = {other for other, site in enumerate(sites) if site.domains.slice != own}
            where = [sites[target].domains.slice for target in targets]
            if own in where:  # only once there is no host outside that has none
                assert elsewhere <= set(targets)
            if targets:
                assert targets[0] in elsewhere
    mixed = order.sample(sites, len(sites))
    assert by_name(mixed, pair(mixed, copies, "slice")) == by_name(sites, paired)


@settings(max_examples=300, deadline=None)
@given(jobs, st.integers(1, 3))
def test_each_host_takes_as_many_as_it_gives_unless_one_domain_has_more_than_half(
    sites: list[Site], copies: int
) -> None:
    paired = pair(sites, copies, "slice")
    sizes = Counter(site.domains.slice for site in sites)
    if paired.level != "slice" or max(sizes.values()) * 2 <= len(sites):
        counts = taken(paired)
        assert not counts or max(counts) - min(counts) <= (0 if copies == 1 else 2)
    if len(set(sizes.values())) == 1 and paired.copies < len(sizes):
        assert set(taken(paired)) <= {paired.copies}
        for targets in paired.targets:  # and the copies of one host are in different slices
            assert len({sites[target].domains.slice for target in targets}) == len(targets)


@pytest.mark.parametrize(
    "sizes", [(1,) * 24, (8, 8), (16,) * 4, (32,) * 8, (64, 64), (10, 1, 10), (3, 5, 7), (7, 4, 4, 9)]
)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_host_that_goes_or_comes_changes_few_other_pairs(sizes: tuple[int, ...], copies: int) -> None:
    """The same number either way: with and without it are two answers that differ by so much."""
    sites = in_slices(*sizes)
    with_all = by_name(sites, pair(sites, copies, "slice"))
    changed = 0
    chosen = random.Random(7).sample(range(len(sites)), min(12, len(sites)))
    for gone in chosen:
        rest = sites[:gone] + sites[gone + 1 :]
        without = by_name(rest, pair(rest, copies, "slice"))
        changed += sum(len(set(now) - set(with_all[name])) for name, now in without.items())
    assert changed / len(chosen) <= (5 if copies == 1 else 12 * copies)


def test_what_cannot_be_had_is_said_and_the_rest_is_done() -> None:
    alone = pair(in_slices(1), 1, "slice")
    assert alone.targets == ((),) and alone.copies == 0 and not alone.notes
    one_slice = pair(in_slices(4), 1, "slice")
    assert one_slice.level == "node" and sorted(target for (target,) in one_slice.targets) == [0, 1, 2, 3]
    assert one_slice.notes == (
        "all hosts are in one slice, s0: copies go to other nodes, and the loss of a slice is not survived",
    )
    few = pair(in_slices(1, 1, 1), 5, "slice")
    assert few.copies == 2 and few.notes == ("3 hosts: 2 of the 5 copies that were asked for",)
    one_machine = pair([Site("a", Domains("m")), Site("b", Domains("m"))], 1, "node")
    assert one_machine.level == "host" and one_machine.targets == ((1,), (0,))
    assert "other hosts, whatever machine they are on" in one_machine.notes[0]


def test_a_domain_of_more_than_half_of_the_hosts_is_shared_out_among_the_others() -> None:
    paired = pair(in_slices(6, 2), 1, "slice")
    assert sorted(taken(paired)) == [0, 0, 0, 0, 1, 1, 3, 3]
    assert pair(in_slices(6, 2), 1, "slice").sources(6) == tuple(
        host for host, (target,) in enumerate(paired.targets) if target == 6
    )
