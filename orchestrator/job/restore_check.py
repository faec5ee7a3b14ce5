"""Proving that what was restored is what was saved: fingerprints of restored arrays against those of the save.

Arrays that one process holds whole, whichever it is, are judged by it alone. Of those spread over processes each sends
one number, and only if the numbers do not add up, all send the details (`restore_rounds.wrong_leaves`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from orchestrator.arrays import fingerprint
from orchestrator.rules import fingerprints
from orchestrator.rules.records import LeafSpec

_WHY = "every checksum was right, so it was put in the wrong place, or changed on its way to the devices"


@dataclass(frozen=True)
class Proof:
    """This process's share. By replica: leaf -> sum over its own shards; and the saved ones that all shares must add up
    to (the same on all processes). `wrong_here`: of the arrays that it holds whole, (leaf, line) of those that are not
    what was saved."""

    shares: Mapping[int, Mapping[str, str]]
    expected: Mapping[int, Mapping[str, str]]
    wrong_here: Sequence[tuple[str, str]] = ()

    def sums(self) -> dict[int, str]:
        """One number for each replica: what the processes exchange."""
        return {replica: fingerprints.condensed(share) for replica, share in self.shares.items()}

    def details(self) -> dict[int, dict[str, str]]:
        """Each leaf's, for each replica: only where the sums do not add up."""
        return {replica: dict(share) for replica, share in self.shares.items()}

    def holds(self, sums: Sequence[Mapping[int, str]]) -> bool:
        """Whether the `sums` of all processes add up to what was saved."""
        return all(
            fingerprints.total(one[replica] for one in sums if replica in one) == fingerprints.condensed(saved)
            for replica, saved in self.expected.items()
        )

    def wrong(self, details: Sequence[Mapping[int, Mapping[str, str]]]) -> list[tuple[str, str]]:
        """The leaves that are not as they were saved, each with a line about it, of all processes' `details`."""
        wrong = []
        for replica, saved in self.expected.items():
            shares = [one.get(replica, {}) for one in details]
            for name, expected in saved.items():
                total = fingerprints.total(share.get(name, fingerprints.NOTHING) for share in shares)
                if total != expected:
                    wrong.append((name, _line(name, total, expected, f"replica {replica} over all processes")))
        return wrong


def prove(restored: Iterable[tuple[LeafSpec, Any]], saved: Mapping[str, str]) -> Proof:
    """Compute fingerprints of restored arrays, on their devices. `saved`: the manifest's; leaves without one, and cast
    ones, must not be among `restored`. Main thread."""
    pairs = list(restored)
    found = fingerprint.start(pairs).result()
    shares: dict[int, dict[str, str]] = {}
    expected: dict[int, dict[str, str]] = {}
    wrong: list[tuple[str, str]] = []
    for leaf, value in pairs:
        by_replica: dict[int, list[str]] = {}
        for part, fingerprint_of_part in found.get(leaf.name, ()):
            by_replica.setdefault(part.replica, []).append(fingerprint_of_part)
        sums = {replica: fingerprints.total(parts) for replica, parts in by_replica.items()}
        if not isinstance(value, jax.Array) or _is_of_one_process(value):
            for replica, total in sums.items():
                if total != saved[leaf.name]:
                    wrong.append((leaf.name, _line(leaf.label, total, saved[leaf.name], f"replica {replica}")))
            continue
        for replica, total in sums.items():
            shares.setdefault(replica, {})[leaf.name] = total
        for replica in range(_replicas(value)):
            expected.setdefault(replica, {})[leaf.name] = saved[leaf.name]
    return Proof(shares, expected, wrong)


def _is_of_one_process(value: jax.Array) -> bool:
    """Whether one process, this or another, has all of it: then that one judges it. The same everywhere, unlike
    `is_fully_addressable`."""
    devices: Any = value.sharding.device_set
    return len({device.process_index for device in devices}) == 1


def _replicas(value: jax.Array) -> int:
    shards = math.prod(value.shape) // math.prod(value.sharding.shard_shape(value.shape))
    return max(1, len(value.sharding.device_set) // max(1, shards))


def _line(name: str, got: str, expected: str, where: str) -> str:
    return f"{name}: its fingerprint after restoring ({where}) is {got}, at the save it was {expected}; {_WHY}"
