"""The states that are saved: incompressible values, the same in every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

COLUMNS = 1024


@dataclass(frozen=True)
class Shape:
    """`replicated`: every device holds all of it; else the first dimension is split over all devices."""

    title: str
    rounds: int
    replicated: bool = False


SHAPES = {
    "arrays": Shape("(a) 512 MiB in 16 arrays", 7),
    "leaves": Shape("(b) 2000 leaves of 64 B", 7),
    "gpt2": Shape("(c) GPT-2-small with Adam, unscanned", 7),
    "large": Shape("(d) 4 GiB in 64 arrays", 3),
    "replicated": Shape("(e) 256 MiB in 16 arrays, replicated", 7, replicated=True),
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


def build(name: str) -> dict[str, Any]:
    """The state on this job's devices."""
    import jax
    import ml_dtypes
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    spec = PartitionSpec() if SHAPES[name].replicated else PartitionSpec("data")
    sharding = NamedSharding(mesh, spec)
    state = {}
    for number, (leaf, shape, dtype) in enumerate(leaves(name)):
        kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

        def part(index: Any, number: int = number, shape: Any = shape, kind: Any = kind) -> Any:
            bounds = [piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True)]
            sizes = [stop - start for start, stop in bounds]
            rng = np.random.default_rng([number, *(start for start, _ in bounds)])
            return rng.integers(0, 256, int(np.prod(sizes)) * kind.itemsize, np.uint8).view(kind).reshape(sizes)

        state[leaf] = jax.make_array_from_callback(shape, sharding, part)
    jax.block_until_ready(state)
    return state


def elsewhere(state: dict[str, Any]) -> dict[str, Any]:
    """The state as targets on another mesh: the last dimension split, where there are two, instead of the first."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def target(leaf: Any) -> Any:
        mesh = jax.make_mesh((jax.device_count(),), ("model",))
        spec = PartitionSpec(*(None,) * (leaf.ndim - 1), "model")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return {name: target(leaf) for name, leaf in state.items()}


def here(state: dict[str, Any]) -> dict[str, Any]:
    """The state as targets on its own mesh."""
    import jax

    return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in state.items()}


def own_arrays(state: dict[str, Any]) -> list[Any]:
    """What this process would have to write: each of its shards that no lower replica holds, as numpy."""
    import numpy as np

    return [
        np.asarray(shard.data) for leaf in state.values() for shard in leaf.addressable_shards if not shard.replica_id
    ]
