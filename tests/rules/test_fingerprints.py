"""Fingerprints of shards: replicas that agree or do not, and the sum that an array's is."""

from __future__ import annotations

from orchestrator.rules.fingerprints import NOTHING, as_text, disagreements, fingerprints
from orchestrator.rules.records import Receipt, ShardFingerprint
from tests.support.builders import box, intent, leaf, receipt

ONE, TWO = as_text([1, 2, 3, 0xFFFFFFFF]), as_text([1, 1, 1, 2])


def shards(process: int, *found: tuple[int, str]) -> Receipt:
    """Halves of `w`, by number, and their fingerprints, on a device of `process`."""
    told = tuple(ShardFingerprint(box((2 * half, 2 * half + 2)), print, (process,)) for half, print in found)
    return receipt(process, prints={"w": told})


def test_an_arrays_fingerprint_is_the_sum_of_its_shards_each_once() -> None:
    receipts = {0: shards(0, (0, ONE), (1, TWO)), 1: shards(1, (0, ONE))}
    assert disagreements(intent(leaf(), processes=2), receipts) == []
    assert fingerprints(intent(leaf(), processes=2), receipts) == {"w": as_text([2, 3, 4, 1])}


def test_an_array_of_which_a_shard_has_no_fingerprint_has_none() -> None:
    assert fingerprints(intent(leaf()), {0: shards(0, (0, ONE))}) == {}
    assert fingerprints(intent(leaf()), {0: receipt()}) == {}


def test_replicas_that_differ_are_named_with_their_hosts_and_devices() -> None:
    receipts = {0: shards(0, (0, ONE)), 1: shards(1, (0, NOTHING))}
    said = f"process 0 (host-0) device 0: {ONE} but process 1 (host-1) device 1: {NOTHING}"
    assert disagreements(intent(leaf(), processes=2), receipts) == [f"w[0:2]: replicas disagree: {said}"]
