"""From a snapshot on the devices to the threads that write it: to page-locked host memory, a group at a time, each
deleted on its device as soon as it is there. Runs beside training, on one of the threads of a write."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.writing.part_queue import PartQueue
from orchestrator.arrays.writing.snapshot import Snapshot
from orchestrator.arrays.writing.staging import StagedPart, to_host
from orchestrator.arrays.writing.write_plan import Pieces, Plan
from orchestrator.errors import StorageError

# On their way to the host at once; two groups overlap. JAX begins copies where a step of training ends, and what that
# fetches waits for those ahead of it: in all as long with smaller groups, a little in more steps (docs/benchmarks.md).
GROUP_BYTES = 256 << 20


class SnapshotFeed:
    """pieces: by number of the shard, the chunks to write of it, whose keys go before the elements. direct: copies on
    the host, or on their way there, of shards that are not in the snapshot."""

    def __init__(self, snapshot: Snapshot, pieces: Sequence[Pieces], direct: Mapping[int, Any]) -> None:
        self._snapshot, self._pieces = snapshot, pieces
        self._shards = snapshot.layout.shards
        # Each is used by a thread of its own.
        self._small = {number: copy for number, copy in direct.items() if self._shards[number].small}
        self._direct = {number: copy for number, copy in direct.items() if not self._shards[number].small}

    @property
    def large_bytes(self) -> int:
        """Bytes of what `run` adds."""
        return sum(shard.nbytes for shard in self._shards if not shard.small)

    def whole(self, plan: Plan) -> dict[str, list[Any]]:
        """Leaf name -> all of this process's shards of it, of leaves that are in the snapshot as they are."""
        at = {group[0]: number for number, group in self._snapshot.groups.items() if len(group) == 1}
        found: dict[str, list[Any]] = {}
        first = 0
        for _, leaf in plan.off_host:
            numbers, first = range(first, first + len(leaf.shards)), first + len(leaf.shards)
            assert leaf.sharding is not None
            every = len(leaf.shards) == len(leaf.sharding.addressable_devices)
            if every and all(self._is_copied(number, at) for number in numbers):
                found[leaf.leaf.name] = [self._snapshot.arrays[at[number]] for number in numbers]
        return found

    def _is_copied(self, number: int, at: Mapping[int, int]) -> bool:
        """Whether a shard is an array of its own, not one that was packed alone."""
        copy, shard = self._snapshot.arrays[at[number]] if number in at else None, self._shards[number]
        return copy is not None and (copy.shape, copy.dtype) == (shard.shape, shard.dtype)

    @in_own_context
    def small(self) -> bytes:
        """The elements of all shards whose chunks go with the receipt, in order. Any thread, once."""
        found = {number: np.asarray(copy).tobytes() for number, copy in self._small.items()}
        self._small.clear()
        arrays = self._numbers(small=True)
        for number, host in zip(arrays, to_host(self._taken(arrays)), strict=True):
            found |= {shard: part.tobytes() for shard, part in self._parts(number, host)}
        return b"".join(found[number] for number in sorted(found))

    @in_own_context
    def run(self, queue: PartQueue, stop: threading.Event, deadline: float) -> None:
        """Add all other shards to `queue`, and end it. deadline (monotonic): to wait for room in it until then."""
        error: BaseException | None = None
        try:
            for number in list(self._direct):
                queue.wait_for_room(self._shards[number].nbytes, deadline)
                queue.add([(self._direct.pop(number), self._pieces[number])])
            coming: list[tuple[int, Any]] = []
            limit = queue.limit_bytes
            for group in self._groups(GROUP_BYTES if limit is None else min(GROUP_BYTES, limit // 2)):
                if stop.is_set():
                    break
                if limit is not None:  # what is on its way counts once it is there
                    self._deliver(coming, queue)
                    coming = []
                arrays = [self._snapshot.arrays[number] for number in group]
                queue.wait_for_room(sum(array.nbytes for array in arrays), deadline)
                following = list(zip(group, to_host(arrays), strict=True))
                del arrays
                self._deliver(coming, queue)
                coming = following
            self._deliver(coming, queue)
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._taken([number for number in self._numbers(small=False) if number in self._snapshot.arrays])
            queue.end(error)

    def _deliver(self, coming: list[tuple[int, Any]], queue: PartQueue) -> None:
        """Wait for copies, and give the memory of the devices back."""
        for number, host in coming:
            try:
                jax.block_until_ready(host)
            except RuntimeError as error:
                key = self._pieces[self._snapshot.groups[number][0]][0][0]
                raise StorageError(f"{key}: cannot be copied from its device: {error}") from error
            self._snapshot.arrays.pop(number).delete()
            parts: list[StagedPart] = [(part, self._pieces[shard]) for shard, part in self._parts(number, host)]
            queue.add(parts)

    def _parts(self, number: int, host: Any) -> Iterator[tuple[int, Any]]:
        """The shards that are in one array, each with its number."""
        group, first = self._snapshot.groups[number], 0
        if len(group) == 1:
            yield group[0], np.asarray(host).reshape(self._shards[group[0]].shape)
            return
        elements = np.asarray(host)
        for shard in group:
            shape = self._shards[shard].shape
            count = math.prod(shape)
            yield shard, elements[first : first + count].reshape(shape)
            first += count

    def _numbers(self, *, small: bool) -> list[int]:
        """The arrays of shards that go with the receipt; or the others."""
        groups = self._snapshot.groups
        return [number for number in groups if self._shards[groups[number][0]].small == small]

    def _taken(self, numbers: list[int]) -> list[Any]:
        return [self._snapshot.arrays.pop(number) for number in numbers]

    def _groups(self, most: int) -> Iterator[list[int]]:
        group: list[int] = []
        size = 0
        for number in self._numbers(small=False):
            group.append(number)
            size += self._snapshot.arrays[number].nbytes
            if size >= most:
                yield group
                group, size = [], 0
        if group:
            yield group
