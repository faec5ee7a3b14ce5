"""Which processes share a host, and who takes whose copies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import orchestrator as oc
from orchestrator.errors import UsageError
from orchestrator.job import tier_hosts
from orchestrator.job.rendezvous import SingleProcess
from orchestrator.job.tier_hosts import TierHosts
from orchestrator.job.tier_rounds import Place
from orchestrator.rules.tier_environment import TierEnvironment
from tests.support.threaded_job import Member, ThreadedJob


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


def test_hosts_start_a_server_each_and_reach_each_other_with_a_secret_of_their_own(tmp_path: Path) -> None:
    job = ThreadedJob(3)

    def meet(me: Member) -> TierHosts:
        directory = tmp_path / f"host-{me.process // 2}"
        directory.mkdir(exist_ok=True)
        return tier_hosts.meet(oc.memory(directory=directory), me, "0" * 16, 10.0)

    met = job.each(meet)
    try:
        assert [hosts.problem for hosts in met] == [""] * 3
        assert [bool(hosts.reach.server) for hosts in met] == [True, False, True]  # one a host
        assert len({hosts.reach.secret for hosts in met}) == 1 and met[0].reach.secret.hex() not in repr(met[0])
        assert [host.processes for host in met[0].hosts] == [(0, 1), (2,)]
        assert met[0].peer(0) is None and met[0].own_server is not None
        (peer,) = met[1].peers
        assert peer is met[1].peer(1) and peer.address.startswith("127.0.0.1:")
        peer.announce(1)
        assert peer.parts() == {}
        server = met[2].reach.server
        assert server is not None
        os.kill(server.pid, signal.SIGKILL)
        server.close()
        met[2].look_after_server()  # at the same address
        assert peer.parts() == {}
    finally:
        for hosts in met:
            hosts.close()


@pytest.mark.parametrize(
    ("secrets", "named"),
    [
        ((None, "ab" * 16), "process 1 (host-1) has one, process 0 has none"),
        (("ab" * 16, None), "process 1 (host-1) has none"),
        (("ab" * 16, "cd" * 16), "process 1 (host-1) has another one"),
    ],
)
def test_secrets_that_differ_are_named_and_nothing_is_started(
    secrets: tuple[str | None, ...], named: str, tmp_path: Path
) -> None:
    given = [TierEnvironment(bytes.fromhex(secret) if secret else None) for secret in secrets]
    places = tuple(
        tier_hosts.place(oc.memory(directory=tmp_path / f"host-{process}"), each) for process, each in enumerate(given)
    )
    hosts = TierHosts(oc.memory(), "0" * 16, 0, places, ("host-0", "host-1"))
    assert named in tier_hosts._problem(hosts) and "ORCHESTRATOR_TIER_SECRET" in tier_hosts._problem(hosts)
    assert not any(secret and secret in repr(places) for secret in secrets)


def test_a_directory_that_is_not_there_is_named_by_the_process_that_misses_it(tmp_path: Path) -> None:
    def meet(me: Member) -> TierHosts:
        directory = tmp_path / f"host-{me.process}"
        if me.process == 0:
            directory.mkdir()
        return tier_hosts.meet(oc.memory(directory=directory), me, "0" * 16, 10.0)

    met = ThreadedJob(2).each(meet)
    for hosts in met:
        hosts.close()
        assert (
            hosts.problem
            == f"process 1 (host-1): {tmp_path}/host-1: there is no such directory; it is to hold the tier"
        )


def test_what_is_no_domain_is_the_users_error_before_anybody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DOMAIN", "zone=a")
    with pytest.raises(UsageError, match="ORCHESTRATOR_DOMAIN='zone=a'"):
        oc.Agent(tmp_path / "run", tiers=[oc.memory(directory=tmp_path)])
