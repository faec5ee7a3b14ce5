"""What a host is said to be lost with, by whom, and what cannot be told apart."""

from __future__ import annotations

import pytest

from orchestrator.errors import UsageError
from orchestrator.rules.domains import Domains, Site, level_used, of_environment


def slurm(address: str, pattern: str) -> dict[str, str]:
    return {"SLURM_TOPOLOGY_ADDR": address, "SLURM_TOPOLOGY_ADDR_PATTERN": pattern}


TREE = slurm("core.leaf3.node17", "switch.switch.node")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Domains("m")),
        ({"ORCHESTRATOR_DOMAIN": "slice=s0,rack=r3,node=n17"}, Domains("n17", "r3", "s0")),
        ({"ORCHESTRATOR_DOMAIN": " rack=r3 , node=n17"}, Domains("n17", "r3")),
        ({"ORCHESTRATOR_DOMAIN": "r3"}, Domains("m", "r3")),  # the level that was asked for
        ({"ORCHESTRATOR_DOMAIN": ""}, Domains("m")),
        (TREE, Domains("m", "core.leaf3")),
        (slurm(".ib-core.tors-1.gpu7", "switch.switch.switch.node"), Domains("m", "ib-core.tors-1")),
        ({**TREE, "ORCHESTRATOR_DOMAIN": "rack=mine"}, Domains("m", "mine")),
        (slurm("b8.tux1", "block.node"), Domains("m", "b8", "b8")),
        (slurm("tux1", "node"), Domains("m")),
        (slurm("leaf.node.with.dots", "switch.node"), Domains("m", "leaf")),
        # What others have set and nobody here knows is not known, and no error.
        (slurm("t:1:2:3.n", "torus:x:y:z.node"), Domains("m")),
        (slurm("leaf", "switch.node"), Domains("m")),
        ({"SLURM_TOPOLOGY_ADDR": "a.b"}, Domains("m")),
        ({"MEGASCALE_SLICE_ID": "2"}, Domains("m", "", "2")),
        ({"MEGASCALE_SLICE_ID": "2", "ORCHESTRATOR_DOMAIN": "slice=s9"}, Domains("m", "", "s9")),
    ],
)  # fmt: skip
def test_the_domains_of_a_host_are_what_its_environment_says(environ: dict[str, str], expected: Domains) -> None:
    assert of_environment(environ, "m", "rack") == expected


@pytest.mark.parametrize(
    "text", ["rack=", "rack=a,rack=b", "zone=a", "a b", "slice=s0,r3", "=a", "rack=a;slice=b", "rack=é", "-x", ","]
)
def test_what_is_no_domain_is_a_usage_error_that_quotes_it(text: str) -> None:
    with pytest.raises(UsageError, match=r"ORCHESTRATOR_DOMAIN=.*expected slice=NAME"):
        of_environment({"ORCHESTRATOR_DOMAIN": text}, "m", "rack")


def sites(*domains: Domains) -> list[Site]:
    return [Site(f"h{number}", each) for number, each in enumerate(domains)]


A, B, C = Domains("a", "r0", "s0"), Domains("b", "r0", "s0"), Domains("c", "r1", "s0")


@pytest.mark.parametrize(
    ("asked", "given", "used", "why"),
    [
        ("node", (A, B), "node", ""),
        ("rack", (A, B, C), "rack", ""),
        ("slice", (A, B, C), "rack", "all hosts are in one slice, s0"),
        ("slice", (A, B), "node", "all hosts are in one slice, s0"),
        ("rack", (A, Domains("b")), "node", "the rack of h1 is not known"),
        ("slice", (A, A), "host", "all hosts are in one slice, s0"),
        ("node", (A, A, A), "host", "all hosts are in one node, a"),
        ("rack", (Domains("a"), Domains("b"), Domains("c"), Domains("d"), Domains("e")), "node",
         "the rack of h0, h1, h2 and 2 others is not known"),
    ],
)  # fmt: skip
def test_where_a_level_cannot_be_told_apart_the_next_smaller_one_counts_and_is_said(
    asked: str, given: tuple[Domains, ...], used: str, why: str
) -> None:
    assert level_used(sites(*given), asked) == (used, why)
