"""Settings of JAX that a program may have around its calls of ours, in a thread or for the whole process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from orchestrator.arrays import jax_internals

Setting = Callable[[], contextlib.AbstractContextManager[Any]]


def mesh_of(kind: AxisType) -> Mesh:
    """Four devices as data=2 x model=2."""
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:4])


@contextlib.contextmanager
def entered(mesh: Mesh) -> Iterator[None]:
    """A mesh as it was set before `jax.set_mesh`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with mesh:
            yield


@contextlib.contextmanager
def updated(name: str, value: Any) -> Iterator[None]:
    """A setting of the whole process: threads of ours see it, too."""
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


def process_wide(name: str, value: Any) -> Setting:
    return lambda: updated(name, value)


AMBIENT: dict[str, Setting] = {
    "nothing": contextlib.nullcontext,
    "set_mesh(Auto)": lambda: jax.set_mesh(mesh_of(AxisType.Auto)),
    "set_mesh(Explicit)": lambda: jax.set_mesh(mesh_of(AxisType.Explicit)),
    "set_mesh(another)": lambda: jax.set_mesh(jax.make_mesh((3,), ("x",), devices=jax.devices()[1:4])),
    "with mesh": lambda: entered(mesh_of(AxisType.Auto)),
    "transfer_guard(disallow)": lambda: jax.transfer_guard("disallow"),
    "transfer_guard(disallow_explicit)": lambda: jax.transfer_guard("disallow_explicit"),
    "disable_jit": lambda: jax.disable_jit(),
    "default_device": lambda: jax.default_device(jax.devices()[2]),
    "enable_x64": jax_internals.enable_x64,
    "promotion strict": lambda: jax.numpy_dtype_promotion("strict"),
    "rank promotion raise": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "debug_key_reuse": lambda: jax.debug_key_reuse(True),
    "checking_leaks": lambda: jax.checking_leaks(),
    "enable_checks": lambda: jax.enable_checks(True),
    "no_tracing": lambda: jax.no_tracing(True),
    **({"no_execution": lambda: jax.no_execution(True)} if hasattr(jax, "no_execution") else {}),  # from 0.7.2 on
    "prng rbg": lambda: jax.default_prng_impl("rbg"),
    "legacy_prng_key": lambda: jax.legacy_prng_key("error"),
    "ensure_compile_time_eval": lambda: jax.ensure_compile_time_eval(),
    "named_scope": lambda: jax.named_scope("theirs"),
    "process-wide transfer guard": process_wide("jax_transfer_guard", "disallow"),
    "process-wide disable_jit": process_wide("jax_disable_jit", True),
    "process-wide debug_nans": process_wide("jax_debug_nans", True),
    "process-wide default device": lambda: updated("jax_default_device", jax.devices()[3]),
    "process-wide promotion strict": process_wide("jax_numpy_dtype_promotion", "strict"),
    "process-wide rank promotion": process_wide("jax_numpy_rank_promotion", "raise"),
    "process-wide leaks": process_wide("jax_check_tracer_leaks", True),
    "process-wide checks": process_wide("jax_enable_checks", True),
    "process-wide no_tracing": process_wide("jax_no_tracing", True),
}

MESHES = [name for name in AMBIENT if "mesh" in name]


def settings_now() -> dict[str, Any]:
    """Everything that JAX is set to in this thread."""
    named = {name: getattr(jax.config, name, None) for name in jax.config.values}
    return {**named, "mesh": jax_internals.mesh_that_is_set(), "abstract mesh": jax.sharding.get_abstract_mesh()}
