"""What goes to accelerators goes through a bounded piece of host memory, and comes out as it was saved. CPU devices
stand for accelerators: JAX has page-locked arrays for them, too. On accelerators: tests/arrays/test_accelerator.py."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import orchestrator as oc
from orchestrator.arrays import ReadRequest, page_locked
from orchestrator.arrays.reading import buffers, host_ring
from orchestrator.arrays.reading.buffers import BufferGroup, grouped
from orchestrator.arrays.reading.host_memory import Arena
from orchestrator.arrays.reading.host_ring import HostRing
from orchestrator.errors import Suspect
from orchestrator.rules.records import LeafSpec
from tests.support.leaf_values import DTYPES, every_pattern, same
from tests.support.runs import now

MIB = 1 << 20


@pytest.fixture(autouse=True)
def cpus_as_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "on_host", lambda sharding: False)


@pytest.fixture(params=["page-locked", "ordinary"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "ordinary":
        monkeypatch.setattr(page_locked, "PINNED_HOST", "no such memory")
    return str(request.param)


def state_on() -> dict[str, Any]:
    """Many arrays of one form, arrays of every other kind, and many small ones."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, rng = NamedSharding(mesh, PartitionSpec("data")), np.random.default_rng(0)
    state: dict[str, Any] = {f"w{at}": jax.device_put(rng.random((512, 512), np.float32), rows) for at in range(9)}
    state |= {f"other{at}": jax.device_put(rng.random((512, 256 + at), np.float32), rows) for at in range(4)}
    state |= {f"small{at}": jax.device_put(np.full(16, at), rows) for at in range(300)}
    state |= {name: every_pattern(name) for name in DTYPES}
    state["columns"] = jax.device_put(rng.random((512, 512), np.float32), rows.update(spec=PartitionSpec(None, "data")))
    state["replicated"] = jax.device_put(rng.random((512, 512), np.float32), rows.update(spec=PartitionSpec()))
    state["int4"] = jax.device_put(rng.integers(-8, 8, (1024, 2048)).astype(jnp.int4), rows)
    state["offloaded"] = jax.device_put(state["w0"], rows.with_memory_kind("pinned_host"))
    state["keys"] = jax.device_put(jax.random.split(jax.random.key(3), 4), SingleDeviceSharding(jax.devices()[3]))
    state["larger than all"] = jax.device_put(rng.random((5, 1 << 18), np.float32), jax.devices()[1])
    return state


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each group that got page-locked buffers, their bytes."""
    sizes: list[int] = []
    take = page_locked.ReusedArrays.take

    def counted(reused: Any, forms: Any) -> Any:
        arrays = take(reused, forms)
        sizes.append(sum(array.nbytes for array in arrays or ()))
        return arrays

    monkeypatch.setattr(page_locked.ReusedArrays, "take", counted)
    return sizes


@pytest.mark.parametrize("limit", [4 * MIB, None], ids=["in parts", "at once"])
def test_whatever_is_restored_through_the_ring_is_what_was_saved(
    root: Path, memory: str, limit: int | None, taken: list[int]
) -> None:
    state = state_on()
    with oc.Agent(root, options=now(attest="full", restore_bytes_max=limit)) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    same(restored.state, state)
    for name, leaf in state.items():
        if isinstance(leaf, jax.Array):
            assert restored.state[name].sharding == leaf.sharding, name
    assert len([size for size in taken if size]) == (11 if memory == "page-locked" else 0)  # not what must be changed


def test_restored_arrays_have_memory_of_their_own(root: Path, memory: str) -> None:
    state = {f"w{at}": jax.device_put(np.full((512, 512), at, np.float32), jax.devices()[0]) for at in range(9)}
    with oc.Agent(root, options=now(restore_bytes_max=2 * MIB)) as agent:
        assert agent.save(1, state)
        restored = agent.restore(like=state)
    assert restored is not None
    assert len({leaf.unsafe_buffer_pointer() for leaf in restored.state.values()}) == len(state)


# The order of reads and copies, with a reader that only notes what it is asked for.


@dataclass
class Noted:
    """A Reader whose reads end when somebody waits for them, or at once."""

    at_once: bool = False
    log: list[str] = field(default_factory=list)
    held: int = 0
    peak: int = 0
    fails: str = ""
    numbers: Any = field(default_factory=itertools.count)

    def begin(self, groups: Sequence[BufferGroup], arena: Arena) -> Any:
        for group in groups:
            group.allocate(arena)
        name = "+".join(group.leaf.name for group in groups)
        self.log.append(f"begin {name}")
        return _Read(self, groups, name)


@dataclass
class _Read:
    noted: Noted
    groups: Sequence[BufferGroup]
    name: str

    def is_done(self) -> bool:
        return self.noted.at_once

    def result(self) -> None:
        if self.name == self.noted.fails:
            raise Suspect(f"{self.name}: chunk is missing")
        for group in self.groups:
            for buffer in group.buffers:
                buffer[...] = float(self.name.split("+")[0])
        self.noted.log.append(f"read {self.name}")


def groups_of(sizes: Sequence[int]) -> list[BufferGroup]:
    sharding = SingleDeviceSharding(jax.devices()[0])
    leaves = [
        LeafSpec(path=(str(at),), kind="array", shape=(size // 4,), dtype="float32") for at, size in enumerate(sizes)
    ]
    return grouped([ReadRequest(leaf, sharding) for leaf in leaves])


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Noted, int], HostRing]:
    """Makes a ring that notes in the log when it waits for copies, and how much it holds."""

    def make(noted: Noted, most_bytes: int) -> HostRing:
        made = HostRing(most_bytes)
        reuse, allocated = made._reuse, made._allocated

        def reused(part: Any) -> None:
            noted.log.append(f"reuse {'+'.join(group.leaf.name for group in part.groups)}")
            reuse(part)

        def given(groups: Any, size: int) -> Any:
            part = allocated(groups, size)
            noted.peak = max(noted.peak, made._held_bytes)
            return part

        monkeypatch.setattr(made, "_reuse", reused)
        monkeypatch.setattr(made, "_allocated", given)
        return made

    return make


def test_reads_of_later_parts_are_under_way_while_a_part_is_copied_and_memory_is_waited_for_last(ring: Any) -> None:
    noted, values = Noted(), [None] * 7
    ring(noted, 4 * MIB).load(noted, groups_of([MIB] * 7), values)
    assert noted.log == [
        *("begin 0", "begin 1", "begin 2", "begin 3"),  # full
        *("read 0", "read 1", "reuse 0"),  # two copies at work before one is waited for
        *("begin 4", "read 2", "reuse 1"),
        *("begin 5", "read 3", "reuse 2"),
        *("begin 6", "read 4", "read 5", "read 6"),
    ]
    assert noted.peak == 4 * MIB
    assert [float(np.asarray(value)[-1]) for value in values] == [*map(float, range(7))]


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(
    ("sizes", "peak"),
    [
        ([MIB] * 20, 4 * MIB),
        ([3 * MIB, MIB, 3 * MIB, 2 * MIB], 4 * MIB),
        ([9 * MIB], 9 * MIB),  # alone
        ([MIB, 9 * MIB, MIB], 9 * MIB),
        ([MIB // 8] * 50, 4 * MIB),
        ([MIB // 64] * 3, 3 * MIB // 64),
        ([], 0),
    ],
)
def test_the_ring_holds_no_more_than_its_bytes_or_one_leaf(ring: Any, sizes: Any, peak: int, at_once: bool) -> None:
    noted, values = Noted(at_once), [None] * len(sizes)
    ring(noted, 4 * MIB).load(noted, groups_of(sizes), values)
    assert noted.peak == peak
    assert [value.nbytes for value in values] == sizes


@pytest.mark.parametrize("kind", ["page-locked", "ordinary"])
def test_memory_that_is_kept_for_later_parts_stays_within_bounds(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A leaf that is larger than the ring, again and again: of its memory there is one piece."""
    if kind == "ordinary":
        monkeypatch.setattr(host_ring, "_forms", lambda group: [])
    sizes = [*([MIB] * 5), *([9 * MIB, MIB, MIB, MIB, 7 * MIB, MIB, MIB, 8 * MIB, MIB] * 3)]
    noted, values, ring = Noted(True), [None] * len(sizes), HostRing(4 * MIB)
    peak, allocated = 0, ring._allocated

    def measured(groups: Any, size: int) -> Any:
        nonlocal peak
        part = allocated(groups, size)
        parts = (*ring._reading, *ring._copying, part)
        slabs = sum(one.slab.bytes for one in parts) + sum(slab.bytes for slab in ring._slabs)
        locked = sum(array.nbytes for one in parts for array in one.locked) + ring._page_locked._free_bytes
        peak = max(peak, slabs + locked)
        return part

    monkeypatch.setattr(ring, "_allocated", measured)
    ring.load(noted, groups_of(sizes), values)
    assert peak <= 9 * MIB + 4 * MIB


