"""Fingerprints as numbers: adding up those of shards, and what may be concluded from them. Pure.

A fingerprint is four 32-bit lanes, each a wrapping sum over an array's elements, written as 32 hex digits. How one
element counts is in `arrays.fingerprint`; here matters only that shards add up to their array, whatever the sharding.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping

from orchestrator.errors import Damaged
from orchestrator.rules.boxes import box_label, volume
from orchestrator.rules.records import Box, Intent, LeafSpec, Receipt, ShardFingerprint

_LANES = 4
_DIGITS = 8
_MASK = 0xFFFFFFFF
NOTHING = "0" * (_LANES * _DIGITS)


def as_text(lanes: Iterable[int]) -> str:
    """The 32 hex digits of four lanes."""
    return "".join(f"{int(lane) & _MASK:08x}" for lane in lanes)


def _lanes(digits: str) -> list[int]:
    if len(digits) != len(NOTHING):
        raise Damaged(f"fingerprint {digits!r}: expected {len(NOTHING)} hex digits")
    return [int(digits[at : at + _DIGITS], 16) for at in range(0, len(digits), _DIGITS)]


def total(prints: Iterable[str]) -> str:
    """The fingerprint of an array from those of its shards, each once."""
    sums = [0] * _LANES
    for digits in prints:
        sums = [(old + more) & _MASK for old, more in zip(sums, _lanes(digits), strict=True)]
    return as_text(sums)


def condensed(prints: Mapping[str, str]) -> str:
    """One number for the fingerprints of many leaves, linear in each: the processes' own add up to that of the whole
    state. A wrong fingerprint of one leaf always changes it, as each counts with an odd weight."""
    sums = [0] * _LANES
    for name, digits in prints.items():
        weight = zlib.crc32(name.encode()) | 1
        sums = [(old + weight * more) & _MASK for old, more in zip(sums, _lanes(digits), strict=True)]
    return as_text(sums)


def _attested(intent: Intent, receipts: Mapping[int, Receipt]) -> Iterable[LeafSpec]:
    names: set[str] = set().union(*(receipt.prints for receipt in receipts.values()))
    return (leaf for leaf in intent.tree.leaves if leaf.name in names) if names else ()


def disagreements(intent: Intent, receipts: Mapping[int, Receipt]) -> list[str]:
    """Replicas of one shard whose bits differ, one line each naming array, shard, hosts and devices; [] if none do."""
    problems: list[str] = []
    for leaf in _attested(intent, receipts):
        seen: dict[Box, dict[str, list[str]]] = {}
        for process, receipt in sorted(receipts.items()):
            for shard in receipt.prints.get(leaf.name, ()):
                devices = ", ".join(map(str, shard.devices))
                holder = f"process {process} ({receipt.host}) device{'s'[: len(shard.devices) > 1]} {devices}"
                seen.setdefault(shard.box, {}).setdefault(shard.print, []).append(holder)
        for box, by_print in seen.items():
            if len(by_print) > 1:
                sides = " but ".join(f"{', '.join(who)}: {digits}" for digits, who in by_print.items())
                problems.append(f"{leaf.label}{box_label(box)}: replicas disagree: {sides}")
    return problems


def fingerprints(intent: Intent, receipts: Mapping[int, Receipt]) -> dict[str, str]:
    """Leaf name -> fingerprint, of the leaves of which every shard has one. Replicas must have been found to agree."""
    found = {}
    for leaf in _attested(intent, receipts):
        once: dict[Box, ShardFingerprint] = {
            shard.box: shard for receipt in receipts.values() for shard in receipt.prints.get(leaf.name, ())
        }
        covered = sum(volume(box) for box in once)
        if once and covered == math.prod(leaf.file_shape):
            found[leaf.name] = total(shard.print for shard in once.values())
    return found
