"""Commits of jobs with thousands of hosts, simulated: the real protocol code on a virtual clock.

    python -m benchmarks.simulate                    # 100 to 50,000 hosts
    python -m benchmarks.simulate --hosts 1000 --read_ms 20
    python -m benchmarks.simulate --hosts 10000 50000 --rounds=7 --json    # for the table of goals

Real: receipts, alone or in groups, their bytes and their decoding, `attempt.advance` with its coverage check, the tree
of chunks, the manifest, the journal's rules and their entry; what they take on this machine's CPU passes on the virtual
clock. Modelled: a store that takes --read_ms and --write_ms for a request, and serves --reads_per_s and --writes_per_s
of them (defaults: what Cloud Storage says a bucket serves before it scales itself up,
https://cloud.google.com/storage/docs/request-rate; the latencies are assumptions), and messages that take --signal_ms.
Not modelled: the arrays' own bytes, how many messages the coordination service serves.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import figures
from orchestrator.arrays.writing import merged_tree
from orchestrator.arrays.writing.write_plan import KeyOrder
from orchestrator.job.receipts import RECEIPT_BATCH, RECEIPT_READS
from orchestrator.rules import attempt, chunk_index, journal, receipt_groups
from orchestrator.rules.codec import decode, encode
from orchestrator.rules.records import (
    FORMAT,
    Box,
    FileEntry,
    GroupReceipt,
    Intent,
    LeafSpec,
    LiveStep,
    Manifest,
    Place,
    Receipt,
    TreeSpec,
    crc32c,
)

_EARLY_HEAD_S = 5.0
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


def simulate(
    hosts: int, leaves: int, store: Store, spread_s: float, seed: int, signal_s: float = 0.1, group: int | None = None
) -> dict[str, float]:
    """Seconds after the last host's data is durable, by what they went to. group: the size of groups, 0 for none, None
    for the rule's."""
    rng = random.Random(seed)
    spec = _spec(hosts, leaves)
    sealed = [rng.uniform(0, spread_s) for _ in range(hosts)]
    keys = [f"{leaf.name}/c/{process}/0" for leaf in spec.leaves for process in range(hosts)]
    order = KeyOrder.of(keys)  # planned once for each form of state
    objects, leader_s = _stored(sealed, spec, store, signal_s, group)
    state, clock, cpu, receipts = _collected(objects, _intent(hosts, spec), store)
    collected = clock
    tree_bytes, spent = timed(lambda: _tree_bytes(receipts, order))
    head_read = store.request("read", clock)  # beside what comes next; good for 5 s
    clock = store.many("write", clock + spent, 2, 2)
    manifest_bytes, more = timed(lambda: len(encode(_manifest(receipts))))
    cpu += spent + more
    clock = max(store.request("write", clock + more), head_read)
    clock = clock if clock - collected <= _EARLY_HEAD_S else store.request("read", clock)
    clock = store.request("write", clock + timed(lambda: _entry(1))[1])
    assert state.phase is attempt.Phase.FINALIZING
    return {
        figures.HOSTS: hosts,
        "objects": len(objects),
        figures.COMMIT: clock - max(sealed),
        "receipts_s": collected - max(sealed),
        "tree_s": spent,
        "cpu_s": cpu,
        "leader_ms": leader_s * 1000,
        "requests": store.requests,
        "receipts_MB": sum(len(body) for _, body, _ in objects) / 1e6,
        "tree_MB": tree_bytes / 1e6,
        "manifest_MB": manifest_bytes / 1e6,
    }


Object = tuple[float, bytes, bool]  # when process 0 hears that it is stored, itself, and whether it is a group's


def _stored(
    sealed: list[float], spec: TreeSpec, store: Store, signal_s: float, size: int | None
) -> tuple[list[Object], float]:
    """The receipts as they are stored, in the order in which process 0 hears of them, and what a leader's own work for
    its group takes. A member's receipt reaches its leader, and a vote process 0, after signal_s."""
    hosts = len(sealed)
    parts: list[tuple[float, Receipt | GroupReceipt]] = []
    ready: dict[receipt_groups.Group, list[int]] = {}
    groups = [receipt_groups.group_of(process, hosts, (), size) for process in range(min(hosts, 2))]
    for process in range(hosts):
        if groups[-1] is None or process == 0:
            parts.append((sealed[process], _receipt(process, spec)))
        else:
            first = (process - 1) // len(groups[-1].members) * len(groups[-1].members) + 1
            members = tuple(range(first, min(first + len(groups[-1].members), hosts)))
            ready.setdefault(receipt_groups.Group(members), []).append(process)
    for group in ready:
        members_in = max(sealed[member] + (signal_s if member != group.leader else 0) for member in group.members)
        parts.append((members_in, _group_receipt(group, spec)))
    objects, leader_s = [], 0.0
    for at, record in sorted(parts, key=lambda part: part[0]):
        body, spent = timed(partial(encode, record))  # on its own host, beside all others
        leader_s = max(leader_s, spent if isinstance(record, GroupReceipt) else 0.0)
        heard = store.request("write", at + spent) + signal_s
        objects.append((heard, body, isinstance(record, GroupReceipt)))
    return sorted(objects, key=lambda one: one[0]), leader_s