def test_what_a_read_raises_is_raised_and_nothing_is_begun_after_it(ring: Any) -> None:
    noted = Noted(fails="1")
    with pytest.raises(Suspect, match=r"^1: chunk is missing"):
        ring(noted, 4 * MIB).load(noted, groups_of([MIB] * 7), [None] * 7)
    assert "begin 4" not in noted.log


# Page-locked arrays.


def form(size: int, device: int = 0) -> page_locked.Form:
    return jax.devices()[device], (size // 4,), np.dtype(np.float32)


def test_page_locked_arrays_are_given_out_again_by_form_and_kept_within_bounds() -> None:
    reused = page_locked.ReusedArrays(4 * MIB)
    first, second = reused.take([form(MIB), form(MIB)]) or ()
    page_locked.memory(first)[:] = 7
    assert (np.asarray(first).view(np.uint8) == 7).all() and not np.asarray(second).any()
    reused.give_back([first, second])
    assert set(map(id, reused.take([form(MIB), form(MIB)]) or ())) == {id(first), id(second)}
    reused.give_back([first, second])
    assert (reused.take([form(MIB, device=1)]) or [first])[0] is not first
    large = reused.take([form(4 * MIB)]) or ()
    reused.give_back(large)
    assert reused._free_bytes == 4 * MIB  # the others went


def test_memory_that_is_not_the_hosts_or_is_used_up_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert page_locked.ReusedArrays(MIB).take([form(64)]) is not None

    def no_address(array: Any) -> bool:
        raise jax.errors.JaxRuntimeError(
            "INVALID_ARGUMENT: unsafe_buffer_pointer() is for PjRt-compatible backends only"
        )

    monkeypatch.setattr(page_locked, "_is_on_host", no_address)
    assert page_locked.ReusedArrays(MIB).take([form(64)]) is None
    monkeypatch.setattr(page_locked, "_is_on_host", lambda array: False)
    assert page_locked.ReusedArrays(MIB).take([form(64)]) is None
    monkeypatch.setattr(page_locked, "PINNED_HOST", "no such memory")
    assert page_locked.ReusedArrays(MIB).take([form(64)]) is None


def test_bytes_of_a_page_locked_array_keep_it_alive() -> None:
    made = functools.partial(page_locked.ReusedArrays(MIB).take, [form(MIB)])
    view = page_locked.memory((made() or ())[0])
    others = [made() for _ in range(3)]
    view[:] = 9
    assert all(not np.asarray(array).any() for other in others for array in other or ())
    assert host_ring.LOCKED_BYTES <= MIB
