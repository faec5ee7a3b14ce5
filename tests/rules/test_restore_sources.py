"""Where bytes will come from, by who wrote what and where that lies."""

from __future__ import annotations

from collections import Counter

import pytest

from orchestrator.rules.placement import PlacedHost, Placement
from orchestrator.rules.records import LeafSpec, TreeSpec
from orchestrator.rules.restore_cost import Target
from orchestrator.rules.restore_sources import forecast_sources, holders, hosts_of

# Eight rows of four, two rows a chunk: process 0 wrote the first two chunks, process 1 the others.
LEAF = LeafSpec(path=("w",), kind="array", dtype="float32", shape=(8, 4), chunk=(2, 4), sharding="P('data',)")
WRITERS = {f"w/c/{number}/0": number // 2 for number in range(4)}
CHUNK = 2 * 4 * 4


def placed(*hosts: PlacedHost) -> Placement:
    return Placement(format=1, epoch=1, time=1.0, asked="node", copies_asked=1, level="node", hosts=hosts)


ALONE = placed(PlacedHost("a", (0,)), PlacedHost("b", (1,)))
COPIES = placed(PlacedHost("a", (0,), (1,)), PlacedHost("b", (1,), (0,)))
THREE = placed(PlacedHost("a", (0,), (1,)), PlacedHost("b", (1,), (2,)), PlacedHost("c", (), ()))


@pytest.mark.parametrize(
    ("placement", "processes", "expected"),
    [
        (None, 1, [{"memory": 4 * CHUNK}]),
        (None, 2, [{"memory": 2 * CHUNK}] * 2),
        (ALONE, 2, [{"memory": 2 * CHUNK}] * 2),
        (ALONE, 1, [{"memory": 2 * CHUNK, "peers": 2 * CHUNK}]),
        (ALONE, 4, [{"memory": CHUNK}] * 4),
        (COPIES, 1, [{"memory": 4 * CHUNK}]),
        (THREE, 1, [{"memory": 2 * CHUNK, "peers": 2 * CHUNK}]),
    ],
)
def test_a_chunk_comes_from_ones_own_host_if_that_has_it_else_from_a_peer(
    placement: Placement | None, processes: int, expected: list[dict[str, int]]
) -> None:
    target, tree = Target({"data": processes}, processes), TreeSpec(leaves=(LEAF,))
    found = forecast_sources(tree, target, WRITERS, holders(placement, 2), hosts_of(placement, processes))
    assert found == [Counter(one) for one in expected]


def test_what_is_in_no_tier_comes_from_the_store() -> None:
    found = forecast_sources(TreeSpec(leaves=(LEAF,)), Target({"data": 1}, 1), {}, [], hosts_of(None, 1))
    assert found == [Counter(store=4 * CHUNK)]
