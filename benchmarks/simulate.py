"""Commits of jobs with thousands of hosts, simulated: the real protocol code on a virtual clock.

    python -m benchmarks.simulate                    # 100 to 50,000 hosts
    python -m benchmarks.simulate --hosts 1000 --read_ms 20

Real: receipts, their bytes and their decoding, `attempt.advance` with its coverage check, the manifest, the journal's
rules and their entry; what they take on this machine's CPU passes on the virtual clock. Modelled: a store that takes
--read_ms and --write_ms for a request, and serves --reads_per_s and --writes_per_s of them (defaults: what Cloud
Storage says a bucket serves before it scales itself up, https://cloud.google.com/storage/docs/request-rate; the
latencies are assumptions). The tree of chunks is made and encoded by the real code, too. Not modelled: the arrays' own
bytes, the coordination service.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orchestrator.arrays.format import ocdbt
from orchestrator.job.receipts import RECEIPT_BATCH, RECEIPT_READS
from orchestrator.rules import attempt, chunk_index, journal
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import (
    FORMAT,
    Box,
    FileEntry,
    Intent,
    LeafSpec,
    LiveStep,
    Manifest,
    Place,
    Receipt,
    TreeSpec,
    crc32c,
)

HOSTS = (100, 1000, 5000, 10_000, 20_000, 50_000)


@dataclass
class Store:
    """Requests on a virtual clock: each takes its latency, and begins when the bucket has a slot for it."""

    read_s: float
    write_s: float
    reads_per_s: float
    writes_per_s: float
    free: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "write": 0.0})
    requests: int = 0

    def request(self, kind: str, at: float) -> float:
        """When a request made at `at` is answered."""
        rate, latency = (self.reads_per_s, self.read_s) if kind == "read" else (self.writes_per_s, self.write_s)
        begins = max(at, self.free[kind])
        self.free[kind] = begins + 1 / rate
        self.requests += 1
        return begins + latency

    def many(self, kind: str, at: float, count: int, at_once: int) -> float:
        """When `count` requests, at most `at_once` under way, are answered."""
        under_way: list[float] = []
        now = at
        for _ in range(count):
            if len(under_way) >= at_once:
                now = max(now, heapq.heappop(under_way))
            heapq.heappush(under_way, self.request(kind, now))
        return max(under_way, default=at)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = call()
    return result, time.process_time() - started


def simulate(hosts: int, leaves: int, store: Store, spread_s: float, seed: int) -> dict[str, float]:
    """Seconds after the last host's data is durable, by what they went to."""
    rng = random.Random(seed)
    shape = (hosts * 8, 128)
    spec = TreeSpec(
        leaves=tuple(
            LeafSpec(path=("layers", f"w{number}"), kind="array", shape=shape, dtype="float32", chunk=(8, 128))
            for number in range(leaves)
        )
    )
    intent = Intent(
        format=FORMAT,
        write_id="0" * 32,
        step=1,
        attempt="e0001-a01",
        epoch=1,
        opened_by="simulated",
        time=0.0,
        process_count=hosts,
        device_count=hosts,
        mesh={"data": hosts},
        tree=spec,
    )
    sealed = sorted(rng.uniform(0, spread_s) for _ in range(hosts))
    written = [store.request("write", at) for at in sealed]
    state, clock, cpu, receipt_bytes, receipts = attempt.Attempt(intent), 0.0, 0.0, 0, []
    under_way: list[float] = []
    effect: attempt.Effect | None = None
    for first in range(0, hosts, RECEIPT_BATCH):
        batch = range(first, min(first + RECEIPT_BATCH, hosts))
        bodies = []
        for index in batch:
            at = max(written[index], clock)
            if len(under_way) >= RECEIPT_READS:
                at = max(at, heapq.heappop(under_way))
            heapq.heappush(under_way, store.request("read", at))
            bodies.append(encode(_receipt(index, spec)))
        receipt_bytes += sum(map(len, bodies))

        def take(bodies: list[bytes] = bodies, state: attempt.Attempt = state) -> Any:
            read = tuple(decode(body, Receipt, "simulated") for body in bodies)
            return read, attempt.advance(state, attempt.ReceiptsRead(read))

        (read, (state, effect)), spent = timed(take)
        receipts += read
        clock, cpu = max(clock, *under_way) + spent, cpu + spent
    assert effect == attempt.Finalize(), state.failures or state.reason
    collected = clock
    tree_bytes, spent = timed(lambda: _tree_bytes(receipts))
    clock = store.many("write", clock + spent, 2, 2)
    manifest_bytes, more = timed(lambda: len(encode(_manifest(receipts))))
    clock, cpu = store.request("write", clock + more), cpu + spent + more
    clock = store.request("read", clock)
    clock = store.request("write", clock + timed(lambda: _entry(1))[1])
    return {
        "hosts": hosts,
        "commit_s": clock - max(sealed),
        "receipts_s": collected - max(sealed),
        "tree_s": spent,
        "cpu_s": cpu,
        "requests": store.requests,
        "receipts_MB": receipt_bytes / 1e6,
        "tree_MB": tree_bytes / 1e6,
        "manifest_MB": manifest_bytes / 1e6,
    }


