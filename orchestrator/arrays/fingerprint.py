"""128-bit fingerprints of arrays, computed on the devices that hold them, the same for every sharding.

An array is seen as 32-bit words in row-major order: an element of up to 32 bits is one word, zero-extended; one of 64
or 128 bits is two or four words, low first (a complex number's real part before its imaginary part). Word `w` at global
position `i` (64 bits, `lo` and `hi`) counts with four lanes:

    x = mix(w + 0x9E3779B1 * lo)            and, in arrays of more than 2^32 words, x = mix(x + 0x85EBCA77 * hi)
    y = mix(lo ^ x)
    lanes = x,  y,  mix(x + 0x27D4EB2F * y),  mix(y ^ 0x165667B1 * x)

all modulo 2^32, where `mix` is MurmurHash3's finalizer (https://github.com/aappleby/smhasher/wiki/MurmurHash3), and the
fingerprint is the sum of each lane over all words, modulo 2^32. A sum knows no order, so shards may be added up in any.
Bits count, not values: -0.0 is not 0.0, and NaNs differ by payload.

Limits. One changed word always changes lane x: at one position `mix` maps different words to different sums. (w, lo)
and (x, y) determine each other, so moving elements changes what is summed; that sums of different words agree in all
four lanes is a matter of chance, about 2^-128. It is no cryptographic hash: whoever wants to can make two arrays with
one fingerprint. Shape and dtype are not part of it; they are compared as such.

No collective, no gather: every device reads its own shard once, and 16 bytes per shard come back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from orchestrator.arrays.element_types import bit_count
from orchestrator.arrays.jax_context import in_own_context
from orchestrator.arrays.jax_internals import arrays_of_shards, programs_know, shards_of
from orchestrator.arrays.leaf_errors import about
from orchestrator.arrays.memory_kinds import in_default_memory, on_host
from orchestrator.rules import fingerprints
from orchestrator.rules.boxes import box_of, whole_box
from orchestrator.rules.records import Box, LeafSpec, ShardFingerprint

_SMALL_BYTES = 256 << 10  # shards below this are computed many at a time
_TOGETHER = 64
_LARGE_TOGETHER = 8
_WORD = 1 << 32
_HOST = -1


@dataclass(frozen=True)
class LocalShard:
    """One shard as one device holds it: its region (of key data: of the integers), which replica of it, the device's
    id (-1: host memory)."""

    box: Box
    replica: int
    device: int


@dataclass
class Fingerprints:
    """Fingerprints on their way from the devices. held: what has not been begun yet, and may be in any thread."""

    waiting: list[tuple[list[tuple[str, LocalShard]], Any]] = field(default_factory=list)
    held: dict[_Kind, list[_Item]] = field(default_factory=dict)

    @in_own_context
    def launch(self) -> None:
        """Begin computing what is held, and release it. One thread."""
        while self.held:
            kind, items = self.held.popitem()
            for group in _groups(items, _most(kind)):
                parts = [(item.leaf.name, item.parts[at]) for at in range(len(kind.devices)) for item in group]
                self.waiting.append((parts, _launch(kind, group)))

    @in_own_context
    def result(self) -> dict[str, list[tuple[LocalShard, str]]]:
        """Leaf name -> this process's shards and their fingerprints. Any thread; waits for the devices."""
        self.launch()
        found: dict[str, list[tuple[LocalShard, str]]] = {}
        for parts, lanes in self.waiting:
            for (name, part), row in zip(parts, np.asarray(lanes).reshape(-1, 4).tolist(), strict=True):
                found.setdefault(name, []).append((part, fingerprints.as_text(row)))
        return found

    def signed(self) -> dict[str, tuple[ShardFingerprint, ...]]:
        """As `result`, as a receipt has it: devices that hold the same bits of a shard together."""
        told = {}
        for name, found in self.result().items():
            devices: dict[tuple[Box, str], list[int]] = {}
            for part, lanes in found:
                devices.setdefault((part.box, lanes), []).append(part.device)
            told[name] = tuple(ShardFingerprint(box, lanes, tuple(ids)) for (box, lanes), ids in devices.items())
        return told