def _collected(
    objects: list[Object], intent: Intent, store: Store
) -> tuple[attempt.Attempt, float, float, list[Receipt]]:
    """As `ReceiptReader`: whatever has been heard of is read, many at once, and decoded as it arrives, one after the
    other. The state, the time, what of it was processor time, and the receipts."""
    state, clock, cpu, receipts = attempt.Attempt(intent), 0.0, 0.0, list[Receipt]()
    done = 0
    while done < len(objects):
        clock = max(clock, objects[done][0])
        batch = [one for one in objects[done : done + RECEIPT_BATCH] if one[0] <= clock]
        done += len(batch)
        under_way: list[float] = []
        read: list[Receipt] = []
        asked = busy = clock
        for _, body, grouped in batch:
            if len(under_way) >= RECEIPT_READS:
                asked = max(asked, heapq.heappop(under_way))
            arrived = store.request("read", asked)
            heapq.heappush(under_way, arrived)
            found, spent = timed(partial(_decoded, body, grouped))
            busy, cpu = max(busy, arrived) + spent, cpu + spent
            read += found
        (state, effect), spent = timed(partial(attempt.advance, state, attempt.ReceiptsRead(tuple(read))))
        receipts += read
        clock, cpu = busy + spent, cpu + spent
    assert effect == attempt.Finalize(), state.failures or state.reason
    return state, clock, cpu, sorted(receipts, key=lambda receipt: receipt.process)


def _decoded(body: bytes, grouped: bool) -> tuple[Receipt, ...]:
    return decode(body, GroupReceipt, "simulated").receipts if grouped else (decode(body, Receipt, "simulated"),)


def _spec(hosts: int, leaves: int) -> TreeSpec:
    return TreeSpec(
        leaves=tuple(
            LeafSpec(
                path=("layers", f"w{number}"), kind="array", shape=(hosts * 8, 128), dtype="float32", chunk=(8, 128)
            )
            for number in range(leaves)
        )
    )


def _intent(hosts: int, spec: TreeSpec) -> Intent:
    return Intent(
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


def _group_receipt(group: receipt_groups.Group, spec: TreeSpec) -> GroupReceipt:
    return GroupReceipt(
        format=FORMAT,
        write_id=f"{group.leader:032x}",
        step=1,
        attempt="e0001-a01",
        process=group.leader,
        number=1,
        receipts=tuple(_receipt(member, spec) for member in group.members),
    )


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


def _tree_bytes(receipts: list[Receipt], order: KeyOrder) -> int:
    tree = merged_tree.encoded(order, {}, chunk_index.entries(receipts), "d/0")
    assert tree is not None
    return sum(map(len, tree))


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
    parser.add_argument("--signal_ms", type=float, default=100, help="until a message is noticed by who waits for it")
    parser.add_argument("--group", type=int, help="hosts that sign together; 0: none (default: the rule)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="each job so often: processor time varies")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print("| hosts | objects | commit s | receipts s | tree s | CPU s | a leader's ms | requests | receipts MB |")
        print("|---|---|---|---|---|---|---|---|---|")
    for hosts in args.hosts * args.rounds:
        store = Store(args.read_ms / 1000, args.write_ms / 1000, args.reads_per_s, args.writes_per_s)
        found = simulate(hosts, args.leaves, store, args.spread_s, args.seed, args.signal_ms / 1000, args.group)
        if args.json:
            print(json.dumps(found), flush=True)
        else:
            shown = [
                f"{value:.0f}" if name in ("hosts", "objects", "requests") else f"{value:.1f}"
                for name, value in found.items()
                if name not in ("tree_MB", "manifest_MB")
            ]
            print("| " + " | ".join(shown) + " |", flush=True)


if __name__ == "__main__":
    main()
