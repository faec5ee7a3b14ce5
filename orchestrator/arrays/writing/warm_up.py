"""What the first save from accelerators would wait for, done before it: compile the programs of its snapshot, and
page-lock the host memory that the state goes to (half a second per gigabyte), which JAX keeps for later saves.

XLA takes page-locked memory in regions that are powers of two, each twice as large as the one before: for 3 GiB, in
pieces, it would take 4. Asked for a few regions of growing size it takes just those. While the memory is being locked
nothing can be launched on an NVIDIA GPU, by any thread (an H100: 2 s for 4 GiB): all the better if the training step is
still being compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import SingleDeviceSharding

from orchestrator.arrays import page_locked
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.memory_kinds import PINNED_HOST, on_host
from orchestrator.arrays.writing.copy_programs import PROGRAMS, Call, Layout, layout_of
from orchestrator.arrays.writing.write_plan import shards_expected
from orchestrator.storage import overlap
from orchestrator.storage.overlap import Begun

_REGION_BYTES = 2 << 20  # the smallest that XLA takes
_BITS = 6  # regions at most: what is taken is at most 1/32 more than what is needed
_TRIED_BYTES = 256 << 20  # of a device's memory, twice, for a moment
_SLACK_SHARE = 1 / 50  # of the state, at most, for what is left of each region

_locking = threading.Lock()
_locked_bytes = 0  # of this process, as JAX's memory is; guarded by `_locking`


class WarmUp:
    """One at a time. Main thread, but for what it begins. most_bytes: how much of the host is page-locked at most.
    tiled: how arrays are cut."""

    def __init__(self, most_bytes: int | None, *, tiled: bool = False) -> None:
        self.programs = PROGRAMS
        self._most_bytes, self._tiled = most_bytes, tiled
        self._under_way: Begun[None] | None = None

    def expect(self, like: Any) -> None:
        """`begin` for states like this one: arrays, or jax.ShapeDtypeStruct with shardings. A target that cannot be
        restored, or that only the mesh that is set completes, is left to whoever restores it."""
        try:
            leaves = jax.tree_util.tree_leaves(like)
            shardings = {id(sharding): sharding for leaf in leaves if (sharding := getattr(leaf, "sharding", None))}
            if not any(map(_off_host, shardings.values())):  # at once, of thousands of leaves with few shardings
                return
            layout = layout_of(shards_expected(like, tiled=self._tiled))
        except Exception as error:  # an abstract mesh, a sharding that does not divide the shape, an odd dtype
            logging.debug("nothing is made ready for saves: %s", error)
            return
        if layout.shards:
            self.begin(layout)

    def begin(self, layout: Layout) -> None:
        """Begin to get ready for such snapshots, unless something is under way."""
        if self._under_way is None or self._under_way.ended:
            self._under_way = overlap.begin(lambda: self._try_to_run(layout))

    def wait(self, timeout_s: float) -> None:
        """Until nothing is under way, or for `timeout_s`."""
        if self._under_way:
            self._under_way.wait(timeout_s)

    def _try_to_run(self, layout: Layout) -> None:
        try:
            self._run(layout)
        except Exception as error:  # no memory on the device, for one: nobody else would ever hear of it
            logging.warning("not all is ready for the next save beforehand, which takes longer: %s", error)

    @in_own_context
    def _run(self, layout: Layout) -> None:
        for call in layout.calls:
            program = self.programs.compiled(call)
            if call.packs and program is not None and sum(layout.sizes.values()) <= _TRIED_BYTES:
                _try(program, call)
        largest = max(shard.nbytes for shard in layout.shards)
        size = sum(layout.sizes.values())
        size += min(_BITS * largest, int(size * _SLACK_SHARE))
        page_lock(layout.shards[0].device, size if self._most_bytes is None else min(size, self._most_bytes))


def _off_host(sharding: Any) -> bool:
    return isinstance(sharding, jax.sharding.Sharding) and not on_host(sharding)


def _try(program: Any, call: Call) -> None:
    """A program is loaded when it first runs, which takes as long as 60 ms."""
    sharding = SingleDeviceSharding(call.device)
    given = [[np.zeros(shape, dtype) for shape, dtype in group] for group in call.form]
    jax.block_until_ready(program(jax.device_put(given, sharding)))


def page_lock(device: Any, size: int) -> None:
    """Have JAX hold `size` bytes of page-locked memory, once in a process: more than that it takes as it needs it. In
    `own_context`, any thread."""
    global _locked_bytes
    with _locking:
        if _locked_bytes:
            return
        _locked_bytes = size
        try:
            sharding = SingleDeviceSharding(device, memory_kind=PINNED_HOST)
            jax.block_until_ready([jax.device_put(np.zeros(one, np.uint8), sharding) for one in regions(size)])
        except page_locked.NO_ROOM as error:  # it has none, or not enough: staging copes
            logging.info("no %d bytes of page-locked memory beforehand: %s", size, error)


def regions(size: int) -> Iterator[int]:
    """Sizes of regions, ascending powers of two, which hold `size` bytes together."""
    units = max(1, -(-size // _REGION_BYTES))
    step = 1 << max(0, units.bit_length() - _BITS)
    units = -(-units // step) * step
    for bit in range(units.bit_length()):
        if units >> bit & 1:
            yield _REGION_BYTES << bit
