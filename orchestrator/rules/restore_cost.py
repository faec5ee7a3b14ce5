"""What a restore on another mesh will read, hold and take, before a device exists: pure arithmetic on the tree spec.

Devices stand in the mesh in row-major order and belong to processes in equal runs, as `jax.make_mesh` lays them out on
CPUs and GPUs. Arrays keep the partition specs they were saved with; an axis that the new mesh lacks splits nothing.
What is not a sharded array (numpy, arrays on one device) is read whole by every process. The chunk arithmetic is that
of `arrays.reading`: tests compare the two.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.errors import UsageError
from orchestrator.rules import zarr_chunks
from orchestrator.rules.boxes import volume, whole_box
from orchestrator.rules.dtypes import ITEM_BYTES
from orchestrator.rules.records import Box, LeafSpec, TreeSpec
from orchestrator.rules.validate import SHARDING_CHARS_MAX

# What reading holds beside the arrays themselves. From files: chunks that do not go straight to their place. From an
# object store: reads in flight (bounded by `arrays.reading`) and TensorStore's own copies. Measured by
# benchmarks/forecast.py.
FILES_BYTES = 8 << 20
STORE_BYTES = 160 << 20
# A partition spec as JAX writes it: P('data', None, ('a', 'b')), and before 0.9 PartitionSpec(...). Never as Python: it
# comes from storage.
_AXIS = re.compile(r"'[^']*'|\"[^\"]*\"")
_DIMENSION = re.compile(rf"None|{_AXIS.pattern}|\((?:(?:{_AXIS.pattern})(?:, ?)?)*\)")
_PARTITION = re.compile(rf"P(?:artitionSpec)?\((?:(?:{_DIMENSION.pattern})(?:, ?)?)*\)")
_UNITS = {"": 1, "B": 1, "K": 10, "M": 20, "G": 30, "T": 40}


@dataclass(frozen=True)
class Target:
    """The mesh, and the processes that its devices are spread over. Raises UsageError if they do not divide."""

    axes: Mapping[str, int]
    processes: int

    def __post_init__(self) -> None:
        if self.processes < 1 or self.devices % self.processes:
            raise UsageError(
                f"{self.devices} devices ({self.label}) over {self.processes} processes: expected the same on each"
            )

    @property
    def devices(self) -> int:
        return math.prod(self.axes.values())

    @property
    def label(self) -> str:
        return " x ".join(f"{name}={size}" for name, size in self.axes.items()) or "no mesh"


@dataclass(frozen=True)
class Cost:
    """What a restore costs one process. `array_bytes`: host buffers, which become the device arrays. `device_bytes`: on
    each of its devices."""

    read_bytes: int = 0
    reads: int = 0
    array_bytes: int = 0
    device_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.read_bytes + other.read_bytes,
            self.reads + other.reads,
            self.array_bytes + other.array_bytes,
            self.device_bytes + other.device_bytes,
        )

    def peak_bytes(self, *, files: bool) -> int:
        """`files`: the run is on a file system, not in an object store."""
        return self.array_bytes + min(self.read_bytes, FILES_BYTES if files else STORE_BYTES)


@dataclass(frozen=True)
class Forecast:
    """`costs`: by process. `problems`: arrays that the mesh cannot hold, one line each."""

    state_bytes: int
    costs: tuple[Cost, ...]
    problems: tuple[str, ...]

    @property
    def read_bytes(self) -> int:
        return sum(cost.read_bytes for cost in self.costs)

    @property
    def amplification(self) -> float:
        """Bytes read over bytes of the state: 1 if every byte is read once."""
        return self.read_bytes / self.state_bytes if self.state_bytes else 1.0


@dataclass(frozen=True)
class Measured:
    """One restore of this run as one process saw it."""

    group: tuple[int, int]  # epoch and step: the processes of one restore
    machine: str
    seconds: float
    array_s: float
    read_bytes: int


@dataclass(frozen=True)
class Speed:
    """What this run's own restores took. `fixed_s`: agreeing and records; `machine_bytes_per_s`: of all processes on
    one machine together; `processes_per_machine`: None if all were on one."""

    fixed_s: float
    machine_bytes_per_s: float
    processes_per_machine: int | None
    restores: int

    def seconds(self, costs: Sequence[Cost]) -> float:
        """Expected seconds until the last process has restored."""
        run = self.processes_per_machine or len(costs)
        per_machine = [sum(cost.read_bytes for cost in costs[at : at + run]) for at in range(0, len(costs), run)]
        return self.fixed_s + max(per_machine, default=0) / self.machine_bytes_per_s


def parse_mesh(text: str) -> dict[str, int]:
    """`data=4,model=2`, in that order. Raises UsageError."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if not name or name in axes or not size.isdecimal() or int(size) < 1:
            raise UsageError(f"--mesh={text}: cannot use {part!r}; expected AXIS=SIZE,AXIS=SIZE,...")
        axes[name] = int(size)
    return axes


def parse_bytes(flag: str, text: str) -> int:
    """`64GiB`, `1.5T`, `800MB`: binary units, however they are written. Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:iB|B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise UsageError(f"--{flag}={text}: expected a size such as 64GiB")
    power = _UNITS[found[2].upper()]
    return int(float(found[1]) * (1 if not found[2] else 2**power))


def item_bytes(leaf: LeafSpec) -> int:
    """Size of one stored element on the host."""
    return ITEM_BYTES[leaf.stored_dtype or leaf.dtype]


def leaf_bytes(leaf: LeafSpec) -> int:
    """Bytes of the leaf's elements; 0 for values kept in the tree spec."""
    return math.prod(leaf.file_shape) * item_bytes(leaf) if leaf.in_store else 0