@dataclass(frozen=True)
class _Kind:
    """What shards must have in common to be computed by one program: the devices in order, the shape and dtype of each
    device's part, whether the array takes more than 2^32 words. `whole`: each device holds all of the array."""

    devices: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: Any
    large: bool
    whole: bool


@dataclass(frozen=True)
class _Item:
    """One leaf: its parts and their data, by device (in numpy's memory, or there); the position of each part's first
    word, the strides in words. lent: the data is of the caller's own arrays, who may donate them."""

    leaf: LeafSpec
    parts: list[LocalShard]
    data: list[Any]
    bases: list[int]
    strides: list[int]
    lent: bool = False


@dataclass(frozen=True)
class _Form:
    """What arrays of one sharding, shape and dtype have in common: the addressable shards, and where they are. way: how
    they are computed."""

    parts: list[LocalShard]
    devices: tuple[Any, ...]
    way: Literal["known", "on CPUs", "on accelerators", "elsewhere"]
    kind: _Kind
    bases: list[int]
    strides: list[int]


_Forms = dict[Any, _Form]  # by (sharding, shape, dtype): most leaves of a model share a few of them


@in_own_context
def start(
    leaves: Iterable[tuple[LeafSpec, Any]], copies: Mapping[str, list[Any]] = MappingProxyType({})
) -> Fingerprints:
    """Begin computing the fingerprints of these arrays (jax.Array or numpy), as far as this process holds them. Those
    that need not be begun at once are `held`: arrays on CPU devices, which JAX does not reuse while they are, and those
    of which there are `copies`: by the leaf's name, all shards that this process has.

    Main thread. When it returns, device arrays may be donated and numpy arrays overwritten.
    """
    now, later = Fingerprints(), Fingerprints()
    forms: _Forms = {}
    for leaf, value in leaves:
        with about(leaf):
            for kind, item in _take(leaf, value, copies.get(leaf.name), forms):
                into = now if item.lent else later
                into.held.setdefault(kind, []).append(item)
    now.launch()
    now.held = later.held
    return now


def _most(kind: _Kind) -> int:
    """How many leaves one program takes. Launching one takes half a millisecond, and compiling longer the more of large
    ones it takes; on CPUs nobody waits for the launch."""
    if math.prod(kind.shape) * kind.dtype.itemsize < _SMALL_BYTES:
        return _TOGETHER
    return 1 if kind.devices[0].platform == "cpu" else _LARGE_TOGETHER


def of(leaf: LeafSpec, value: Any) -> str:
    """The fingerprint of an array that is wholly in this process."""
    found = start([(leaf, value)]).result()[leaf.name]
    return fingerprints.total({part.box: told for part, told in found}.values())


@in_own_context
def of_pieces(leaf: LeafSpec, pieces: Iterable[tuple[Box, Any]]) -> str:
    """The fingerprint of an array from numpy pieces that cover it once, as stored. Holds one piece at a time."""
    found = []
    for box, data in pieces:
        kind, item = _from_host(leaf, leaf.file_shape, LocalShard(box, 0, _HOST), data)
        (lanes,) = np.asarray(_launch(kind, [item])).reshape(-1, 4).tolist()
        found.append(fingerprints.as_text(lanes))
    return fingerprints.total(found)


def _groups(items: list[_Item], most: int) -> Iterator[list[_Item]]:
    """Groups of sizes that are powers of two, so that few programs serve any number of leaves."""
    first = 0
    while first < len(items):
        size = min(most, 1 << ((len(items) - first).bit_length() - 1))
        yield items[first : first + size]
        first += size


def _take(leaf: LeafSpec, value: Any, copies: list[Any] | None, forms: _Forms) -> Iterator[tuple[_Kind, _Item]]:
    if not isinstance(value, jax.Array):
        whole = whole_box(value.shape)
        yield _from_host(leaf, value.shape, LocalShard(whole, 0, _HOST), value)
        return
    if not value.sharding.addressable_devices:  # other processes hold it
        return
    if leaf.kind == "key":
        value = jax.random.key_data(value)
    key = (value.sharding, value.shape, value.dtype)
    form = forms.get(key)
    if form is None:
        form = forms[key] = _form(value)
    held = shards_of(value)
    if form.way != "elsewhere" and copies is not None:
        yield form.kind, _Item(leaf, form.parts, copies, form.bases, form.strides)
    elif form.way == "on CPUs":
        yield form.kind, _Item(leaf, form.parts, [np.asarray(one) for one in held], form.bases, form.strides)
    elif form.way == "on accelerators":
        yield form.kind, _Item(leaf, form.parts, list(held), form.bases, form.strides, lent=True)
    else:  # in an accelerator's host memory, for one
        for part, shard in zip(form.parts, held, strict=True):
            yield _from_host(leaf, value.shape, part, np.asarray(shard))


