"""`oc.memory` and the `tiers` of an agent: what is taken, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import orchestrator as oc
from orchestrator.errors import UsageError
from orchestrator.rules.tiers import MemoryTier, memory_of


def test_a_memory_tier_says_what_it_was_given() -> None:
    assert oc.memory() == MemoryTier(every=20, directory=None, bytes_max=None, keep=2)
    assert oc.memory(5, directory=Path("/mnt/nvme"), bytes_max=1 << 30, keep=3).directory == "/mnt/nvme"
    assert repr(oc.memory(5, directory="/mnt", bytes_max=7)) == (
        "memory(every=5, copies=1, domain='node', keep=2, directory='/mnt', bytes_max=7)"
    )
    assert oc.memory(5, copies=0, domain="rack", copy_bytes_per_s=9) == MemoryTier(5, None, None, 2, 0, "rack", 9)
    assert oc.memory(5, directory="/a").common == oc.memory(5, directory="/b").common  # hosts may have other disks
    assert oc.memory(5, copy_bytes_per_s=1).common == oc.memory(5).common
    assert len({oc.memory(5).common, oc.memory(5, copies=2).common, oc.memory(5, domain="rack").common}) == 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "every=2.5"),
        ({"every": True}, "every=True"),
        ({"keep": 0}, "keep=0"),
        ({"bytes_max": 0}, "bytes_max=0"),
        ({"bytes_max": "1G"}, "bytes_max='1G'"),
        ({"directory": "tier"}, "directory='tier'"),
        ({"directory": "gs://bucket/tier"}, "directory='gs://bucket/tier'"),
        ({"directory": 7}, "directory=7"),
        ({"copies": -1}, "copies=-1"),
        ({"copies": True}, "copies=True"),
        ({"copies": 9}, "copies=9"),
        ({"domain": "zone"}, "domain='zone'"),
        ({"domain": None}, "domain=None"),
        ({"copy_bytes_per_s": 0}, "copy_bytes_per_s=0"),
        ({"copy_bytes_per_s": 1.5}, "copy_bytes_per_s=1.5"),
    ],
)
def test_what_is_no_memory_tier_is_a_usage_error_that_names_it(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match="expected") as raised:
        oc.memory(**given)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    "tiers", [oc.memory(), "memory", 7, [oc.every(20)], [oc.memory], [oc.memory(5), oc.memory(10)], {"memory": 5}]
)
def test_what_is_no_list_of_one_tier_is_a_usage_error(tiers: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiers="):
        oc.Agent(tmp_path / "run", tiers=tiers)
    assert not (tmp_path / "run").exists()


def test_an_agent_may_have_no_tier() -> None:
    assert memory_of(()) is None and memory_of([]) is None
    assert memory_of([oc.memory(5)]) == oc.memory(5)