def partition(leaf: LeafSpec) -> tuple[tuple[str, ...], ...] | None:
    """The mesh axes that split each dimension, of a leaf saved with a partition spec; None for any other."""
    if len(leaf.sharding) > SHARDING_CHARS_MAX or not _PARTITION.fullmatch(leaf.sharding):
        return None
    dimensions = _DIMENSION.findall(leaf.sharding.partition("(")[2][:-1])
    split = tuple(tuple(text[1:-1] for text in _AXIS.findall(part)) for part in dimensions)
    return split if len(split) <= len(leaf.shape) else None


def forecast(tree: TreeSpec, target: Target) -> Forecast:
    """What restoring `tree` onto `target` costs each process."""
    totals = [Cost()] * target.processes
    problems = []
    known: dict[object, tuple[Cost, ...]] = {}  # layers repeat: arrays of one shape and spec cost the same
    for leaf in tree.leaves:
        if not leaf.in_store:
            continue
        split = partition(leaf)
        problem = _indivisible(leaf, split or (), target)
        if problem:
            problems.append(problem)
            continue
        same = (split, leaf.file_shape, leaf.chunk, item_bytes(leaf))
        if same not in known:
            known[same] = tuple(_cost(leaf, boxes) for boxes in boxes_by_process(leaf, split, target))
        totals = [total + cost for total, cost in zip(totals, known[same], strict=True)]
    return Forecast(sum(map(leaf_bytes, tree.leaves)), tuple(totals), tuple(problems))


def _indivisible(leaf: LeafSpec, split: tuple[tuple[str, ...], ...], target: Target) -> str:
    for axis, names in enumerate(split):
        parts = math.prod(target.axes.get(name, 1) for name in names)
        if leaf.shape[axis] % parts:
            return (
                f"{leaf.label}{list(leaf.shape)}: dimension {axis} of {leaf.shape[axis]} is not divisible by "
                f"{parts} ({', '.join(names)}); choose another mesh or another sharding"
            )
    return ""


def boxes_by_process(
    leaf: LeafSpec, split: tuple[tuple[str, ...], ...] | None, target: Target
) -> Iterator[frozenset[Box]]:
    """What each process needs of an array."""
    whole = whole_box(leaf.file_shape)
    each = target.devices // target.processes
    for process in range(target.processes):
        if split is None:
            yield frozenset({whole})
            continue
        places = (_coordinates(target.axes, device) for device in range(process * each, (process + 1) * each))
        yield frozenset(_box(leaf, split, target.axes, place) for place in places)


def _coordinates(axes: Mapping[str, int], device: int) -> dict[str, int]:
    place: dict[str, int] = {}
    for name in reversed(tuple(axes)):
        device, place[name] = divmod(device, axes[name])
    return place


def _box(leaf: LeafSpec, split: tuple[tuple[str, ...], ...], axes: Mapping[str, int], place: Mapping[str, int]) -> Box:
    start, stop = [0] * len(leaf.file_shape), list(leaf.file_shape)
    for dimension, names in enumerate(split):
        index, parts = 0, 1
        for name in names:
            if name in axes:
                index, parts = index * axes[name] + place[name], parts * axes[name]
        size = leaf.shape[dimension] // parts
        start[dimension], stop[dimension] = index * size, (index + 1) * size
    return Box(start=tuple(start), stop=tuple(stop))


def _cost(leaf: LeafSpec, boxes: Iterable[Box]) -> Cost:
    size = item_bytes(leaf)
    boxes = list(boxes)
    array_bytes = [volume(box) * size for box in boxes]
    if leaf.chunk is None:  # read through TensorStore's zarr3 driver, box by box
        return Cost(sum(array_bytes), len(boxes), sum(array_bytes), max(array_bytes))
    chunks = {chunk for box in boxes for chunk in zarr_chunks.touching(box, leaf.chunk)}
    read_bytes = len(chunks) * math.prod(leaf.chunk) * size
    return Cost(read_bytes, len(chunks), sum(array_bytes), max(array_bytes))


def speed(restores: Iterable[Measured], processes: int) -> Speed | None:
    """How fast this run's restores were, for a job of `processes`; None if none was measured. Medians: a cold cache is
    not the rule. On one machine processes share cores: restores by as many of them count, where there are any."""
    groups: dict[tuple[int, int], list[Measured]] = {}
    for restore in restores:
        if restore.read_bytes and restore.array_s > 0:
            groups.setdefault(restore.group, []).append(restore)
    if not groups:
        return None
    rates, fixed, crowd = [], [], 1
    if len({restore.machine for group in groups.values() for restore in group}) == 1:
        groups = {key: group for key, group in groups.items() if len(group) == processes} or groups
    machines = {restore.machine for group in groups.values() for restore in group}
    for group in groups.values():
        for machine in {restore.machine for restore in group}:
            here = [restore for restore in group if restore.machine == machine]
            rates.append(sum(restore.read_bytes for restore in here) / max(restore.array_s for restore in here))
            crowd = max(crowd, len(here))
        agreeing_s = max(restore.seconds for restore in group) - max(restore.array_s for restore in group)
        # On one machine the processes take turns at what each must do.
        fixed.append(agreeing_s * processes / len(group) if len(machines) == 1 else agreeing_s)
    spread = None if len(machines) == 1 else crowd
    return Speed(max(0.0, statistics.median(fixed)), statistics.median(rates), spread, len(groups))