def _form(value: jax.Array) -> _Form:
    shards = value.addressable_shards
    parts = [LocalShard(box_of(one.index, value.shape), one.replica_id, one.device.id) for one in shards]
    devices = tuple(one.device for one in shards)
    way: Any = "elsewhere"
    if programs_know(value.dtype) and on_host(value.sharding):
        way = "on CPUs"
    elif programs_know(value.dtype):
        way = "on accelerators" if in_default_memory(value.sharding) else "known"
    shape = value.sharding.shard_shape(value.shape)
    return _Form(parts, devices, way, *_layout(value.shape, parts, shape, value.dtype, devices, _words(value.dtype)))


def _from_host(leaf: LeafSpec, shape: tuple[int, ...], part: LocalShard, value: Any) -> tuple[_Kind, _Item]:
    """A part in host memory, as words: JAX without x64 has no 64-bit types."""
    value = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")  # a copy: the caller may overwrite his own
    words = _words(value.dtype)
    if words > 1:
        value = value.reshape(*value.shape, 1).view(np.uint32)
    else:
        unsigned = f"u{value.dtype.itemsize}"
        value = np.asarray(value.view(unsigned) & np.asarray(_mask(value.dtype), unsigned))
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # jax_platforms names an accelerator only
        device = jax.local_devices()[0]
    return _plan(leaf, shape, [part], [value], (device,), words)


def _plan(
    leaf: LeafSpec,
    shape: tuple[int, ...],
    parts: list[LocalShard],
    data: list[Any],
    devices: tuple[Any, ...],
    words: int,
) -> tuple[_Kind, _Item]:
    kind, bases, strides = _layout(shape, parts, tuple(data[0].shape), data[0].dtype, devices, words)
    return kind, _Item(leaf, parts, data, bases, strides)


