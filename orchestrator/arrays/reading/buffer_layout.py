"""Which regions of a leaf this process needs, and which chunks fill them.

May not do: read anything, or allocate a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orchestrator.arrays.reading.requests import Frame, ReadRequest
from orchestrator.errors import Damaged
from orchestrator.rules import zarr_chunks
from orchestrator.rules.boxes import box_of, intersection, moved, shape_of, slices_in, volume, whole_box
from orchestrator.rules.records import Box, LeafSpec


@dataclass(frozen=True)
class Destination:
    """Where a part of a chunk goes: `part` of the chunk to `inside` of the leaf's buffer number `buffer`. `direct`: the
    part is the whole chunk and contiguous in the buffer, so that it can be read straight into it."""

    buffer: int
    inside: tuple[slice, ...]
    part: tuple[slice, ...]
    direct: bool


@dataclass(frozen=True)
class BufferLayout:
    """What all leaves of one shape, chunk shape and sharding have in common.

    shapes, boxes: of each buffer, and of the region of the leaf that it holds. devices: of this process, and with
    `buffer_of` the number of the buffer that each gets. reads: for each chunk the end of its key and its destinations.
    """

    shapes: tuple[tuple[int, ...], ...]
    boxes: tuple[Box, ...]
    devices: tuple[Any, ...]
    buffer_of: tuple[int, ...]
    reads: tuple[tuple[str, tuple[Destination, ...]], ...]


def layout_of(request: ReadRequest) -> BufferLayout:
    """One buffer for each different region that the devices of this process have, one for all on the host. Raises
    Damaged if the chunks do not cover them."""
    shape, chunk = request.leaf.file_shape, request.leaf.chunk
    whole = _whole(request.leaf)
    numbers: dict[Box, int] = {}
    devices, buffer_of = [], []
    if request.sharding is None:
        numbers[whole] = 0
    else:
        frame = request.frame or Frame(request.leaf.shape, whole.start)
        sizes = (*frame.shape, *shape[len(frame.shape) :])
        for device, index in request.sharding.addressable_devices_indices_map(frame.shape).items():
            box = moved(box_of(index or (), sizes), frame.start)
            devices.append(device)
            buffer_of.append(numbers.setdefault(box, len(numbers)))
    return _cover(numbers, chunk, tuple(devices), tuple(buffer_of), whole)


def region_layout(leaf: LeafSpec, box: Box) -> BufferLayout:
    """One buffer for a region of a leaf, on the host. Raises Damaged as `layout_of`."""
    return _cover({box: 0}, leaf.chunk, (), (), box)


def with_chunks(layout: BufferLayout, leaf: LeafSpec, chunk: tuple[int, ...]) -> BufferLayout:
    """The layout with the chunk shape that only the array's own metadata has. Raises Damaged as `layout_of`."""
    numbers = {box: number for number, box in enumerate(layout.boxes)}
    return _cover(numbers, chunk, layout.devices, layout.buffer_of, _whole(leaf))


def _whole(leaf: LeafSpec) -> Box:
    return whole_box(leaf.file_shape)


def _cover(
    numbers: dict[Box, int],
    chunk: tuple[int, ...] | None,
    devices: tuple[Any, ...],
    buffer_of: tuple[int, ...],
    whole: Box,
) -> BufferLayout:
    """The chunks that fill boxes, given with the numbers of their buffers. What is outside `whole` is not filled, and
    nothing is while the chunk shape is not known."""
    found: dict[Box, list[Destination]] = {}
    for box, number in numbers.items() if chunk is not None else ():
        filled = intersection(box, whole)
        if any(start >= stop for start, stop in zip(filled.start, filled.stop, strict=True)):
            continue
        covered = 0
        for one in zarr_chunks.touching(filled, chunk or ()):
            common = intersection(filled, one)
            inside = slices_in(common, box)
            direct = common == one and _is_contiguous(common, box)
            destination = Destination(number, inside, slices_in(common, one), direct)
            found.setdefault(one, []).append(destination)
            covered += volume(common)
        # Memory that nothing is read into holds whatever was there before.
        if covered != volume(filled):
            raise Damaged(f"chunks of {chunk} cover {covered} elements of the region {filled}; not read")
    return BufferLayout(
        shapes=tuple(shape_of(box) for box in numbers),
        boxes=tuple(numbers),
        devices=devices,
        buffer_of=buffer_of,
        reads=tuple((zarr_chunks.suffix(one, chunk or ()), tuple(parts)) for one, parts in found.items()),
    )


def _is_contiguous(box: Box, outer: Box) -> bool:
    """Whether `box` is one run of elements of an array that holds `outer`, in C order."""
    sizes = [
        (stop - start, last - first)
        for start, stop, first, last in zip(box.start, box.stop, outer.start, outer.stop, strict=True)
    ]
    while sizes and sizes[0][0] == 1:
        sizes = sizes[1:]
    return all(size == whole for size, whole in sizes[1:])
