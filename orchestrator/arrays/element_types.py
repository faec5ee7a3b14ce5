"""The element types of arrays: numpy's, and those of ml_dtypes that numpy does not have."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from orchestrator.errors import UsageError
from orchestrator.rules.dtypes import ITEM_BYTES, STORED_AS

STORABLE = frozenset(ITEM_BYTES)


@functools.lru_cache(maxsize=256)
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a name that a tree spec may have, from ml_dtypes where numpy has none. Raises UsageError."""
    if name in STORABLE or name in STORED_AS:  # numpy reads a language of its own in other names
        try:
            return np.dtype(getattr(ml_dtypes, name, name))
        except TypeError:
            pass
    raise UsageError(f"dtype {name!r} is unknown to this numpy and ml_dtypes; install newer ones")


@functools.lru_cache(maxsize=256)
def is_key(dtype: Any) -> bool:
    """Whether it is the type of typed PRNG keys."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.prng_key))


def bit_count(dtype: Any) -> int:
    """Bits of an element as XLA counts them; numpy keeps an element in a byte at least."""
    if jnp.issubdtype(dtype, jnp.integer):
        return int(ml_dtypes.iinfo(dtype).bits)
    return int(ml_dtypes.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * np.dtype(dtype).itemsize


def carrier(dtype: np.dtype[Any]) -> np.dtype[Any] | None:
    """The unsigned integers that elements of `dtype` are exchanged as between devices; None: as they are. Backends may
    exchange small floats as larger ones, which changes NaNs, and know little of elements of less than a byte."""
    small = dtype.kind in "fV" and dtype.itemsize <= 4  # numpy's own floats, and those of ml_dtypes
    return np.dtype(f"u{dtype.itemsize}") if small else None