def _layout(
    shape: tuple[int, ...],
    parts: list[LocalShard],
    part_shape: tuple[int, ...],
    dtype: Any,
    devices: tuple[Any, ...],
    words: int,
) -> tuple[_Kind, list[int], list[int]]:
    """The kind of parts held as `part_shape` and `dtype`, the position of each one's first word, the strides."""
    strides = [words * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    bases = [sum(map(int.__mul__, part.box.start, strides)) for part in parts]
    inner = [1] if words > 1 else []
    whole = len(parts) == 1 or all(part.box == parts[0].box for part in parts)
    large = words * math.prod(shape) > _WORD
    return _Kind(devices, part_shape, dtype, large, whole), bases, [*strides, *inner]


def _words(dtype: Any) -> int:
    """How many 32-bit words an element takes: 1, 2 or 4."""
    return max(1, int(np.dtype(dtype).itemsize) // 4)


def _mask(dtype: Any) -> int:
    """The bits that count: numpy keeps an element of less than a byte in a byte."""
    return (1 << bit_count(dtype)) - 1


def _launch(kind: _Kind, group: list[_Item]) -> Any:
    """Start one program on all of this process's devices. Its result: for each device, four lanes of each leaf."""
    count = len(kind.devices)
    mesh = _mesh(kind.devices)
    if kind.whole:
        shape, spec = kind.shape, PartitionSpec()
    else:  # as if the devices' parts lay one after another; nothing is moved
        shape, spec = (count * kind.shape[0], *kind.shape[1:]), PartitionSpec("shard")
    sharding = NamedSharding(mesh, spec)
    arrays = []
    for item in group:
        with about(item.leaf):  # JAX before 0.9 looks here first whether it was deleted
            arrays.append(_together(shape, sharding, item.data, kind.devices))
    bases = _halves([[item.bases[at] for item in group] for at in range(count)])
    strides = _halves([item.strides for item in group])
    alike = math.prod(kind.shape) * kind.dtype.itemsize < _SMALL_BYTES
    return _program(kind.devices, kind.large, kind.whole, alike)(arrays, bases, strides)


def _together(shape: tuple[int, ...], sharding: NamedSharding, data: list[Any], devices: tuple[Any, ...]) -> jax.Array:
    if not isinstance(data[0], np.ndarray):
        return jax.make_array_from_single_device_arrays(shape, sharding, data)
    if len(devices) == 1 or not sharding.is_fully_replicated:
        return arrays_of_shards(shape, data[0].dtype, sharding, [data], devices, copied=False)[0]
    copies = [  # each its own: whether they are equal is the question, and one call takes the first for all
        arrays_of_shards(shape, copy.dtype, SingleDeviceSharding(device), [[copy]], [device], copied=False)[0]
        for copy, device in zip(data, devices, strict=True)
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, copies)


def _halves(numbers: Any) -> np.ndarray[Any, Any]:
    """Whole numbers as (low, high) words in a last dimension."""
    wide = np.array(numbers, np.uint64)
    return np.stack([wide & np.uint64(_WORD - 1), wide >> np.uint64(32)], axis=-1).astype(np.uint32)


@functools.lru_cache(maxsize=64)
def _mesh(devices: tuple[Any, ...]) -> Mesh:
    return Mesh(np.array(devices), ("shard",))


@functools.lru_cache(maxsize=64)
def _program(devices: tuple[Any, ...], large: bool, whole: bool, joined: bool) -> Any:
    """joined: the arrays are small, and computed as one."""
    part, shard = PartitionSpec() if whole else PartitionSpec("shard"), PartitionSpec("shard")

    def lanes(arrays: list[Any], bases: Any, strides: Any) -> Any:
        bits = [_bits(array) for array in arrays]
        if not joined:
            sums = [_sum(one, bases[0, at], strides[at], large=large) for at, one in enumerate(bits)]
            return jnp.stack(sums)[None]
        return jax.vmap(functools.partial(_sum, large=large))(jnp.stack(bits), bases[0], strides)[None]

    mapped = jax.shard_map(
        lanes, mesh=_mesh(devices), in_specs=(part, shard, PartitionSpec()), out_specs=shard, check_vma=False
    )
    return jax.jit(mapped)


def _bits(array: Any) -> Any:
    """Elements as unsigned integers of at most 32 bits; larger ones as words in a last dimension."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
        bits = lax.bitcast_convert_type(array, jnp.uint32)
        return bits.reshape(*array.shape[:-1], -1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    width = min(32, bit_count(array.dtype))
    bits = lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}"))
    return bits.astype(jnp.uint8) if width < 8 else bits


def _sum(words: Any, base: Any, strides: Any, *, large: bool) -> Any:
    """Four lanes of one device's part. `base` and `strides` are (low, high) words."""
    zero = jnp.uint32(0)
    low, high = base[0], base[1]
    for axis in range(words.ndim):
        count = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        more = count * strides[axis, 0]
        low = low + more
        if large:
            high = high + count * strides[axis, 1] + _high_product(count, strides[axis, 0])
            high = high + (low < more).astype(jnp.uint32)
    x = _mix(words.astype(jnp.uint32) + jnp.uint32(0x9E3779B1) * low)
    if large:
        x = _mix(x + jnp.uint32(0x85EBCA77) * high)
    y = _mix(low ^ x)
    lanes = (x, y, _mix(x + jnp.uint32(0x27D4EB2F) * y), _mix(y ^ (jnp.uint32(0x165667B1) * x)))

    def add(one: Any, other: Any) -> Any:
        return tuple(a + b for a, b in zip(one, other, strict=True))

    # One reduction of four operands: four sums would read the array four times.
    return jnp.stack(lax.reduce(lanes, (zero,) * len(lanes), add, tuple(range(words.ndim))))


def _mix(word: Any) -> Any:
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _high_product(a: Any, b: Any) -> Any:
    """The upper 32 bits of the 64-bit product, of 16-bit halves."""
    a_low, a_high, b_low, b_high = a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carried = (middle & 0xFFFF) + a_low * b_high
    return a_high * b_high + (middle >> 16) + (carried >> 16)
