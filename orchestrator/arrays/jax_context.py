"""The settings of JAX that the package's own programs run under, whatever the user has set around the call.

JAX programs are written inside of `jax.set_mesh`, debugged under `jax.transfer_guard` and `jax.disable_jit`, and tuned
by a dozen other settings, of a thread (`with ...:`) or of the whole process (`jax.config.update`). All of them reach
every JAX operation, ours too, where many make a save or a restore fail. Whatever runs an operation of JAX here is
therefore `in_own_context`; tests/arrays/test_jax_context.py finds what is not. Functions of the user's (a pytree's own
flatten and unflatten, policies) run outside of it.

Left as they are, on purpose: `log_compiles` and `explain_cache_misses`, as our programs are programs too; and
`thread_guard`, which is one for all threads, as no collective of ours leaves the main thread.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from orchestrator.arrays import jax_internals
from orchestrator.errors import UsageError

_Function = TypeVar("_Function", bound=Callable[..., Any])
_entered = threading.local()
_TRACING = "called while JAX traces a function; save and restore outside of jax.jit and the like"

_NO_MESH = Mesh(np.empty((), object), ())  # what JAX has before a mesh is set; `set_mesh(None)` says so from 0.10 only

_SETTINGS = {
    "transfer_guard": "allow",
    "disable_jit": False,
    "default_device": None,
    "numpy_dtype_promotion": "standard",
    "numpy_rank_promotion": "allow",
    "debug_nans": False,
    "debug_infs": False,
    "debug_key_reuse": False,
    "check_tracer_leaks": False,
    "no_tracing": False,
    "no_execution": False,  # from 0.7.2 on
}
_CONTEXTS: tuple[Callable[[], Any], ...] = (
    lambda: jax.set_mesh(_NO_MESH),
    jax_internals.enable_x64,  # 64-bit arrays stay what they are, wherever they were made
    # What this JAX does not have, nobody can have set.
    *(functools.partial(getattr(jax, name), value) for name, value in _SETTINGS.items() if hasattr(jax, name)),
)


@contextlib.contextmanager
def own_context() -> Iterator[None]:
    """JAX as a fresh process has it, in this thread; the user's settings are as they were afterwards. Any thread; about
    20 microseconds, nothing where it is entered already. Raises UsageError inside of `jax.jit` and the like."""
    if getattr(_entered, "is_so", False):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            for context in _CONTEXTS:
                stack.enter_context(context())
        except ValueError as error:  # by set_mesh, the first
            raise UsageError(_TRACING) from error
        _entered.is_so = True
        try:
            yield
        finally:
            _entered.is_so = False


def users_mesh() -> jax.sharding.Mesh:
    """The mesh that `jax.set_mesh` has set, an empty one if none is: to be asked outside of `own_context`. Raises
    UsageError inside of `jax.jit` and the like."""
    try:
        return jax_internals.mesh_that_is_set()
    except ValueError as error:
        raise UsageError(_TRACING) from error


def in_own_context(function: _Function) -> _Function:
    """A function that runs in `own_context`. Not for generators: their callers' code runs between their steps."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with own_context():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
