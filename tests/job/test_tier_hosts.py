"""Which processes share a host, and who takes whose copies."""

from __future__ import annotations

from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator.errors import UsageError
from orchestrator.job import tier_hosts
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.tier_hosts import TierHosts
from orchestrator.job.tier_rounds import Place


def on(*places: tuple[str, str], tier: oc.MemoryTier | None = None, me: int = 0) -> TierHosts:
    """A job with a process at each place: a machine, which is its own node, and a directory."""
    where = tuple(Place(base, machine, machine) for machine, base in places)
    names = tuple(f"host-{number}" for number in range(len(places)))
    return TierHosts(tier or oc.memory(), "0" * 16, me, where, names)


def test_processes_that_share_machine_and_directory_are_one_host() -> None:
    hosts = on(("m0", "/a"), ("m1", "/a"), ("m0", "/a"), ("m0", "/b"))
    assert [(host.base, host.processes) for host in hosts.hosts] == [("/a", (0, 2)), ("/a", (1,)), ("/b", (3,))]
    assert [hosts.host_of(process) for process in range(4)] == [0, 1, 0, 2]


def test_copies_go_to_another_machine_where_there_is_one() -> None:
    hosts = on(("m0", "/a"), ("m0", "/b"), ("m1", "/a"), ("m1", "/b"), me=2)
    for process in range(4):
        (target,) = hosts.targets(process)
        assert hosts.places[hosts.hosts[target].processes[0]].machine != hosts.places[process].machine
    assert len(hosts.incoming) == 1 and hosts.survives == "any one node"


def test_on_one_host_there_is_nobody_to_take_copies_and_nothing_is_promised() -> None:
    hosts = on(("m0", "/a"), ("m0", "/a"))
    assert hosts.targets(0) == () and hosts.incoming == () and hosts.survives == "no host"
    assert not hosts.pairing.notes


def test_a_process_meets_once_and_says_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DOMAIN", "r7")
    me, tier = SingleProcess(), oc.memory(directory=tmp_path, domain="rack")
    met = tier_hosts.meet(tier, me, "0" * 16, 1.0)
    assert met is tier_hosts.meet(tier, me, "0" * 16, 1.0)
    (place,) = met.places
    assert place.rack == "r7" and place.base.startswith(str(tmp_path.resolve())) and place.machine and place.node


def test_what_is_no_domain_is_the_users_error_before_anybody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DOMAIN", "zone=a")
    with pytest.raises(UsageError, match="ORCHESTRATOR_DOMAIN='zone=a'"):
        oc.Agent(tmp_path / "run", tiers=[oc.memory(directory=tmp_path)])
