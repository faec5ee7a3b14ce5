"""Where the leaves of a restore's target are to be: shardings over real devices, however the target names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from orchestrator.arrays.jax_context import users_mesh
from orchestrator.errors import Mismatch


def shardings_of(labels: Sequence[str], targets: Sequence[Any], where: str) -> list[Sharding | None]:
    """For each target leaf the sharding it asks for; None for numpy and for what is no array.

    A target without one goes to this process's first device. One over an abstract mesh (what `jax.eval_shape` gives
    under a mesh of explicit axes) is over the mesh that `jax.set_mesh` has set, if that has the same axes. Main thread,
    outside of `own_context`. Raises Mismatch naming every leaf whose sharding cannot be had, or does not fit it.
    """
    current = users_mesh()
    # Few of many: by sharding, an object that is kept as long, and shape.
    known: dict[tuple[int, tuple[int, ...]], tuple[Any, Sharding | None]] = {}
    found: list[Sharding | None] = []
    problems: list[str] = []
    for label, target in zip(labels, targets, strict=True):
        try:
            if not isinstance(target, jax.ShapeDtypeStruct):
                found.append(_sharding_of(target, current))
                continue
            form = (id(target.sharding), target.shape)
            if form not in known:
                known[form] = target.sharding, _sharding_of(target, current)
            found.append(known[form][1])
        except ValueError as error:
            problems.append(f"{label}: {error}")
    if problems:
        raise Mismatch(where, problems)
    return found


def _sharding_of(target: Any, current: Mesh) -> Sharding | None:
    if isinstance(target, np.ndarray | np.generic) or not hasattr(target, "shape"):
        return None
    given = getattr(target, "sharding", None)
    sharding = over_devices(given, current)
    if sharding is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    sharding.shard_shape(tuple(target.shape))  # whether it divides the shape
    return sharding


def over_devices(sharding: Any, current: Mesh) -> Sharding | None:
    """A sharding of a target over real devices, `current` being the mesh that is set; None if it names none. Raises
    ValueError saying what to do."""
    if isinstance(sharding, PartitionSpec):
        return NamedSharding(_real(sharding, None, current), sharding)
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        if sharding.mesh.empty:  # made where no mesh was set
            return None
        mesh = _real(sharding.spec, sharding.mesh, current)
        return NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
    return sharding if isinstance(sharding, Sharding) else None


def _real(spec: PartitionSpec, abstract: AbstractMesh | None, current: Mesh) -> Mesh:
    if not current.empty and (abstract is None or dict(current.shape) == dict(abstract.shape)):
        return current
    over = f"an abstract mesh {_axes(abstract)}" if abstract is not None else "no mesh"
    now = f"the mesh that is set is {_axes(current)}" if not current.empty else "no mesh is set"
    raise ValueError(
        f"the target's sharding {spec} is over {over}, and {now}; restore inside of jax.set_mesh(mesh) with the mesh "
        "that it was made for, or give the target NamedSharding(mesh, spec)"
    )


def _axes(mesh: Mesh | AbstractMesh) -> str:
    return "(" + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()) + ")"
