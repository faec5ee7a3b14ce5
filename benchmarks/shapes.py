"""The states that are saved: incompressible values, the same in every run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COLUMNS = 1024


@dataclass(frozen=True)
class Shape:
    """`replicated`: every device holds all of it; else the first dimension is split over all devices. `warm_up`: the
    shape that the round which is not counted saves instead, where its own would take minutes. `peaks`: whether its
    peaks of memory are measured: of a few kilobytes they say nothing, of (d) what those of (a) say."""

    title: str
    rounds: int = 7
    replicated: bool = False
    warm_up: str = ""
    peaks: bool = True


SHAPES = {
    "arrays": Shape("(a) 512 MiB in 16 arrays"),
    "leaves": Shape("(b) 2000 leaves of 64 B", peaks=False),
    "gpt2": Shape("(c) GPT-2-small with Adam, unscanned"),
    "large": Shape("(d) 4 GiB in 64 arrays", warm_up="arrays", peaks=False),
    "replicated": Shape("(e) 256 MiB in 16 arrays, replicated", replicated=True),
}


def leaves(name: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape, dtype) of each leaf."""
    match name:
        case "arrays" | "replicated" | "large":
            count, megabytes = {"arrays": (16, 32), "replicated": (16, 16), "large": (64, 64)}[name]
            for index in range(count):
                yield f"layer_{index:04d}", (megabytes * (1 << 20) // 4 // COLUMNS, COLUMNS), "float32"
        case "leaves":
            for index in range(2000):
                yield f"layer_{index:04d}", (16,), "float32"
        case "gpt2":
            for part, dtype in (("params", "bfloat16"), ("mu", "float32"), ("nu", "float32")):
                for leaf, shape in _gpt2():
                    yield f"{part}_{leaf}", shape, dtype


def _gpt2(width: int = 768, layers: int = 12) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "wte", (50304, width)
    yield "wpe", (1024, width)
    for layer in range(layers):
        for norm in ("ln_1", "ln_2"):
            yield f"h{layer}_{norm}_scale", (width,)
            yield f"h{layer}_{norm}_bias", (width,)
        for matrix, inner, outer in (
            ("attn", width, 3 * width),
            ("proj", width, width),
            ("fc", width, 4 * width),
            ("out", 4 * width, width),
        ):
            yield f"h{layer}_{matrix}_kernel", (inner, outer)
            yield f"h{layer}_{matrix}_bias", (outer,)
    yield "ln_f_scale", (width,)
    yield "ln_f_bias", (width,)


def here(name: str) -> dict[str, Any]:
    """The state as targets on the mesh of all this job's devices: the first dimension split, or replicated."""
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec() if SHAPES[name].replicated else PartitionSpec("data"))
    return {
        leaf: jax.ShapeDtypeStruct(shape, np.dtype(getattr(ml_dtypes, dtype, dtype)), sharding=sharding)
        for leaf, shape, dtype in leaves(name)
    }


def elsewhere(name: str) -> dict[str, Any]:
    """The same on another mesh: the last dimension split, where there are two, instead of the first."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("model",))

    def target(leaf: Any) -> Any:
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "model")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return {path: target(leaf) for path, leaf in here(name).items()}


def build(name: str) -> dict[str, Any]:
    """The state on this job's devices."""
    import jax
    import numpy as np

    state = {}
    for number, (path, leaf) in enumerate(here(name).items()):

        def part(index: Any, number: int = number, leaf: Any = leaf) -> Any:
            bounds = [piece.indices(size)[:2] for piece, size in zip(index, leaf.shape, strict=True)]
            sizes = [stop - start for start, stop in bounds]
            rng = np.random.default_rng([number, *(start for start, _ in bounds)])
            raw = rng.integers(0, 256, math.prod(sizes) * leaf.dtype.itemsize, np.uint8)
            return raw.view(leaf.dtype).reshape(sizes)

        state[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
    jax.block_until_ready(state)
    return state


def is_replicated(state: dict[str, Any]) -> bool:
    return all(leaf.sharding.is_fully_replicated for leaf in state.values())


def own_arrays(state: dict[str, Any]) -> list[Any]:
    """What this process has to write, as numpy: its shards; of what all processes hold, its share."""
    import jax
    import numpy as np

    if is_replicated(state):
        mine = list(state.values())[jax.process_index() :: jax.process_count()]
        return [np.asarray(leaf.addressable_shards[0].data) for leaf in mine]
    return [np.asarray(shard.data) for leaf in state.values() for shard in leaf.addressable_shards]


def needed_bytes(target: dict[str, Any]) -> int:
    """Of this process: the target's bytes on its devices, each byte once."""
    needed = 0
    for leaf in target.values():
        regions = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        needed += shard * len({str(region) for region in regions})
    return needed
