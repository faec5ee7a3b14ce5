"""Each file of a step is fetched by one host, whichever of them asks."""

from __future__ import annotations

import random

import pytest

from orchestrator.rules import prefetch
from orchestrator.rules.records import FileEntry


def files(sizes: dict[str, int]) -> list[FileEntry]:
    return [FileEntry(path=name, bytes=size, crc32c="00000000") for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("name", "process"),
    [
        ("state/ocdbt.process_3/d/abc", 3),
        ("state/params/ocdbt.process_12/d/abc", 12),
        ("receipts/00004.json", 4),
        ("process/00002.bin", 2),
        ("receipts/group-00000-01.json", -1),
        ("state/d/abc", -1),
        ("state/array_metadatas/process_0", -1),
        ("manifest.json", -1),
    ],
)
def test_names_tell_who_wrote_a_file(name: str, process: int) -> None:
    assert prefetch.writer(name) == process


def test_each_host_fetches_what_it_wrote_where_all_wrote_alike() -> None:
    found = files({f"state/ocdbt.process_{host}/d/{part}": 1000 + part for host in range(4) for part in range(3)})
    owners = prefetch.shares(found, 4)
    assert owners == [prefetch.writer(entry.path) for entry in found]


@pytest.mark.parametrize(
    ("sizes", "hosts", "most"),
    [
        pytest.param({f"state/ocdbt.process_0/d/{n}": 100 for n in range(8)}, 4, 200, id="one has written all"),
        pytest.param({f"state/ocdbt.process_{n}/d/x": 100 for n in range(4)}, 2, 200, id="fewer hosts than wrote"),
        pytest.param({f"state/ocdbt.process_{n}/d/x": 100 for n in range(2)}, 8, 100, id="more hosts than files"),
        pytest.param({"state/d/one": 10_000, "state/d/two": 1}, 3, 10_000, id="one large file"),
        pytest.param({"state/d/empty": 0}, 3, 0, id="nothing in it"),
        pytest.param({}, 3, 0, id="no files"),
    ],
)
def test_no_host_has_far_more_than_the_others(sizes: dict[str, int], hosts: int, most: int) -> None:
    found = files(sizes)
    owners = prefetch.shares(found, hosts)
    load = [
        sum(entry.bytes for entry, owner in zip(found, owners, strict=True) if owner == host) for host in range(hosts)
    ]
    assert max(load) == most


def test_all_hosts_come_to_the_same_answer_and_it_is_even() -> None:
    random.seed(7)
    for hosts in (1, 3, 64, 500):
        names = [f"state/ocdbt.process_{random.randrange(hosts * 2)}/d/{number}" for number in range(hosts * 7)]
        found = files({name: random.randrange(1, 1 << 20) for name in names})
        owners = prefetch.shares(found, hosts)
        assert owners == prefetch.shares(list(found), hosts) and set(owners) <= set(range(hosts))
        load = [0] * hosts
        for entry, owner in zip(found, owners, strict=True):
            load[owner] += entry.bytes
        assert max(load) <= 1.25 * sum(load) / hosts + max(entry.bytes for entry in found)