def _receipt(process: int, spec: TreeSpec) -> Receipt:
    box = Box(start=(process * 8, 0), stop=(process * 8 + 8, 128))
    prefix = f"state/ocdbt.process_{process}"
    return Receipt(
        format=FORMAT,
        write_id=f"{process:032x}",
        step=1,
        attempt="e0001-a01",
        process=process,
        host=f"host-{process}",
        files=tuple(FileEntry(path=f"{prefix}/d/{n:032x}", bytes=1 << 26, crc32c="01234567") for n in range(3)),
        boxes={leaf.name: (box,) for leaf in spec.leaves},
        places={
            f"{leaf.name}/c/{process}/0": Place(file=number % 3, offset=number << 20, bytes=1 << 20, crc32c="89abcdef")
            for number, leaf in enumerate(spec.leaves)
        },
    )


def _manifest(receipts: list[Receipt]) -> Manifest:
    return Manifest(
        format=FORMAT,
        write_id="0" * 32,
        step=1,
        attempt="e0001-a01",
        process_count=len(receipts),
        files=tuple(entry for receipt in receipts for entry in receipt.files),
        hosts=tuple(receipt.host for receipt in receipts),
        seconds=tuple(receipt.seconds for receipt in receipts),
        chunks=chunk_index.checksums(receipts),
    )


def _tree_bytes(receipts: list[Receipt]) -> int:
    entries = chunk_index.entries(receipts)
    ordered = sorted((key.encode(), value) for key, value in entries.items())
    return sum(map(len, ocdbt.encode(ordered, "d/0", 0, bytes(16), 0)))


def _entry(step: int) -> int:
    """Bytes of the journal entry that commits a step."""
    stamp = journal.Stamp("simulated", 0.0, "0" * 32)
    head: Any = journal.open_epoch(None, stamp)
    live = LiveStep(
        step=step,
        attempt="e0001-a01",
        manifest_crc32c=crc32c(b""),
        tree="0" * 8,
        bytes=1,
        stored_metrics={},
        time=0.0,
    )
    return len(encode(journal.commit(head, stamp, epoch=head.epoch, entry=live, keep=None)))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="*", default=list(HOSTS))
    parser.add_argument("--leaves", type=int, default=20, help="arrays of the state, each split over all hosts")
    parser.add_argument("--read_ms", type=float, default=50)
    parser.add_argument("--write_ms", type=float, default=100)
    parser.add_argument("--reads_per_s", type=float, default=5000)
    parser.add_argument("--writes_per_s", type=float, default=1000)
    parser.add_argument("--spread_s", type=float, default=2, help="the hosts' data becomes durable within so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("| hosts | commit s | receipts s | tree s | CPU s | requests | receipts MB | tree MB | manifest MB |")
        print("|---|---|---|---|---|---|---|---|---|")
    for hosts in args.hosts:
        store = Store(args.read_ms / 1000, args.write_ms / 1000, args.reads_per_s, args.writes_per_s)
        found = simulate(hosts, args.leaves, store, args.spread_s, args.seed)
        if args.json:
            print(json.dumps(found), flush=True)
        else:
            shown = [
                f"{value:.0f}" if name in ("hosts", "requests") else f"{value:.1f}" for name, value in found.items()
            ]
            print("| " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
