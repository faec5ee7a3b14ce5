"""Where the bytes of a restore will come from, before it begins: own host's memory, peers', or the store. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from orchestrator.rules import zarr_chunks
from orchestrator.rules.placement import Placement
from orchestrator.rules.records import TreeSpec
from orchestrator.rules.restore_cost import Target, boxes_by_process, item_bytes, leaf_bytes, partition

MEMORY, PEERS, STORE = "memory", "peers", "store"  # in the order in which they are asked


def holders(placed: Placement | None, writers: int) -> list[frozenset[int]]:
    """By process that wrote: the hosts that have its part or a copy of it. All on one host, where nobody says."""
    found = [frozenset({0})] * writers
    for number, host in enumerate(placed.hosts if placed else ()):
        for process in host.processes:
            if process < writers:
                found[process] = frozenset({number, *host.targets})
    return found


def hosts_of(placed: Placement | None, processes: int) -> list[int]:
    """By process of the new job: its host, if the hosts stay; of another number of processes as many on each."""
    hosts = placed.hosts if placed else ()
    if sum(len(host.processes) for host in hosts) == processes:
        by_process = {process: number for number, host in enumerate(hosts) for process in host.processes}
        return [by_process.get(process, 0) for process in range(processes)]
    return [process * max(1, len(hosts)) // processes for process in range(processes)]


def forecast_sources(
    tree: TreeSpec,
    target: Target,
    writers: Mapping[str, int],
    held_by: Sequence[Collection[int]],
    on: Sequence[int],
) -> list[Counter[str]]:
    """By process: how many bytes it will read from where. writers: by chunk. held_by: by writer, as `holders`; of a
    chunk that none has written, process 0's. on: as `hosts_of`. Of compressed arrays a whole array's share is meant."""
    found = [Counter[str]() for _ in range(target.processes)]
    for leaf in tree.leaves:
        if not leaf.in_store:
            continue
        for process, boxes in enumerate(boxes_by_process(leaf, partition(leaf), target)):
            if leaf.chunk is None:
                found[process][_source(on[process], held_by[0] if held_by else ())] += leaf_bytes(leaf)
                continue
            size = math.prod(leaf.chunk) * item_bytes(leaf)
            for chunk in {chunk for box in boxes for chunk in zarr_chunks.touching(box, leaf.chunk)}:
                writer = writers.get(zarr_chunks.key(leaf.name, chunk, leaf.chunk), 0)
                found[process][_source(on[process], held_by[writer] if writer < len(held_by) else ())] += size
    return found


def _source(host: int, holders: Collection[int]) -> str:
    return MEMORY if host in holders else PEERS if holders else STORE
